"""What a request does with donors, whichever engine serves it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvshare_mm import RequestOutput
from kvshare_mm.errors import KVUnavailableError

from .engines import Engine, nodes, reason, told

Check = Callable[[RequestOutput], None]
Ids = list[int]


def ids(length: int, seed: int = 0) -> Ids:
    return np.random.default_rng(seed).integers(3, 250, length).tolist()


DONOR, NEW = ids(200), ids(5, 9)
N = len(DONOR)
EDITED = [*DONOR[:60], *NEW, *DONOR[60:]]
# A random model looks everywhere alike: the default would repair most of what is kept.
LOOSE = {"repair": "none", "store": False}


# -- what is exact, reused, computed --------------------------------------------------------------


def test_the_first_request_is_computed_and_becomes_a_donor(engine: Engine, in_full: Check) -> None:
    output = engine.ask(DONOR)
    in_full(output)
    assert told(output) == (0, 0, N)
    assert reason(output) == "no_donor"
    (node,) = nodes(engine)
    # The KV of an answer's last token is not computed any more.
    assert node.align_keys.tolist() == [*DONOR, *output.token_ids[:-1]]
    assert node.num_owned == node.exact_len == N + 3
    assert node.attention is not None and node.attention.sum() == pytest.approx(1, abs=1e-3)


EDITS: dict[str, tuple[Ids, tuple[int, int, int]]] = {
    "insert": (EDITED, (60, 139, 6)),
    "delete": ([*DONOR[:60], *DONOR[70:]], (60, 129, 1)),
    "replace": ([*DONOR[:60], *NEW, *DONOR[65:]], (60, 134, 6)),
    "replace the first": ([NEW[0], *DONOR[1:]], (0, 198, 2)),
    "two edits": ([*DONOR[:60], *NEW, *DONOR[65:120], *NEW, *DONOR[120:]], (60, 134, 11)),
    "put in front": ([*NEW, *DONOR], (0, 199, 6)),
    "move": ([*DONOR[:20], *DONOR[100:150], *DONOR[20:100], *DONOR[150:]], (20, 179, 1)),
    "the same": (DONOR, (N - 1, 0, 1)),
    "a part": (DONOR[:150], (149, 0, 1)),
    "more": ([*DONOR, *NEW], (N, 0, 5)),
}


@pytest.mark.parametrize("kind", EDITS)
def test_an_edited_request_computes_its_edits(engine: Engine, in_full: Check, kind: str) -> None:
    target, want = EDITS[kind]
    engine.ask(DONOR)
    (donor,) = nodes(engine)
    output = engine.ask(target, **LOOSE)
    assert told(output) == want
    assert output.provenance.donors == (donor.node_id,)
    assert output.provenance.similarity == pytest.approx(sum(want[:2]) / len(target))
    assert reason(output) is None
    if not want[1]:
        in_full(output)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"reuse": "off"}, "reuse_off"),
        ({"reuse": "exact"}, "exact_only"),
        ({"max_divergence": 0}, "divergence"),
        ({"repair": "window:100000"}, "divergence"),
    ],
    ids=str,
)
def test_who_wants_nothing_approximate_gets_full_recomputes_answer(
    engine: Engine, in_full: Check, options: dict[str, Any], why: str
) -> None:
    engine.ask(DONOR)
    output = engine.ask(EDITED, 8, store=False, **options)
    assert told(output) == ((0, 0, N + 5) if why == "reuse_off" else (60, 0, N - 55))
    assert reason(output) == why
    in_full(output)


def test_repairs_are_computed(engine: Engine) -> None:
    engine.ask(DONOR)
    computed = [told(engine.ask(EDITED, repair=r, store=False))[2] for r in ("none", "window:4")]
    assert computed == [6, 10]
    assert told(engine.ask(EDITED, repair="window:4+tail:30", store=False)) == (60, 106, 39)
    assert told(engine.ask(EDITED, store=False))[2] >= 6
    # What was repaired is the request's own.
    engine.ask(EDITED, 1, repair="window:4")
    assert nodes(engine)[-1].num_owned == 10


def test_two_donors_are_put_together(engine: Engine) -> None:
    other = ids(N, 1)
    engine.ask(DONOR)
    engine.ask(other)
    output = engine.ask([*NEW[:3], *DONOR[:80], *other[20:100], *NEW[3:]], **LOOSE)
    assert told(output) == (0, 160, 5)
    assert set(output.provenance.donors) == {node.node_id for node in nodes(engine)}


def test_an_answer_is_the_beginning_of_the_next_turn(engine: Engine, in_full: Check) -> None:
    turn, known = ids(40, 3), 0
    for number in range(4):
        output = engine.ask(turn, 8, reuse="exact")
        assert told(output)[0] == known
        in_full(output)
        known = len(turn) + 7
        turn = [*turn, *output.token_ids, *ids(7, 10 + number)]


# -- what is approximate stays so -----------------------------------------------------------------


def test_a_careless_request_changes_nothing_for_a_strict_one(
    engine: Engine, in_full: Check
) -> None:
    engine.ask(DONOR)
    first = engine.ask(EDITED, 8, repair="none")
    assert told(first) == (60, 139, 6)
    assert nodes(engine)[-1].exact_len == 65  # to the end of the edit
    answered = [*EDITED, *first.token_ids]
    for prompt in (EDITED, [*EDITED, *ids(20, 5)], [*EDITED[:150], *ids(60, 6)], answered):
        for options in ({"max_divergence": 0}, {"reuse": "exact"}):
            output = engine.ask(prompt, 8, store=False, **options)
            assert told(output)[:2] == (65, 0)
            in_full(output)
    # Who takes what there is continues it, and gets the answer that one got.
    again = engine.ask(EDITED, 8, **LOOSE)
    assert told(again) == (65, 139, 1)
    assert again.token_ids == first.token_ids
    assert told(engine.ask([*answered, *NEW], **LOOSE)) == (65, 147, 6)


def test_what_was_computed_behind_something_approximate_is_for_nobody_else(
    engine: Engine,
) -> None:
    """The second request computed `own` behind reused KV; the third has only that in common."""
    own = ids(40, 8)
    engine.ask(DONOR)
    assert told(engine.ask([*NEW, *DONOR[:80], *own], repair="none"))[1] == 80
    output = engine.ask([*NEW[2:], *own, *NEW[:2]], **LOOSE)
    assert told(output) == (0, 0, 45)
    assert reason(output) == "below_min_gain"


def test_what_a_donor_borrowed_is_as_good_as_its_owners(engine: Engine) -> None:
    engine.ask(DONOR)
    engine.ask(EDITED, repair="none")
    output = engine.ask([*EDITED[:150], *ids(5, 11), *EDITED[150:]], **LOOSE)
    assert told(output) == (65, 139, 6)
    # Its own edit was computed behind nothing but exact KV.
    assert told(engine.ask([NEW[0], *EDITED[1:]], **LOOSE)) == (0, 203, 2)


def test_who_repeats_a_request_is_not_stored_but_one_who_is_stricter_is(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    touched: list[str] = []
    monkeypatch.setattr(engine.store, "touch", touched.append)
    for _ in range(3):
        engine.ask(DONOR)
    engine.ask(DONOR[:150], 1)
    assert len(nodes(engine)) == 1
    for _ in range(3):
        engine.ask(EDITED, repair="none")
    exact, approximate = nodes(engine)
    assert touched == [exact.node_id] * 3 + [approximate.node_id] * 2
    assert told(engine.ask(EDITED, max_divergence=0))[1] == 0
    assert told(engine.ask(EDITED, max_divergence=0)) == (N + 4, 0, 1)
    assert len(nodes(engine)) == 3


# -- who shares -----------------------------------------------------------------------------------


@pytest.mark.parametrize("salt", ["other", "SALT", ""])
@pytest.mark.parametrize("reuse", ["similar", "exact"])
def test_salts_are_apart(engine: Engine, in_full: Check, reuse: str, salt: str) -> None:
    engine.ask(DONOR, cache_salt="salt")
    for prompt in (DONOR, EDITED, DONOR[:150]):
        output = engine.ask(prompt, cache_salt=salt, reuse=reuse, store=False)
        in_full(output)
        assert told(output) == (0, 0, len(prompt))
        assert reason(output) == ("no_donor" if reuse == "similar" else "exact_only")
    assert told(engine.ask(DONOR, cache_salt="salt", reuse=reuse))[0] == N - 1
    # A request that is known there is none here.
    engine.ask(DONOR, cache_salt=salt)
    assert len({node.namespace for node in nodes(engine)}) == len(nodes(engine)) == 2


def test_the_namespace_is_checked_again_when_kv_is_read(
    engine: Engine, in_full: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even a search that is all wrong does not mix them."""
    engine.ask(DONOR)
    (node,) = nodes(engine)
    find = engine.reuse.catalogue.find
    monkeypatch.setattr(
        engine.reuse.catalogue, "find", lambda keys, ns, *rest: find(keys, node.namespace, *rest)
    )
    output = engine.ask(DONOR, cache_salt="other", store=False)
    assert reason(output) == "wrong_namespace"
    assert told(output) == (0, 0, N)
    in_full(output)
    assert nodes(engine) == [node]  # it did nothing wrong


