"""A cache that fails in a prefill is a miss: full recompute, with the reason told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvshare_mm.native.prefill import provenance
from kvshare_mm.reuse.plan import Decline
from kvshare_mm.store.disk import DiskTier

from .donor_server import Server, _edited, _evict, _ids


def test_an_evicted_donor_is_a_fallback(server: Server) -> None:
    ids = _ids(60, 0)
    _, donor = server.serve(ids)
    _evict(server, donor)
    target = _edited(ids, 30)
    result = server.prefill(target)
    assert result.fallback == "evicted"
    server.assert_full(target, result)
    told = provenance(result)
    assert (told.exact, told.reused, told.donors) == (0, 0, ())
    assert server.pool.store.counters["read_evicted"] == 1
    # Nobody looks for it again.
    again = server.prefill(target)
    assert again.fallback is None and again.plan.declined == Decline.NO_DONOR
    assert server.pool.counters["forgotten"] == 1


def test_one_evicted_donor_of_two_leaves_no_trace_of_the_other(server: Server) -> None:
    a, b = _ids(50, 0), _ids(50, 1)
    _, node_a = server.serve(a)
    _, node_b = server.serve(b)
    target = np.concatenate((_ids(3, 2), a[:40], b[5:45], _ids(2, 3)))
    assert set(server.prefill(target).plan.donors) == {node_a, node_b}
    _evict(server, node_b)
    result = server.prefill(target)
    assert result.fallback is None
    assert server.pool.store.counters["read_evicted"] == 1
    without = server.prefill(target)
    assert result.plan.donors == without.plan.donors == (node_a,)
    assert np.array_equal(result.plan.compute, without.plan.compute)
    torch.testing.assert_close(result.logits, without.logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_donor_on_disk_is_a_fallback(
    tiny_llama: Any, tmp_path: Path, damage: str
) -> None:
    # RAM that holds nothing: every read comes from disk.
    server = Server(tiny_llama, DiskTier(tmp_path, 1 << 30), host_bytes=0)
    ids = _ids(60, 0)
    server.serve(ids)
    assert server.pool.flush(10)
    target = _edited(ids, 30)
    assert server.prefill(target).plan.num_reused > 0
    (path,) = tmp_path.glob("*.kvnode")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    if damage == "flip":
        path.write_bytes(content)
    elif damage == "truncate":
        path.write_bytes(content[:-1000])
    else:
        path.unlink()
    result = server.prefill(target)
    assert result.fallback == ("evicted" if damage == "remove" else "corrupt")
    server.assert_full(target, result)
    again = server.prefill(target)
    assert again.fallback is None and again.plan.declined == Decline.NO_DONOR
    server.pool.close()


def test_a_donor_dropped_after_it_was_planned(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = _ids(60, 0)
    _, donor = server.serve(ids)
    find = server.pool.reuse.find

    def find_and_lose(*args: Any) -> Any:
        found = find(*args)
        server.pool.delete(donor)
        return found

    monkeypatch.setattr(server.pool.reuse, "find", find_and_lose)
    target = _edited(ids, 30)
    result = server.prefill(target)
    assert result.fallback == "evicted"
    server.assert_full(target, result)


def test_a_lookup_that_fails_is_a_miss(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = _ids(60, 0)
    server.serve(ids)

    def fail(*_: Any) -> Any:
        raise RuntimeError("index on fire")

    monkeypatch.setattr(server.pool.reuse.catalogue._lexical, "search", fail)
    result = server.prefill(_edited(ids, 30))
    server.assert_full(_edited(ids, 30), result)
    assert result.fallback == "lookup_error"
    assert server.pool.counters["lookup_error"] == 1


def test_an_edit_that_fails_otherwise_is_a_miss(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Say, a shared store that holds another version of the node than the tree knows."""
    ids = _ids(60, 0)
    server.serve(ids)

    def fail(*_: Any) -> Any:
        raise ValueError("does not own")

    monkeypatch.setattr(server.pool.worker._editor, "edit", fail)
    target = _edited(ids, 30)
    result = server.prefill(target)
    assert result.fallback == "edit_error"
    server.assert_full(target, result)
