"""Reuse plans as values: every position is exact, reused or computed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvshare_mm.reuse.plan import KeptRun, ReusePlan


@st.composite
def plans(draw):
    """Any valid plan: some exact prefix, then approximate runs with and without gaps."""
    runs, end = [], draw(st.integers(0, 6))
    if end:
        runs.append(KeptRun("a", 0, 0, end, exact=True))
    for _ in range(draw(st.integers(0, 4))):
        start = end + draw(st.integers(0, 4))
        end = start + draw(st.integers(1, 8))
        shift = draw(st.integers(-20, start))
        runs.append(
            KeptRun(draw(st.sampled_from("abc")), start - shift, start, end - start, exact=False)
        )
    return ReusePlan(end + draw(st.integers(1, 5)), tuple(runs))


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
