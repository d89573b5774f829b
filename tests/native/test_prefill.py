"""Prefill with donors: any history of requests, and what is the native engine's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvshare_mm.reuse.repair import make_policy
from kvshare_mm.reuse.scheduler import namespace

from ..collisions import twin_texts
from .donor_server import (
    ATOL,
    MAX_LEN,
    NS,
    OTHER_NS,
    Server,
    _edited,
    _evict,
    _ids,
)

# -- any history ----------------------------------------------------------------------------------


def _variant(draw: Callable[..., Any], ids: np.ndarray) -> np.ndarray:
    """A random edit: tokens replaced, put in, left out, blocks moved, ends cut."""
    kind = draw(st.sampled_from(["replace", "insert", "delete", "move", "cut", "grow", "same"]))
    at = draw(st.integers(0, len(ids) - 1))
    n = draw(st.integers(1, 8))
    fresh = _ids(n, draw(st.integers(100, 110)))
    if kind == "replace":
        ids = np.concatenate((ids[:at], fresh, ids[at + n :]))
    elif kind == "insert":
        ids = np.concatenate((ids[:at], fresh, ids[at:]))
    elif kind == "delete":
        ids = np.concatenate((ids[:at], ids[at + n :]))
    elif kind == "move":
        ids = np.concatenate((ids[at:], ids[:at]))
    elif kind == "cut":
        ids = ids[: max(20, at)]
    elif kind == "grow":
        ids = np.concatenate((ids, fresh))
    return ids[:MAX_LEN] if len(ids) >= 20 else _ids(20, 99)


@settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_history_of_requests(tiny_llama: Any, data: st.DataObject) -> None:
    """Requests that are edits of one another, in two namespaces, with donors lost on the way.

    `Server.prefill` checks every answer against full prefills and against what donors held.
    """
    server = Server(tiny_llama, chunk=data.draw(st.sampled_from([16, 4096])))

    def lose_some() -> None:
        known = tuple(server.served)
        if known and data.draw(st.integers(0, 3)) == 0:
            lost = data.draw(st.sampled_from(known))
            if data.draw(st.booleans()):
                server.pool.delete(lost)
            else:
                _evict(server, lost)

    seen = [_ids(40, 0), _ids(55, 1)]
    for _ in range(data.draw(st.integers(3, 9))):
        ids = _variant(data.draw, seen[data.draw(st.integers(0, len(seen) - 1))])
        seen.append(ids)
        ns = data.draw(st.sampled_from([NS, NS, NS, OTHER_NS]))
        reuse = data.draw(st.sampled_from(["similar", "similar", "similar", "exact", "off"]))
        spec = data.draw(st.sampled_from(["none", "window:2", "tail:3", "auto"]))
        known = tuple(server.served)
        result = server.prefill(ids, ns, reuse=reuse, policy=make_policy(spec), similar=known[-2:])
        if reuse != "similar":
            assert torch.allclose(result.logits, tiny_llama.full(ids).logits[-1], atol=ATOL)
        # While a request is answered, and afterwards, donors go.
        lose_some()
        if data.draw(st.booleans()):
            answer = _ids(data.draw(st.integers(0, 3)), 200)[: MAX_LEN - len(ids)]
            server.save(server.answered(ids, answer), result, ns)
        lose_some()
    server.pool.close()


# -- donors ---------------------------------------------------------------------------------------


def test_donors_found_by_meaning_are_looked_at_as_others_are(server: Server) -> None:
    """Not across namespaces, not by those who want exact prefixes, and only for what is exact."""
    ids, own = _ids(60, 0), _ids(24, 8)
    _, theirs = server.serve(ids)
    mine = _ids(60, 1)
    server.serve(mine, OTHER_NS)
    for asked in (ids, _edited(ids, 30), np.concatenate((mine[:20], ids))):
        result = server.prefill(asked, OTHER_NS, similar=(theirs, "made up", theirs))
        assert theirs not in result.plan.donors
        assert result.fallback is None, "not even planned with"
        assert result.plan.num_reused + result.plan.num_exact <= 20
    moved = np.concatenate((_ids(5, 3), ids))
    server.assert_full(moved, server.prefill(moved, reuse="exact", similar=(theirs,)))
    result, approximate = server.serve(np.concatenate((_ids(4, 7), ids[:30], own)))
    assert result.plan.num_reused == 30
    alike = np.concatenate((_ids(5, 20), own, _ids(4, 21)))
    server.assert_full(alike, server.prefill(alike, similar=(approximate,)))


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


def test_namespaces_differ_by_model_and_salt() -> None:
    names = {namespace(f, s) for f in ("a", "b", "a-b") for s in ("", "x", "b-x")}
    assert len(names) == 9
    # A tenant chooses its salt, and could choose one that an unseeded hash takes for another.
    one, other = twin_texts()
    assert xxhash.xxh3_128_digest(one.encode()) == xxhash.xxh3_128_digest(other.encode())
    assert namespace("model", one) != namespace("model", other)
    assert namespace("model", "\udc80") != namespace("model", "\udc81")  # JSON can spell them


# -- repairs, runners -----------------------------------------------------------------------------


@pytest.mark.parametrize(("spec", "reads"), [("auto:0", 0), ("none", 1), ("window:2", 1)])
def test_donors_are_read_once_and_not_for_a_plan_that_is_given_up(
    server: Server, monkeypatch: pytest.MonkeyPatch, spec: str, reads: int
) -> None:
    ids = _ids(60, 0)
    server.serve(ids)
    get, calls = server.pool.store.get, []
    monkeypatch.setattr(server.pool.store, "get", lambda *a: (calls.append(a), get(*a))[1])
    target = np.concatenate((_ids(3, 5), ids[:30], _ids(4, 6), ids[30:]))
    result = server.prefill(target, policy=make_policy(spec))
    assert len(calls) == reads
    assert (result.plan.num_reused > 0) == (reads > 0)
