"""Who has read what was edited is computed again, however far behind."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kvshare_mm.reuse.dependents import all_reads, carried_reads, dependents
from kvshare_mm.reuse.plan import Decline, KeptRun, ReusePlan
from kvshare_mm.reuse.planner import make_plan
from kvshare_mm.reuse.repair import BoundaryWindow, MaxDivergence, NoRepair, repaired_plan
from kvshare_mm.reuse.tree import DeltaTree

from .plans import EAGER, blocks, donor_of, to_keys

# A record with a value at 4, a sentence on it at 100, one on that sentence at 200; 300 positions.
N = 300
VALUE, SENTENCE, NEXT = 4, 100, 200
DONOR = list(range(1000, 1000 + N))
READS = np.array([[60, 50], [SENTENCE, VALUE], [NEXT, SENTENCE], [250, 240]], np.int32)


def _edited() -> list[int]:
    target = list(DONOR)
    target[VALUE] = 7
    return target


def _plan(target: list[int], reads: np.ndarray | None = READS) -> ReusePlan:
    return make_plan(to_keys(target), [replace(donor_of(DONOR), reads=reads)], EAGER)


def test_who_read_an_edited_value_and_who_read_that_one() -> None:
    found = dependents(_plan(_edited()))
    assert {SENTENCE, NEXT} <= set(found.tolist())
    # With the one before and those that it is passed on to, and nobody else.
    assert found.tolist() == [at + off for at in (SENTENCE, NEXT) for off in range(-1, 13)]


def test_readers_of_one_sentence_are_repaired_together() -> None:
    reads = np.array([[SENTENCE, VALUE], [SENTENCE + 6, VALUE], [NEXT, SENTENCE + 6]], np.int32)
    found = dependents(_plan(_edited(), reads)).tolist()
    assert found == [*range(SENTENCE - 1, SENTENCE + 13), *range(NEXT - 1, NEXT + 13)]


def test_moved_text_is_still_what_was_read() -> None:
    # Everything stands 20 positions further behind: who read it stands so, too.
    target = [*range(20), *_edited()]
    found = dependents(_plan(target))
    assert {SENTENCE + 20, NEXT + 20} <= set(found.tolist())
    assert not {60 + 20, 250 + 20} & set(found.tolist())


def test_who_read_a_whole_passage_that_is_gone_is_not_followed() -> None:
    # As many positions as a value or a sentence may have, and one more.
    reads = np.array([[SENTENCE, VALUE], [NEXT, SENTENCE]], np.int32)
    for length, followed in (64, True), (65, False):
        target = [*DONOR[:3], 7, *DONOR[3 + length :]]
        found = dependents(_plan(target, reads)) + length - 1
        assert ({SENTENCE, NEXT} <= set(found.tolist())) is followed
        assert len(found) > 0 or not followed


def test_nothing_is_known_of_a_donor_without_reads() -> None:
    plan = _plan(_edited(), None)
    assert plan.reads is None
    assert not len(dependents(plan))


def test_the_default_policy_repairs_them() -> None:
    asked = MaxDivergence(1000.0)  # no risk is too much: what is repaired is for what is read
    with_reads, without = (
        repaired_plan(_plan(_edited(), reads), asked).compute for reads in (READS, None)
    )
    assert {SENTENCE, NEXT} <= set(with_reads.tolist())
    assert not {SENTENCE, NEXT} & set(without.tolist())


def test_a_beginning_that_another_donor_gives_was_read_all_the_same() -> None:
    # The exact prefix is the longer donor's run; the other one shares half of it.
    target = _edited()
    target[VALUE] = DONOR[VALUE]
    other = DONOR[:40] + [5] * 10 + DONOR[50:]
    reads = np.array([[150, 20], [160, 45]], np.int32)
    donors = [donor_of(target[:100], "long"), replace(donor_of(other, "other"), reads=reads)]
    plan = make_plan(to_keys(target), donors, EAGER)
    assert {run.donor for run in plan.runs} == {"long", "other"}
    assert plan.reads is not None
    assert plan.reads.tolist() == [[150, 20], [160, -1]]


def test_what_is_stored_is_read_in_the_donor_or_now() -> None:
    plan = repaired_plan(_plan(_edited()), MaxDivergence(1000.0))
    now = np.array([[SENTENCE, VALUE], [NEXT, SENTENCE], [290, 280]], np.int32)
    found = all_reads(plan, now)
    assert found is not None
    assert found.tolist() == [[60, 50], *now[:2].tolist(), [250, 240], [290, 280]]
    assert all_reads(plan, None) is None


@given(st.data())
def test_as_one_would_by_hand(data: st.DataObject) -> None:
    """The fixed point of "reads what is gone, or who does", position by position."""
    n = 60
    pair = st.tuples(st.integers(1, n - 2), st.integers(-1, n - 3)).filter(lambda p: p[1] < p[0])
    reads = data.draw(st.lists(pair, max_size=30))
    cut = data.draw(st.integers(0, 20))
    runs = (KeptRun("d", cut, cut, n - 1 - cut, exact=False),)
    plan = ReusePlan(n, runs, reads=np.array(reads, np.int32).reshape(-1, 2))
    stale: set[int] = set()
    for _ in reads:
        stale |= {i for i, j in reads if cut <= i < n - 1 and (j < 0 or j in stale)}
    found = set(dependents(plan).tolist())
    assert stale <= found
    assert all(any(-1 <= at - i <= 12 for i in stale) for at in found)
    assert found or not stale


def test_reads_of_a_prefix_have_their_places() -> None:
    runs = (KeptRun("d", 0, 0, N - 1, exact=True),)
    donor = replace(donor_of(DONOR), reads=READS)
    found = carried_reads(to_keys(DONOR), runs, [donor])
    assert found is not None
    assert found.tolist() == READS.tolist()


def test_what_now_stands_behind_its_reader_is_not_gone() -> None:
    # Two blocks change places; the second had read the first.
    first, second, rest = DONOR[:100], DONOR[100:200], DONOR[200:]
    reads = np.array([[180, 80], [250, 80]], np.int32)
    donor = replace(donor_of(DONOR), reads=reads)
    plan = make_plan(to_keys([*second, *first, *rest]), [donor], EAGER)
    assert plan.reads is not None
    assert sorted(plan.reads.tolist()) == [[80, 180], [250, 180]]
    assert not len(dependents(plan))
    pairs = all_reads(plan, np.empty((0, 2), np.int32))
    assert pairs is not None and pairs.tolist() == [[250, 180]]
    # But what moved and is computed again takes its reader with it.
    new = [*second, *first[:78], 3, 5, 7, 9, *first[82:], *rest]
    plan = make_plan(to_keys(new), [donor], EAGER)
    assert plan.reads is not None
    assert 80 in dependents(plan)


def test_of_text_that_is_kept_twice_the_one_before_is_read() -> None:
    target = [7, *DONOR[:200], *DONOR[:100], *DONOR[200:]]
    reads = np.array([[180, 80], [250, 80]], np.int32)
    plan = make_plan(to_keys(target), [replace(donor_of(DONOR), reads=reads)], EAGER)
    assert plan.reads is not None
    assert sorted(plan.reads.tolist()) == [[181, 81], [351, 281]]


def test_a_plan_that_is_declined_keeps_what_its_beginning_reads() -> None:
    target = [*DONOR[:200], *range(50), *DONOR[200:]]
    plan = _plan(target).only_exact(Decline.DIVERGENCE)
    now = np.array([[220, 110]], np.int32)
    found = all_reads(plan, now)
    assert found is not None
    assert found.tolist() == [[60, 50], [SENTENCE, VALUE], [220, 110]]


def test_what_an_unknown_donor_reads_makes_all_of_it_unknown() -> None:
    assert all_reads(_plan(_edited(), None), READS[:1]) is None
    alone = all_reads(ReusePlan(N), READS)
    assert alone is READS


@settings(max_examples=200)
@given(st.data())
def test_any_history_of_moved_text_can_be_stored(data: st.DataObject) -> None:
    """Prompts of blocks in any order and number, each planned with all before it."""
    names = st.lists(st.sampled_from("abcdef"), min_size=2, max_size=7)
    tree = DeltaTree()
    for number in range(4):
        keys = to_keys([*blocks(*data.draw(names), length=30), 10**6 + number])
        donors = [tree.donor(f"n{i}") for i in range(number)]
        policy = data.draw(st.sampled_from([NoRepair(), BoundaryWindow(4), MaxDivergence(0.1)]))
        plan = repaired_plan(make_plan(keys, donors, EAGER), policy)
        readers = plan.compute[plan.compute > 16]
        pairs = np.stack((readers, readers // 2), axis=1)
        node = tree.derive(f"n{number}", "ns", keys, plan, 0.0, reads=pairs)  # or it raises
        tree.insert(node)
        assert node.reads is not None
        assert set(map(tuple, pairs.tolist())) <= set(map(tuple, node.reads.tolist()))
