"""What is told of a request, and what is counted, on its way to vLLM's metrics."""

from __future__ import annotations

from collections import Counter
from typing import Any

from prometheus_client import REGISTRY
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

from kvshare_mm.metrics import SMALL_SECONDS
from kvshare_mm.outputs import Provenance
from kvshare_mm.reuse.audits import BUCKETS


def summary(use: Provenance, gaps: int) -> dict[str, Any]:
    """A prompt's provenance as it stands in a response.

    Args:
        gaps: how many of the recomputed tokens a load computed, between what it kept; vLLM's own
            prefill did the others.
    """
    return {
        "exact": use.exact,
        "reused": use.reused,
        "recomputed": use.recomputed,
        "gaps": gaps,
        "donors": list(use.donors),
        "declined": use.declined,
        "fallback": use.fallback,
        "expected_divergence": use.expected_divergence,
    }


class KVShareStats(KVConnectorStats):  # type: ignore[misc]
    """What was counted and observed since the last report: numbers, and lists of them."""

    def reset(self) -> None:
        self.data: dict[str, Any] = {}

    def aggregate(self, other: Any) -> KVShareStats:
        for name, found in other.data.items():
            known = self.data.get(name)
            self.data[name] = found if known is None else known + found
        return self

    def reduce(self) -> dict[str, int | float]:
        """Counts, and the mean of what was timed."""
        means = {n: sum(x) / len(x) if isinstance(x, list) else x for n, x in self.data.items()}
        return {name: means[name] for name in sorted(means)}

    def is_empty(self) -> bool:
        return not self.data


def drained(counters: Counter[str], times: dict[str, list[float]]) -> KVShareStats | None:
    """What was counted and timed since the last call, or None."""
    counted: dict[str, Any] = {name: count for name, count in list(counters.items()) if count}
    counters.subtract(counted)  # other threads may have counted on
    for name in list(times):
        counted[name] = times.pop(name)
    return KVShareStats(data=counted) if counted else None


# Counter by prefix of what is counted: metric, label, help. The first that fits is taken.
_FAMILIES = (
    ("prompt_tokens_", "kvshare:prompt_tokens", "source", "Prompt tokens by where KV came from."),
    ("declined_", "kvshare:declined", "reason", "Requests that reused nothing (more)."),
    ("fallback_", "kvshare:fallback", "cause", "Planned reuses that were given up."),
    (
        "audits_",
        "kvshare:audits",
        "result",
        "Requests computed in full afterwards, by what was found, or why nothing was.",
    ),
    ("", "kvshare:donor_events", "event", "What happened to donors."),
)
# Histogram by name of what is observed: metric, help, bounds.
_OBSERVED = {
    "lookup_seconds": ("kvshare:lookup_seconds", "Finding candidate donors.", SMALL_SECONDS),
    "plan_seconds": ("kvshare:plan_seconds", "Alignment and planning.", SMALL_SECONDS),
    "load_seconds": (
        "kvshare:load_seconds",
        "A step's work on loads: donors' KV into the pages, the gaps computed.",
        SMALL_SECONDS,
    ),
    "divergence": (
        "kvshare:divergence",
        "KL from full recompute (nats) of audited requests: the larger of the first token's and "
        "the mean along the answer.",
        BUCKETS,
    ),
}


def _unregister_former() -> None:
    """Take the counters of a former engine of this process away, as vLLM does with its own."""
    names = {name for _, name, *_ in _FAMILIES} | {name for name, *_ in _OBSERVED.values()}
    for collector in list(REGISTRY._collector_to_names):
        if getattr(collector, "_name", None) in names:
            REGISTRY.unregister(collector)


class KVShareProm(KVConnectorPromMetrics):  # type: ignore[misc]
    """KVShare's counters beside vLLM's own."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        _unregister_former()
        self._families = [
            (
                prefix,
                self._counter_cls(name=name, documentation=about, labelnames=[*labelnames, by]),
            )
            for prefix, name, by, about in _FAMILIES
        ]
        self._observed = {
            key: self._histogram_cls(
                name=name, documentation=about, buckets=bounds, labelnames=labelnames
            )
            for key, (name, about, bounds) in _OBSERVED.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        labels = self.per_engine_labelvalues[engine_idx]
        for key, count in transfer_stats_data.items():
            if key in self._observed:
                histogram = self._observed[key].labels(*labels)
                for value in count:
                    histogram.observe(value)
                continue
            for prefix, counter in self._families:
                if key.startswith(prefix):
                    counter.labels(*labels, key.removeprefix(prefix)).inc(count)
                    break
