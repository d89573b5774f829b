"""What is counted: a request's provenance, and counters on their way to vLLM's metrics."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from prometheus_client import REGISTRY
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a prompt's KV came from.

    Attributes:
        exact: tokens of an identical prefix, from vLLM's own cache or from a donor.
        reused: tokens whose KV was edited from a similar request.
        recomputed: tokens that a load computed between them.
        donor: the donor that gave most, or None.
        declined: why nothing (more) was reused, or None.
    """

    exact: int = 0
    reused: int = 0
    recomputed: int = 0
    donor: str | None = None
    declined: str | None = None

    def told(self, total: int) -> dict[str, Any]:
        """As it stands in a response; ``computed`` is what vLLM's own prefill did."""
        return {
            "exact": self.exact,
            "reused": self.reused,
            "recomputed": self.recomputed,
            "computed": total - self.exact - self.reused - self.recomputed,
            "donor": self.donor,
            "declined": self.declined,
        }


class KVShareStats(KVConnectorStats):  # type: ignore[misc]
    """Counters since the last report."""

    def reset(self) -> None:
        self.data: dict[str, int] = {}

    def aggregate(self, other: Any) -> KVShareStats:
        self.data = dict(Counter(self.data) + Counter(other.data))
        return self

    def reduce(self) -> dict[str, int | float]:
        return {name: self.data[name] for name in sorted(self.data)}

    def is_empty(self) -> bool:
        return not self.data


def drained(counters: Counter[str]) -> KVShareStats | None:
    """What was counted since the last call, or None."""
    counted = {name: count for name, count in list(counters.items()) if count}
    counters.subtract(counted)  # other threads may have counted on
    return KVShareStats(data=counted) if counted else None


# Counter by prefix of what is counted: metric, label, help. The first that fits is taken.
_FAMILIES = (
    ("prompt_tokens_", "kvshare:prompt_tokens", "source", "Prompt tokens by where KV came from."),
    ("declined_", "kvshare:declined", "reason", "Requests that reused nothing (more)."),
    ("fallback_", "kvshare:fallback", "cause", "Planned reuses that were given up."),
    ("", "kvshare:donor_events", "event", "What happened to donors."),
)
_SECONDS = {
    "lookup_microseconds": ("kvshare:lookup_seconds", "Finding donors and planning."),
    "load_microseconds": ("kvshare:load_seconds", "Editing donors' KV and computing the gaps."),
}


def _unregister_former() -> None:
    """Take the counters of a former engine of this process away, as vLLM does with its own."""
    names = {name for _, name, *_ in _FAMILIES} | {name for name, _ in _SECONDS.values()}
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
        self._seconds = {
            key: self._counter_cls(name=name, documentation=about, labelnames=labelnames)
            for key, (name, about) in _SECONDS.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        labels = self.per_engine_labelvalues[engine_idx]
        for key, count in transfer_stats_data.items():
            if key in self._seconds:
                self._seconds[key].labels(*labels).inc(count / 1e6)
                continue
            for prefix, counter in self._families:
                if key.startswith(prefix):
                    counter.labels(*labels, key.removeprefix(prefix)).inc(count)
                    break
