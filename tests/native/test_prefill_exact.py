"""What is called exact is, through repeats, edits of edits and next turns."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from .donor_server import ATOL, OTHER_NS, Server, _edited, _ids


def test_repeat_of_an_exact_request_computes_one_position(server: Server) -> None:
    ids = _ids(60, 0)
    server.serve(ids)
    result = server.prefill(ids)
    assert result.plan.num_exact == 59
    assert result.plan.compute.tolist() == [59]
    assert torch.allclose(result.logits, server.tiny.full(ids).logits[-1], atol=ATOL)


def test_repeat_of_an_approximate_request_gets_the_same_answer(server: Server) -> None:
    ids = _ids(60, 0)
    server.serve(ids)
    target = _edited(ids, 3, 30)
    first, _ = server.serve(target)
    assert first.plan.num_reused > 0
    again = server.prefill(target)
    assert again.plan.compute.tolist() == [59]
    assert again.plan.num_exact == 4  # what was approximate is not called exact now
    assert torch.allclose(again.logits, first.logits, atol=ATOL)


@pytest.mark.parametrize("cut", [0, 10])
def test_save_of_a_known_request_adds_nothing(server: Server, cut: int) -> None:
    ids = _ids(60, 0)
    server.serve(ids)
    before = server.pool.store.bytes_by_tier()
    known = ids[: len(ids) - cut]
    assert server.save(known, server.prefill(known)) is None
    assert len(server.pool.tree) == 1
    assert server.pool.counters["save_known"] == 1
    assert server.pool.store.bytes_by_tier() == before


def test_a_known_request_of_another_tenant_is_not_known(server: Server) -> None:
    ids = _ids(60, 0)
    server.serve(ids)
    result, _ = server.serve(ids, OTHER_NS)
    server.assert_full(ids, result)
    assert len(server.pool.tree) == 2


def test_an_approximate_repeat_is_replaced_once_it_was_computed(server: Server) -> None:
    """The twin of a request must hold it exactly, or the better copy would be thrown away."""
    ids = _ids(60, 0)
    server.serve(ids)
    target = _edited(ids, 3, 30)
    server.serve(target)
    exact = server.prefill(target, reuse="off")
    assert server.save(target, exact) is not None
    assert server.prefill(target).plan.num_exact == 59


def test_answers_become_prefix_of_the_next_turn(server: Server) -> None:
    ids = _ids(50, 0)
    result = server.prefill(ids)
    tokens = [int(result.logits.argmax())]
    for _ in range(9):
        logits = server.runner.decode([1], [tokens[-1]], [49 + len(tokens)])
        tokens.append(int(logits[0].argmax()))
    turn = np.concatenate((ids, tokens[:-1]))
    assert server.save(turn, result) is not None
    longer = np.concatenate((ids, tokens, _ids(10, 4)))
    assert server.prefill(longer).plan.num_exact == 59


def test_the_answer_of_an_approximate_request_is_not_exact(server: Server) -> None:
    ids = _ids(50, 0)
    server.serve(ids)
    target = _edited(ids, 10)
    result = server.prefill(target)
    tokens = [int(result.logits.argmax())]
    for _ in range(9):
        logits = server.runner.decode([1], [tokens[-1]], [49 + len(tokens)])
        tokens.append(int(logits[0].argmax()))
    turn = np.concatenate((target, tokens[:-1]))
    node_id = server.save(turn, result)
    assert node_id is not None and server.pool.tree[node_id].exact_len == 11
    longer = np.concatenate((target, tokens, _ids(10, 4)))
    plan = server.prefill(longer).plan
    assert plan.num_exact == 11 and plan.num_reused == 48


def test_approximate_positions_are_no_material_for_others(server: Server) -> None:
    """B computed `own` behind approximate KV; C has only that in common with anybody."""
    a, own = _ids(60, 0), _ids(24, 8)
    server.serve(a)
    result, b = server.serve(np.concatenate((_ids(4, 7), a[:30], own)))
    assert result.plan.num_reused == 30
    c = np.concatenate((_ids(5, 20), own, _ids(4, 21)))
    plan = server.prefill(c).plan
    assert plan.num_computed == len(c), plan
    # Nor under its own id, brought in from outside.
    assert server.prefill(c, similar=(b,)).plan.num_computed == len(c)


def test_borrowed_exact_positions_are_material(server: Server) -> None:
    """What B borrowed from A is as good for C as A's own: it is A's own."""
    a = _ids(60, 0)
    _, node_a = server.serve(a)
    b = _edited(a, 10)
    server.serve(b)
    plan = server.prefill(_edited(b, 0, 40)).plan
    assert plan.num_reused > 40
    pieces = server.pool.reuse.catalogue.pieces(plan)
    assert sum(p.length for p in pieces if p.owner != node_a) == 1  # B's own token, exact too
