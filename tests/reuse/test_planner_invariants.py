"""What holds of the planner's plans, whatever the donors."""

from __future__ import annotations

import dataclasses

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvshare_mm.reuse.align import common_prefix
from kvshare_mm.reuse.plan import Decline, Donor, PlannerOptions
from kvshare_mm.reuse.planner import make_plan

from .plans import EAGER, donor_of, edited, maximal_matches, to_keys


@st.composite
def patchwork(draw, symbols):
    """Slices of `symbols` in any order: many matches reach into each other."""
    n = len(symbols)
    cuts = st.tuples(st.integers(0, n), st.integers(0, 12))
    return [s for a, k in draw(st.lists(cuts, max_size=5)) for s in symbols[a : a + k]]


@st.composite
def tasks(draw):
    """A target, and donors made from what it was made from, in any state of decay."""
    alphabet = draw(st.sampled_from([2, 6, 40]))
    base = draw(st.lists(st.integers(0, alphabet - 1), min_size=1, max_size=40))
    target = draw(st.one_of(edited(base), patchwork(base))) or [0]
    donors = []
    for i in range(draw(st.integers(0, 4))):
        symbols = draw(st.one_of(st.just(base), edited(base), edited(target), st.just(target)))
        n = len(symbols)
        readable = draw(st.one_of(st.just(n), st.integers(0, n)))
        exact_len = draw(st.one_of(st.just(readable), st.integers(0, readable)))
        holes = draw(st.lists(st.booleans(), min_size=n, max_size=n))
        reusable = np.where(np.arange(n) < exact_len, True, np.array(holes, dtype=bool))
        donors.append(
            donor_of(symbols, f"d{i}", readable=readable, exact_len=exact_len, reusable=reusable)
        )
    if donors and draw(st.booleans()):
        donors.append(donors[0])
    options = PlannerOptions(
        min_run=draw(st.integers(1, 5)),
        min_gain_tokens=draw(st.integers(1, 8)),
        min_gain_share=draw(st.sampled_from([0.0, 0.3, 1.0])),
        exact_only=draw(st.booleans()) and draw(st.booleans()),
    )
    return to_keys(target), donors, options


@settings(max_examples=150)
@given(tasks())
@example((to_keys([1]), [], PlannerOptions()))
@example((to_keys([1]), [donor_of([1])], EAGER))
@example((to_keys([1, 2]), [donor_of([1, 2])], EAGER))
def test_only_what_may_be_reused_is(task):
    target, donors, options = task
    n = len(target)
    plan = make_plan(target, donors, options)
    assert plan.num_tokens == n
    assert plan.num_exact + plan.num_reused + plan.num_computed == n
    assert plan.num_reused == plan.approximate.sum()
    assert n - 1 in plan.compute
    by_id = {d.donor_id: d for d in donors}
    for run in plan.runs:
        donor = by_id[run.donor]
        source = slice(run.donor_start, run.donor_start + run.length)
        assert source.stop <= len(donor.align_keys)
        assert np.array_equal(donor.align_keys[source], target[run.start : run.end])
        same_prefix = run.shift == 0 and run.end <= min(
            common_prefix(donor.align_keys, target), donor.readable
        )
        if run.exact:
            assert same_prefix
            assert run.end <= donor.exact_len
        else:
            assert not options.exact_only
            assert run.length >= options.min_run
            assert same_prefix or donor.reusable[source].all()


@settings(max_examples=150)
@given(tasks())
def test_the_longest_exact_prefix_is_reused(task):
    target, donors, options = task
    limit = len(target) - 1
    longest = max(
        (min(common_prefix(d.align_keys, target), d.exact_len, limit) for d in donors), default=0
    )
    assert make_plan(target, donors, options).num_exact == longest


def prefix_of(target: np.ndarray, donors: list[Donor], options: PlannerOptions) -> int:
    """End of what is reused because a donor begins with the very same tokens."""
    shared = [min(common_prefix(d.align_keys, target), d.readable, len(target) - 1) for d in donors]
    exact = max((min(s, d.exact_len) for s, d in zip(shared, donors, strict=True)), default=0)
    longest = max(shared, default=0)
    return exact if options.exact_only or longest - exact < options.min_run else longest


@settings(max_examples=150)
@given(tasks())
def test_a_plan_is_worth_it_and_says_when_not(task):
    target, donors, options = task
    n = len(target)
    plan = make_plan(target, donors, options)
    prefix = prefix_of(target, donors, options)
    assert plan.kept[:prefix].all()
    gain = sum(r.length for r in plan.runs if r.start >= prefix)
    if gain:
        assert gain >= max(options.min_gain_tokens, options.min_gain_share * (n - prefix))
        assert plan.declined is None
    if plan.declined is Decline.EXACT_ONLY:
        assert options.exact_only
        assert not plan.num_reused
    if plan.declined is Decline.NO_DONOR:
        assert not donors
    if not donors and n > 1:
        assert plan.declined is (Decline.EXACT_ONLY if options.exact_only else Decline.NO_DONOR)
    if not plan.runs and n > 1:
        assert plan.declined is not None


@settings(max_examples=150)
@given(tasks())
def test_no_gap_is_left_that_a_donor_could_fill(task):
    """Whatever the order of the blocks, and however matches overlap."""
    target, donors, options = task
    options = dataclasses.replace(options, min_gain_tokens=1, min_gain_share=0.0, exact_only=False)
    plan = make_plan(target, donors, options)
    covered = plan.kept
    covered[-1] = True
    edges = np.flatnonzero(np.diff(np.concatenate(([1], covered.astype(np.int8), [1]))))
    for low, high in edges.reshape(-1, 2):
        for donor in donors:
            for d, _, length in maximal_matches(
                donor.align_keys, target[low:high], options.min_run
            ):
                run = 0
                for usable in donor.reusable[d : d + length]:
                    run = run + 1 if usable else 0
                    assert run < options.min_run, (int(low), int(high), donor)
