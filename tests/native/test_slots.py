"""What slots take before anything is in them."""

from __future__ import annotations

from typing import Any

import psutil

from kvshare_mm.native.slots import SlotRunner


def test_slots_take_memory_once_they_are_written(tiny: Any) -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    cache = SlotRunner(tiny.loaded, 16, 2**17, 64)._cache
    size = cache.k.nbytes + cache.v.nbytes
    assert size >= 2**30
    assert process.memory_info().rss - before < size / 8
    for kept in (cache.k, cache.v):
        assert kept.data_ptr() % 64 == 0
        assert not kept[-1, -1, :, -64:].any()
