"""What a router counts, in Prometheus' format."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from kvshare_mm.apps.router.memory import Memory
from kvshare_mm.apps.router.replicas import Replica

_SECONDS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)


class _Standing(Collector):
    """Of the replicas that are there when it is asked."""

    def __init__(self, replicas: Sequence[Replica]) -> None:
        self._replicas = replicas

    def collect(self) -> Iterator[GaugeMetricFamily]:
        up = GaugeMetricFamily(
            "kvshare_router_up",
            "1: it answers, and has not just failed several requests in a row.",
            labels=["replica"],
        )
        flying = GaugeMetricFamily(
            "kvshare_router_in_flight", "Requests there.", labels=["replica"]
        )
        for replica in self._replicas:
            up.add_metric([str(replica.number)], replica.healthy and not replica.rests)
            flying.add_metric([str(replica.number)], replica.in_flight)
        yield from (up, flying)


class RouterMetrics:
    """Metrics in a registry of their own. Replicas are named by number."""

    def __init__(self, replicas: Sequence[Replica], memory: Memory) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "kvshare_router_requests",
            "Requests sent to replicas. donor: who has most of it; moved: its donor's replica had"
            " too much to do; load: nobody had anything alike; retry: after another gave none.",
            ["replica", "reason"],
            registry=self.registry,
        )
        self.decisions = Histogram(
            "kvshare_router_decision_seconds",
            "Reading a prompt and choosing a replica for it.",
            registry=self.registry,
            buckets=_SECONDS,
        )
        self.lost = Counter(
            "kvshare_router_lost",
            "Replicas that went away over a request; begun: some of the answer had been sent.",
            ["replica", "begun"],
            registry=self.registry,
        )
        self.registry.register(_Standing(replicas))
        known = Gauge(
            "kvshare_router_requests_known",
            "Earlier requests that are known.",
            registry=self.registry,
        )
        known.set_function(memory.__len__)
        taken = Gauge("kvshare_router_known_bytes", "Bytes they take.", registry=self.registry)
        taken.set_function(lambda: memory.num_bytes)
