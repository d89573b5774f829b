"""Metrics for Prometheus: vLLM's names where the meaning is the same, `kvshare:` for our own.

Counters and sizes are read from the engine when they are asked for, so requests that were cancelled
or failed count too; times are observed as requests end.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from kvshare_mm.outputs import RequestOutput

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5,
                10, 20, 40, 80)  # fmt: skip
_NEXT_TOKEN = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5)
_WHOLE = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480)
SMALL_SECONDS = (
    0.0001,
    0.00025,
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1,
)

_TIMES = {
    "queue": ("vllm:request_queue_time_seconds", "Waiting for a slot.", _WHOLE),
    "prefill": ("vllm:request_prefill_time_seconds", "The forward over what is computed.", _WHOLE),
    "total": ("vllm:e2e_request_latency_seconds", "From submission to the last token.", _WHOLE),
    "lookup": ("kvshare:lookup_seconds", "Finding candidate donors.", SMALL_SECONDS),
    "plan": ("kvshare:plan_seconds", "Alignment, planning, choosing repairs.", SMALL_SECONDS),
    "edit": ("kvshare:edit_seconds", "Donors' KV into the slot.", SMALL_SECONDS),
}  # fmt: skip


class EngineMetrics:
    """The metrics of one engine.

    Args:
        model_name: label of every metric.
        stats: `KVShare.stats`; None while there is no engine yet.
        depth: ancestors of the deepest stored request.
    """

    def __init__(
        self,
        model_name: str,
        stats: Callable[[], dict[str, Any] | None],
        depth: Callable[[], int],
    ) -> None:
        self.registry = CollectorRegistry()
        self._model = model_name
        self._times = {name: self._histogram(*definition) for name, definition in _TIMES.items()}
        self._first = self._histogram(
            "vllm:time_to_first_token_seconds", "From submission to the first token.", _FIRST_TOKEN
        )
        self._next = self._histogram(
            "vllm:inter_token_latency_seconds", "Between two tokens.", _NEXT_TOKEN
        )
        self._first_by_reuse = Histogram(
            "kvshare:time_to_first_token_seconds",
            "From submission to the first token, by what was reused.",
            ["model_name", "reuse"],
            buckets=_FIRST_TOKEN,
            registry=self.registry,
        )
        self.registry.register(_EngineState(model_name, stats, depth))

    def observe(self, output: RequestOutput) -> None:
        """Take up the times of a finished request."""
        for name, histogram in self._times.items():
            histogram.observe(getattr(output.metrics, name))
        if output.token_ids:
            self._first.observe(output.metrics.ttft)
            p = output.provenance
            reuse = "similar" if p.reused else "exact" if p.exact else "none"
            self._first_by_reuse.labels(self._model, reuse).observe(output.metrics.ttft)
        for seconds in output.metrics.token_times:
            self._next.observe(seconds)

    def render(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def _histogram(self, name: str, about: str, buckets: tuple[float, ...]) -> Any:
        made = Histogram(name, about, ["model_name"], buckets=buckets, registry=self.registry)
        return made.labels(self._model)


class _EngineState(Collector):
    """What the engine counts itself, read at every scrape."""

    def __init__(
        self, model: str, stats: Callable[[], dict[str, Any] | None], depth: Callable[[], int]
    ) -> None:
        self._model = model
        self._stats = stats
        self._depth = depth

    def describe(self) -> Iterator[Metric]:
        return iter(())  # or registering would ask an engine that is not there yet

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        if stats is None:
            return
        seen: dict[str, int] = stats["requests"]
        yield self._gauge(
            "vllm:num_requests_running", "Requests that decode.", stats["queue"]["running"]
        )
        yield self._gauge(
            "vllm:num_requests_waiting", "Requests in the queue.", stats["queue"]["waiting"]
        )
        prompt = seen.get("prompt_tokens", 0)
        exact = seen.get("prompt_tokens_exact", 0)
        reused = seen.get("prompt_tokens_reused", 0)
        yield self._counter("vllm:prompt_tokens", "Prompt tokens.", prompt)
        yield self._counter(
            "vllm:generation_tokens", "Tokens generated.", seen.get("generation_tokens", 0)
        )
        yield self._counter(
            "vllm:spec_decode_num_draft_tokens", "Tokens drafted.", seen.get("draft_tokens", 0)
        )
        yield self._counter(
            "vllm:spec_decode_num_accepted_tokens",
            "Drafted tokens that were right.",
            seen.get("draft_accepted", 0),
        )
        yield self._counter("vllm:prefix_cache_queries", "Prompt tokens looked up.", prompt)
        yield self._counter(
            "vllm:prefix_cache_hits", "Prompt tokens of an identical beginning.", exact
        )
        yield self._counter(
            "vllm:prompt_tokens_cached", "Prompt tokens not computed.", exact + reused
        )
        yield self._labelled(
            "vllm:request_success",
            "Requests by how they ended.",
            "finished_reason",
            _by_prefix(seen, "finished_"),
        )
        yield self._labelled(
            "kvshare:prompt_tokens",
            "Prompt tokens by where their KV came from.",
            "source",
            {
                "exact": exact,
                "reused": reused,
                "recomputed": seen.get("prompt_tokens_recomputed", 0),
            },
        )
        yield self._labelled(
            "kvshare:declined",
            "Requests that reused nothing (more), by reason.",
            "reason",
            _by_prefix(seen, "declined_"),
        )
        yield self._labelled(
            "kvshare:fallback",
            "Planned reuses that were given up, by cause.",
            "cause",
            _by_prefix(seen, "fallback_"),
        )
        yield self._labelled(
            "kvshare:media",
            "Pictures and clips by what was done for them.",
            "source",
            _by_prefix(seen, "media_"),
        )
        yield self._counter("kvshare:queue_full", "Requests refused.", seen.get("queue_full", 0))
        yield self._counter(
            "kvshare:failed", "Requests that the model failed.", seen.get("failed", 0)
        )
        if "audits" in stats:
            yield from self._audits(stats["audits"])
        donors = stats.get("donors")
        if donors is not None:
            yield from self._donors(donors)

    def _audits(self, audits: dict[str, Any]) -> Iterator[Metric]:
        results = {name: audits["results"].get(name, 0) for name in ("kept", "missed", "fact")}
        yield self._labelled(
            "kvshare:audits",
            "Requests computed in full afterwards, by what was found, or why nothing was.",
            "result",
            {**results, **{k: v for k, v in audits["results"].items() if k != "yielded"}},
        )
        coverage = GaugeMetricFamily(
            "kvshare:audit_coverage",
            "Share of audited requests within their max_divergence; 0.95 is promised.",
            labels=["model_name"],
        )
        if judged := sum(results.values()):
            coverage.add_metric([self._model], results["kept"] / judged)
        yield coverage
        found = audits["divergence"]
        counts = list(itertools.accumulate(found["counts"]))
        names = [*map(str, found["bounds"]), "+Inf"]
        histogram = HistogramMetricFamily(
            "kvshare:divergence",
            "KL from full recompute (nats) of audited requests: the larger of the first token's "
            "and the mean along the answer.",
            labels=["model_name"],
        )
        buckets = list(zip(names, counts, strict=True))
        histogram.add_metric([self._model], buckets, found["sum"])
        yield histogram

    def _donors(self, donors: dict[str, Any]) -> Iterator[Metric]:
        yield self._gauge("kvshare:donors", "Stored requests.", donors["nodes"])
        yield self._gauge("kvshare:tree_depth", "Ancestors of the deepest one.", self._depth())
        tokens = GaugeMetricFamily(
            "kvshare:donor_tokens",
            "Tokens held, and if each request were stored whole.",
            labels=["model_name", "stored"],
        )
        tokens.add_metric([self._model, "held"], donors["tokens_owned"])
        tokens.add_metric([self._model, "whole"], donors["tokens_whole"])
        yield tokens
        size = GaugeMetricFamily(
            "kvshare:store_bytes", "KV by tier.", labels=["model_name", "tier"]
        )
        for tier, num_bytes in donors["bytes"].items():
            size.add_metric([self._model, tier], num_bytes)
        yield size
        yield self._labelled(
            "kvshare:donor_events", "What happened to donors.", "event", donors["events"]
        )

    def _gauge(self, name: str, about: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, about, labels=["model_name"])
        family.add_metric([self._model], value)
        return family

    def _counter(self, name: str, about: str, value: float) -> Metric:
        family = CounterMetricFamily(name, about, labels=["model_name"])
        family.add_metric([self._model], value)
        return family

    def _labelled(self, name: str, about: str, label: str, values: dict[str, int]) -> Metric:
        family = CounterMetricFamily(name, about, labels=["model_name", label])
        for value, count in sorted(values.items()):
            family.add_metric([self._model, value], count)
        return family


def _by_prefix(counters: dict[str, int], prefix: str) -> dict[str, int]:
    return {k.removeprefix(prefix): v for k, v in counters.items() if k.startswith(prefix)}
