"""A prefill takes from similar requests what it can, and computes the rest."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch

from kvshare_mm.native.prefill import Prefiller, provenance
from kvshare_mm.reuse.plan import Decline, Tolerance
from kvshare_mm.reuse.repair import RepairPolicy, make_policy

from .donor_server import ATOL, NO_REPAIR, NS, OPTIONS, Server, _edited, _ids


def test_the_first_request_is_computed_and_becomes_a_donor(server: Server) -> None:
    ids = _ids(60, 0)
    result, node_id = server.serve(ids)
    server.assert_full(ids, result)
    assert result.plan.declined == Decline.NO_DONOR
    assert result.fallback is None
    assert server.pool.counters["saved"] == 1
    node = server.pool.tree[node_id]
    assert node.num_owned == 60 and node.exact_len == 60
    stored = server.pool.store.get(node_id, NS)
    assert torch.equal(stored.kv.k, server.served[node_id][0])
    assert torch.equal(stored.kv.v, server.served[node_id][1])


def test_a_similar_request_is_served_from_it(server: Server) -> None:
    ids = _ids(60, 0)
    _, donor = server.serve(ids)
    target = np.concatenate((ids[:20], _ids(3, 9), ids[22:]))  # one token more: 38 move by one
    result, _ = server.serve(target)
    told = provenance(result)
    assert (told.exact, told.reused, told.recomputed) == (20, 37, 4)
    assert told.donors == (donor,)
    assert told.declined is None and told.fallback is None
    assert [(s.start, s.end, s.kind) for s in told.spans] == [
        (0, 20, "exact"),
        (20, 23, "recomputed"),
        (23, 60, "reused"),
        (60, 61, "recomputed"),
    ]
    assert told.similarity == pytest.approx(57 / 61)


def test_repairs_are_computed_and_told(server: Server) -> None:
    ids = _ids(60, 0)
    server.serve(ids)
    result = server.prefill(_edited(ids, 20, 40), policy=make_policy("window:5"))
    assert result.plan.repair.tolist() == [*range(21, 26), *range(41, 46)]
    assert provenance(result).recomputed == 13


def test_choosing_repairs_is_part_of_planning(server: Server) -> None:
    class Slow:
        tolerance = Tolerance()

        def positions(self, *asked: Any) -> np.ndarray:
            time.sleep(0.5)
            return make_policy("window:5").positions(*asked)

    ids = _ids(60, 0)
    server.serve(ids)
    result = server.prefill(_edited(ids, 20), policy=Slow())
    assert result.compute < 0.5 <= result.planning


def test_repairing_everything_gives_the_full_prefill(server: Server) -> None:
    ids = _ids(60, 0)
    server.serve(ids)
    target = _edited(ids, 20, 40)
    result = server.prefill(target, policy=make_policy("window:100"))
    assert result.plan.declined == Decline.DIVERGENCE
    assert (result.plan.num_exact, result.plan.num_computed) == (20, 40)
    assert torch.allclose(result.logits, server.tiny.full(target).logits[-1], atol=ATOL)


def test_the_first_edit_of_an_early_token_is_exact_again_behind_it(server: Server) -> None:
    """With position 0 changed nothing is an exact prefix, and nothing says that it is."""
    ids = _ids(60, 0)
    server.serve(ids)
    told = provenance(server.prefill(_edited(ids, 0)))
    assert told.exact == 0 and told.reused == 58


@pytest.mark.parametrize("spec", ["none", "window:3", "tail:9", "auto:0.5", "auto:2"])
def test_every_policy_fills_the_slot(server: Server, spec: str) -> None:
    ids = _ids(70, 0)
    server.serve(ids)
    target = np.concatenate((_ids(3, 5), ids[:30], _ids(4, 6), ids[33:]))
    result = server.prefill(target, policy=make_policy(spec))
    assert result.plan.num_reused > 0


@pytest.mark.parametrize(("spec", "reads"), [("auto:0", 0), ("none", 1), ("window:2", 1)])
def test_donors_are_read_once_and_not_for_a_plan_that_is_given_up(
    server: Server, monkeypatch: pytest.MonkeyPatch, spec: str, reads: int
) -> None:
    ids = _ids(60, 0)
    server.serve(ids)
    edit, calls = server.pool.worker._editor.edit, []
    monkeypatch.setattr(
        server.pool.worker._editor, "edit", lambda *a: (calls.append(a), edit(*a))[1]
    )
    target = np.concatenate((_ids(3, 5), ids))
    result = server.prefill(target, policy=make_policy(spec))
    assert len(calls) == reads
    assert (result.plan.num_reused > 0) == (reads > 0)


def test_default_policy_is_used_unless_the_request_has_one(tiny_llama: Any) -> None:
    class Recorded:
        calls = 0
        tolerance = Tolerance()

        def positions(self, plan: Any) -> np.ndarray:
            Recorded.calls += 1
            return np.empty(0, np.int64)

    server = Server(tiny_llama)
    policy: RepairPolicy = Recorded()
    server.prefiller = Prefiller(server.runner, server.pool, OPTIONS, policy)
    ids = _ids(60, 0)
    server.serve(ids)
    assert Recorded.calls == 0  # nothing was reused
    server.prefill(_edited(ids, 30))
    assert Recorded.calls == 1
    server.prefill(_edited(ids, 30), policy=NO_REPAIR)
    assert Recorded.calls == 1


def test_chunked_prefill_with_reuse(tiny_llama: Any) -> None:
    ids = _ids(100, 0)
    target = np.concatenate((ids[:10], _ids(30, 3), ids[20:]))
    logits = []
    for chunk in (7, 4096):
        server = Server(tiny_llama, chunk=chunk)
        server.serve(ids)
        result = server.prefill(target, policy=make_policy("window:4"))
        assert result.plan.num_reused > 40
        logits.append(result.logits)
    assert torch.allclose(*logits, atol=ATOL)
