"""A node whose KV was computed in full takes the place of what was approximate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kvshare_mm.errors import KVUnavailableError, NotFiniteError
from kvshare_mm.node import Node, Piece
from kvshare_mm.reuse.editor import KVEditor
from kvshare_mm.reuse.rotary import RotarySpec
from kvshare_mm.reuse.tree import healed
from kvshare_mm.reuse.worker import ReuseWorker
from kvshare_mm.store.base import StoredNode
from kvshare_mm.store.disk import DiskTier
from kvshare_mm.store.host import HostTier, ram_bytes
from kvshare_mm.store.tiered import TieredStore

from .conftest import BUDGET, MakeStored

N = 12


def approximate(make_stored: MakeStored) -> StoredNode:
    """Exact as far as 4; what it owns itself of the rest was computed behind what it borrows."""
    pieces = (Piece("a", 0, 0, 2), Piece("a", 2, 2, 6), Piece("gone", 0, 10, 1))
    embedding = np.ones(3, np.float32)
    return make_stored(
        "b", N, own=((8, 10), (11, 12)), pieces=pieces, exact_len=4, embedding=embedding
    )


def slot() -> torch.Tensor:
    return torch.arange(2 * 1 * 16 * 4, dtype=torch.float32).reshape(2, 1, 16, 4)


def worker_of(host_bytes: int, folder: Path | None = None) -> tuple[ReuseWorker, list[str]]:
    gone: list[str] = []
    disk = DiskTier(folder, BUDGET) if folder else None
    store = TieredStore(HostTier(host_bytes), disk, gone.append)
    return ReuseWorker(store, KVEditor(RotarySpec(torch.ones(1, 2)))), gone


def test_what_is_exact_may_stay_borrowed(make_stored: MakeStored) -> None:
    node = replace(approximate(make_stored).node, drift=np.ones(N, np.float32), risk=0.5)
    exact = healed(node, {"a", "b"}, None)
    assert exact.pieces == (Piece("a", 0, 0, 2), Piece("a", 2, 2, 2))
    assert exact.own == ((4, N),)
    assert (exact.exact_len, exact.drift, exact.risk) == (N, None, 0)
    assert exact.attention is node.attention
    # What its owner took with it is its own again.
    assert healed(node, set(), None).own == ((0, N),)
    seen = np.full(5, 0.2, np.float32)
    assert healed(node, set(), seen).attention == pytest.approx(seen, rel=1e-3)


def test_it_is_stored_in_place_and_found_after_a_restart(
    make_stored: MakeStored, tmp_path: Path
) -> None:
    worker, gone = worker_of(BUDGET, tmp_path)
    before = approximate(make_stored)
    worker.store.put(before)
    exact = healed(before.node, {"a"}, None)
    assert worker.replace(exact, slot(), -slot())
    assert worker.store.flush()
    worker.store.close()
    again, _ = worker_of(BUDGET, tmp_path)
    found = again.store.get("b", "ns")
    assert found.node.own == exact.own and found.node.exact_len == N
    assert torch.equal(found.kv.k, slot()[:, :, 4:N])
    assert torch.equal(found.kv.v, -slot()[:, :, 4:N])
    assert np.array_equal(found.embedding, before.embedding)
    assert again.store.ids() == ["b"] and not gone


def test_it_keeps_to_the_budget(make_stored: MakeStored) -> None:
    before = approximate(make_stored)
    worker, gone = worker_of(ram_bytes(before) + 64)
    worker.store.put(before)
    exact = healed(before.node, {"a"}, None)
    assert not worker.replace(exact, slot(), slot())
    assert gone == ["b"]
    assert worker.store.bytes_by_tier() == {"host": 0}
    with pytest.raises(KVUnavailableError):
        worker.replace(exact, slot(), slot())


def test_what_is_no_number_leaves_it_as_it_was(make_stored: MakeStored) -> None:
    worker, _ = worker_of(BUDGET)
    before = approximate(make_stored)
    worker.store.put(before)
    exact: Node = healed(before.node, {"a"}, None)
    with pytest.raises(NotFiniteError):
        worker.replace(exact, slot() * float("nan"), slot())
    assert worker.store.get("b", "ns") is before
