"""Plans as values, and what the planner may and may not reuse."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvshare_mm.reuse.plan import (
    Decline,
    KeptRun,
    PlannerOptions,
    ReusePlan,
    turn_of,
    uniform_shift,
)
from kvshare_mm.reuse.planner import make_plan

from .plans import EAGER, blocks, describe, donor_of, plans, to_keys

# -- reuse plans as values: every position is exact, reused or computed ----------------------------


@given(plans(), st.lists(st.integers(0, 100)))
def test_every_position_is_exact_reused_or_computed(plan, wanted):
    n = plan.num_tokens
    plan = plan.with_repair(np.array([w % n for w in wanted], dtype=np.int64))
    kept, approximate = np.zeros(n, bool), np.zeros(n, bool)
    for run in plan.runs:
        kept[run.start : run.end] = True
        approximate[run.start : run.end] = not run.exact
    repair = np.zeros(n, bool)
    repair[[w % n for w in wanted]] = True
    repair &= approximate
    assert np.array_equal(plan.kept, kept)
    assert np.array_equal(plan.approximate, approximate)
    assert np.array_equal(plan.placeholders, np.flatnonzero(~kept))
    assert np.array_equal(plan.repair, np.flatnonzero(repair))
    assert np.array_equal(plan.compute, np.flatnonzero(~kept | repair))
    assert plan.num_exact == (kept & ~approximate).sum()
    assert plan.num_reused == (approximate & ~repair).sum()
    assert plan.num_computed == len(plan.compute)
    assert plan.num_exact + plan.num_reused + plan.num_computed == n
    assert plan.compute[-1] == n - 1
    for array in (plan.placeholders, plan.repair, plan.compute):
        assert array.dtype == np.int64


@given(plans())
def test_donors_come_in_the_order_of_what_they_give(plan):
    given_by = [sum(r.length for r in plan.runs if r.donor == d) for d in plan.donors]
    assert given_by == sorted(given_by, reverse=True)
    assert set(plan.donors) == {r.donor for r in plan.runs}


@pytest.mark.parametrize(
    ("num_tokens", "runs", "says"),
    [
        (0, (), "last position"),
        (5, (KeptRun("a", 0, 0, 5, False),), "last position"),
        (5, (KeptRun("a", 0, 0, 5, True),), "last position"),
        (9, (KeptRun("a", 0, 2, 3, False), KeptRun("a", 0, 4, 2, False)), "overlap"),
        (9, (KeptRun("a", 0, 4, 2, False), KeptRun("a", 0, 0, 2, False)), "overlap"),
        (9, (KeptRun("a", 0, 2, 0, False),), "empty"),
        (9, (KeptRun("a", 0, -1, 3, False),), "overlap"),
        (9, (KeptRun("a", -1, 2, 3, False),), "before its donor"),
        (9, (KeptRun("a", 1, 0, 2, True),), "exact"),
        (9, (KeptRun("a", 2, 2, 2, True),), "exact"),
        (9, (KeptRun("a", 0, 0, 2, False), KeptRun("a", 2, 2, 2, True)), "exact"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(num_tokens, runs, says):
    with pytest.raises(ValueError, match=says):
        ReusePlan(num_tokens, runs)


# -- what the planner may and may not reuse, case by case ------------------------------------------


def test_what_follows_the_exact_prefix_must_be_worth_it():
    donor = donor_of(blocks(*"ABC"))
    target = to_keys([*blocks("A"), *blocks("X", length=60), *blocks("C"), 0])
    plan = make_plan(target, [donor], PlannerOptions(min_gain_share=0.3))
    assert describe(plan) == [("d", 0, 0, 20, True)]
    assert plan.declined is Decline.BELOW_MIN_GAIN
    # 20 of the 81 positions behind the prefix.
    assert make_plan(target, [donor], PlannerOptions(min_gain_share=0.24)).num_reused == 20
    few = PlannerOptions(min_gain_share=0.0, min_gain_tokens=21)
    assert make_plan(target, [donor], few).declined is Decline.BELOW_MIN_GAIN


def test_the_same_media_is_reused_and_other_media_is_not():
    from kvshare_mm.stream import media_keys

    text = np.arange(20, dtype=np.uint64)
    donor = donor_of(np.concatenate((text, media_keys("1a" * 32, 30), text + np.uint64(50))))
    same = np.concatenate((to_keys([99]), media_keys("1a" * 32, 30), to_keys([0])))
    other = np.concatenate((to_keys([99]), media_keys("2a" * 32, 30), to_keys([0])))
    assert make_plan(same, [donor], PlannerOptions()).num_reused == 30
    assert make_plan(other, [donor], PlannerOptions()).declined is Decline.BELOW_MIN_GAIN


def test_one_approximate_position_more_does_not_spoil_an_exact_prefix():
    # Everything behind an approximate run is approximate, whatever it saved.
    sure = donor_of(blocks("A"), "sure")
    other = donor_of([*blocks("A"), 1, 2, *blocks("X")], "other", exact_len=5)
    plan = make_plan(to_keys([*blocks("A"), 1, 3, 4, 5, 6]), [sure, other], PlannerOptions())
    assert describe(plan) == [("sure", 0, 0, 20, True)]


@pytest.mark.parametrize(
    ("donors", "options", "reason"),
    [
        ([], PlannerOptions(), Decline.NO_DONOR),
        ([donor_of(blocks("X"))], PlannerOptions(), Decline.BELOW_MIN_GAIN),
        ([donor_of(blocks(*"XA"))], PlannerOptions(exact_only=True), Decline.EXACT_ONLY),
        ([donor_of(blocks(*"XA"))], PlannerOptions().but_exact_only(), Decline.EXACT_ONLY),
        ([donor_of(blocks(*"XA"))], PlannerOptions(), None),
        ([donor_of(blocks(*"XA"), exact_len=0)], PlannerOptions(), Decline.BELOW_MIN_GAIN),
        ([donor_of([])], PlannerOptions(), Decline.BELOW_MIN_GAIN),
    ],
)
def test_why_nothing_is_reused(donors, options, reason):
    plan = make_plan(to_keys([*blocks("A"), 0]), donors, options)
    assert plan.declined is reason
    assert bool(plan.runs) is (reason is None)


# -- rotary positions in plans: a run moves as one, or is not reused -------------------------------


_PICTURE = np.array([(5, 5, 5), (5, 5, 6), (5, 6, 5), (5, 6, 6), (7, 7, 7)]).T
_LINE = np.array([(5, 5, 5), (5, 5, 6), (5, 5, 7), (5, 5, 8)]).T


@pytest.mark.parametrize(
    ("target", "start", "donor", "donor_start", "length", "turn"),
    [
        (None, 7, None, 3, 5, 4),
        (_PICTURE + 3, 0, _PICTURE, 0, 5, 3),
        (_PICTURE, 4, None, 6, 1, 1),
        (None, 2, _PICTURE, 4, 1, -5),
        (_PICTURE, 0, _LINE, 0, 2, 0),
        # Whose axes part have no turn.
        (_PICTURE, 0, _LINE, 0, 4, None),
        (_PICTURE, 0, None, 0, 4, None),
    ],
)
def test_a_run_turns_by_what_all_its_positions_move(
    target, start, donor, donor_start, length, turn
):
    assert uniform_shift(target, start, donor, donor_start, length) == turn


def test_runs_that_do_not_move_as_one_are_dropped():
    """Equal keys with other positions do not happen; if they did, nothing wrong is reused."""
    keys = to_keys(range(20))
    straight, bent = (np.tile(np.arange(20), (3, 1)) for _ in range(2))
    bent[1, 10:] += 2
    donor = dataclasses.replace(donor_of(range(20)), positions=straight)
    plan = make_plan(keys, [donor], EAGER, bent)
    assert plan.runs == ()
    same = make_plan(keys, [donor], EAGER, straight)
    assert same.num_exact == 19
    moved = make_plan(to_keys([99, *range(20)]), [donor], EAGER, np.tile(np.arange(21), (3, 1)))
    assert moved.num_reused == 19
    parted = np.tile(np.arange(21), (3, 1))
    parted[2, 12:] += 1
    assert make_plan(to_keys([99, *range(20)]), [donor], EAGER, parted).num_reused == 0


def test_runs_end_where_an_axis_moves_by_another_amount():
    keys = to_keys(range(20))
    donor = dataclasses.replace(donor_of(range(20)), positions=np.tile(np.arange(20), (3, 1)))
    options = dataclasses.replace(EAGER, each_axis=True)
    positions = np.tile(np.arange(21), (3, 1))
    positions[0, 5:] -= 3  # a time alone
    positions[:, 12:] += 4  # and all that is behind
    positions[2, 20:] += 1  # less than is worth a run
    plan = make_plan(to_keys([99, *range(20)]), [donor], options, positions)
    assert describe(plan) == [("d", 0, 1, 4, False), ("d", 4, 5, 7, False), ("d", 11, 12, 8, False)]
    turns = [
        turn_of(positions, run.start, donor.positions, run.donor_start, run.length)
        for run in plan.runs
    ]
    assert turns == [(1, 1, 1), (-2, 1, 1), (2, 5, 5)]
    # What is exact stands where it stood, on each axis.
    assert make_plan(keys, [donor], options, positions[:, :20]).num_exact == 0


def test_an_exact_prefix_stands_where_it_stood():
    keys = to_keys(range(20))
    donor = dataclasses.replace(donor_of(range(20)), positions=np.tile(np.arange(20), (3, 1)))
    plan = make_plan(keys, [donor], EAGER, np.tile(np.arange(20) + 1, (3, 1)))
    assert plan.num_exact == 0
