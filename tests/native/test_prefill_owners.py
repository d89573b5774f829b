"""Donors that go while others borrow from them, and requests that cannot become donors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from kvshare_mm.reuse.plan import Decline
from kvshare_mm.reuse.repair import make_policy

from .donor_server import ATOL, Server, _edited, _ids


def test_children_of_a_dropped_owner_keep_what_they_own(server: Server) -> None:
    a = _ids(60, 0)
    _, node_a = server.serve(a)
    b = _edited(a, 0, 30)
    _, node_b = server.serve(b)
    server.pool.delete(node_a)
    assert node_b in server.pool.tree
    for asked in (b, _edited(b, 50), a):
        result = server.prefill(asked)
        assert result.plan.num_reused + result.plan.num_exact <= 2, result.plan
        if not result.plan.num_reused:
            assert torch.allclose(result.logits, server.tiny.full(asked).logits[-1], atol=ATOL)


def test_what_was_repaired_is_owned(server: Server) -> None:
    """A repaired position is stored as computed, not as the donor's KV that was not trusted."""
    a = _ids(60, 0)
    server.serve(a)
    b = _edited(a, 20)
    first, node_b = server.serve(b, policy=make_policy("window:6"))
    assert len(first.plan.repair) == 6
    assert server.pool.tree[node_b].num_owned == 8  # the edit, the repairs, the last position
    again = server.prefill(b)
    assert again.plan.compute.tolist() == [59]
    assert torch.allclose(again.logits, first.logits, atol=ATOL)


def test_a_donor_dropped_before_the_save(server: Server) -> None:
    """The slot holds all KV by then: the new node owns what it can no longer borrow."""
    a = _ids(60, 0)
    _, node_a = server.serve(a)
    b = _edited(a, 30)
    result = server.prefill(b)
    assert result.plan.num_reused > 0
    server.pool.delete(node_a)
    node_b = server.save(b, result)
    assert node_b is not None
    assert server.pool.tree[node_b].num_owned == 60
    assert server.pool.tree[node_b].exact_len == 31
    again = server.prefill(b)
    assert again.plan.compute.tolist() == [59]
    assert torch.allclose(again.logits, result.logits, atol=ATOL)


def test_a_new_node_that_pushes_its_own_owner_out(tiny_llama: Any) -> None:
    a = _ids(60, 0)
    probe = Server(tiny_llama)
    _, node_a = probe.serve(a)
    size = probe.pool.store.bytes_by_tier()["host"]
    server = Server(tiny_llama, host_bytes=int(size * 1.2))
    _, node_a = server.serve(a)
    b = np.concatenate((a[:30], _ids(40, 5)))
    _, node_b = server.serve(b)
    assert node_a not in server.pool.tree
    assert node_b in server.pool.tree
    # Where A was there is a hole; behind it B has what it computed itself.
    result = server.prefill(b)
    assert (result.plan.num_exact, result.plan.num_reused) == (0, 39)
    server.assert_full(b, server.prefill(b, reuse="exact"))


def test_a_request_too_large_for_the_store(tiny_llama: Any) -> None:
    server = Server(tiny_llama, host_bytes=1000)
    ids = _ids(60, 0)
    assert server.save(ids, server.prefill(ids)) is None
    assert server.pool.counters["save_too_large"] == 1
    assert len(server.pool.tree) == 0
    assert server.prefill(ids).plan.declined == Decline.NO_DONOR


def test_short_requests_are_not_stored(server: Server) -> None:
    ids = _ids(15, 0)
    assert server.save(ids, server.prefill(ids)) is None
    assert len(server.pool.tree) == 0