# -- what is not stored ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "options"),
    [(DONOR, {"store": False}), (DONOR, {"reuse": "off"}), (DONOR[:15], {})],
    ids=["asked", "off", "short"],
)
def test_some_requests_are_no_donors(engine: Engine, prompt: Ids, options: dict[str, Any]) -> None:
    engine.ask(prompt, 1, **options)
    assert not nodes(engine) and not engine.store.ids()
    assert reason(engine.ask(EDITED)) == "no_donor"


@pytest.mark.parametrize("problem", [None, OSError("no memory for a copy")], ids=["room", "error"])
def test_what_cannot_be_stored_is_no_requests_problem(
    engine: Engine, in_full: Check, monkeypatch: pytest.MonkeyPatch, problem: Exception | None
) -> None:
    def put(*_: Any) -> None:
        if problem is not None:
            raise problem

    with monkeypatch.context() as patch:
        patch.setattr(engine.store, "put", put)
        in_full(engine.ask(DONOR))
    assert not nodes(engine)
    assert reason(engine.ask(DONOR)) == "no_donor"
    assert len(nodes(engine)) == 1


# -- what goes wrong is a miss --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "why"),
    [
        *((KVUnavailableError(x, "gone"), x) for x in ("corrupt", "evicted", "io_error")),
        (MemoryError(), "edit_error"),
    ],
    ids=str,
)
def test_donors_that_cannot_be_read(
    engine: Engine,
    in_full: Check,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    why: str,
) -> None:
    engine.ask(DONOR)

    def get(*_: Any) -> Any:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(engine.store, "get", get)
        output = engine.ask(EDITED, repair="none")
    assert told(output) == (0, 0, N + 5)
    assert reason(output) == why
    in_full(output)
    # It is exact, and found as such.
    assert told(engine.ask(EDITED, reuse="exact")) == (N + 4, 0, 1)


