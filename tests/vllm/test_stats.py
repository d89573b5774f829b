"""Counters of KVShare beside vLLM's."""

from __future__ import annotations

from collections import Counter as PythonCounter
from types import SimpleNamespace

import pytest
from prometheus_client import REGISTRY, Counter, Gauge, Histogram

pytestmark = pytest.mark.vllm


def test_a_second_engine_of_a_process_counts_anew() -> None:
    from kvshare_mm.vllm.stats import KVShareProm

    config = SimpleNamespace(kv_transfer_config=object())
    kinds = {Counter: Counter, Gauge: Gauge, Histogram: Histogram}
    for count in (3, 5):
        made = KVShareProm(config, kinds, ["engine"], {0: ["0"]})
        made.observe({"load_seconds": [0.5] * count, "saved": count})
        assert REGISTRY.get_sample_value("kvshare:load_seconds_count", {"engine": "0"}) == count
        named = {"engine": "0", "event": "saved"}
        assert REGISTRY.get_sample_value("kvshare:donor_events_total", named) == count


def test_stats_of_several_steps_are_one() -> None:
    from kvshare_mm.vllm.stats import drained

    times = {"lookup_seconds": [0.5]}
    first = drained(PythonCounter(saved=2), times)
    second = drained(PythonCounter(saved=1, forgotten=1), {"lookup_seconds": [1.5]})
    assert first is not None and second is not None and not times
    both = first.aggregate(second)
    assert both.data == {"saved": 3, "forgotten": 1, "lookup_seconds": [0.5, 1.5]}
    assert both.reduce() == {"saved": 3, "forgotten": 1, "lookup_seconds": 1.0}
    assert drained(PythonCounter(), {}) is None
