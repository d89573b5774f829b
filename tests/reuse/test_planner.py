"""What the planner may and may not reuse, case by case."""

from __future__ import annotations

import numpy as np
import pytest

from kvshare_mm.reuse.plan import Decline, PlannerOptions
from kvshare_mm.reuse.planner import make_plan

from .plans import blocks, describe, donor_of, to_keys


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