def test_a_donor_of_another_shape_is_not_read(
    engine: Engine, in_full: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Say, of a shared store that another model writes to."""
    engine.ask(DONOR)
    get = engine.store.get

    def other(*asked: Any) -> Any:
        stored = get(*asked)
        kv = type(stored.kv)(stored.kv.k[:1], stored.kv.v[:1])
        return type(stored)(stored.node, kv)

    monkeypatch.setattr(engine.store, "get", other)
    output = engine.ask(EDITED, **LOOSE)
    assert reason(output) == "corrupt"
    in_full(output)


def test_a_donor_that_is_deleted_is_gone(engine: Engine, in_full: Check) -> None:
    engine.ask(DONOR)
    (node,) = nodes(engine)
    engine.store.delete(node.node_id)  # inside vLLM the scheduler does not know it yet
    output = engine.ask(EDITED, repair="none")
    assert told(output) == (0, 0, N + 5)
    assert reason(output) in ("evicted", "no_donor")
    in_full(output)
    (new,) = nodes(engine)
    assert new.num_owned == len(new)


def test_a_lookup_that_fails(
    engine: Engine, in_full: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("index on fire")

    engine.ask(DONOR)
    with monkeypatch.context() as patch:
        patch.setattr(engine.reuse.catalogue, "find", fail)
        output = engine.ask(EDITED)
    assert reason(output) == "lookup_error"
    in_full(output)


def test_children_of_a_lost_donor_keep_what_they_own(engine: Engine, in_full: Check) -> None:
    engine.ask(DONOR)
    target = [*DONOR[:100], *ids(100, 5)]
    engine.ask(target, 1, repair="none")
    parent, _ = nodes(engine)
    engine.store.delete(parent.node_id)
    engine.ask(NEW * 4, 1, store=False)  # so that the loss is heard of
    # Where the parent was is a hole; behind it the child has what it computed itself.
    assert told(engine.ask(target, **LOOSE)) == (0, 99, 101)
    output = engine.ask(target, reuse="exact", store=False)
    assert told(output) == (0, 0, N)
    in_full(output)
