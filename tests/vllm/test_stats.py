"""Counters of KVShare beside vLLM's."""

from __future__ import annotations

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
        made.observe({"load_microseconds": count * 1e6})
        assert REGISTRY.get_sample_value("kvshare:load_seconds_total", {"engine": "0"}) == count
