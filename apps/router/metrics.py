"""What a router counts, in Prometheus' format."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from kvshare_mm.apps.router.memory import Memory
from kvshare_mm.apps.router.replicas import Replica

_SECONDS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)


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
        up = Gauge("kvshare_router_up", "1: it answers.", ["replica"], registry=self.registry)
        flying = Gauge(
            "kvshare_router_in_flight", "Requests there.", ["replica"], registry=self.registry
        )
        for replica in replicas:
            name = str(replica.number)
            up.labels(name).set_function(partial(getattr, replica, "healthy"))
            flying.labels(name).set_function(partial(getattr, replica, "in_flight"))
        known = Gauge(
            "kvshare_router_requests_known",
            "Earlier requests that are known.",
            registry=self.registry,
        )
        known.set_function(memory.__len__)
        taken = Gauge("kvshare_router_known_bytes", "Bytes they take.", registry=self.registry)
        taken.set_function(lambda: memory.num_bytes)
