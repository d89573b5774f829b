"""Reuse plans: their invariants, and what the planner may and may not reuse."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvshare_mm.align import common_prefix, maximal_matches
from kvshare_mm.plan import (
    Decline,
    Donor,
    KeptRun,
    PlannerOptions,
    ReusePlan,
    make_plan,
    one_turn,
)

EAGER = PlannerOptions(min_run=2, min_gain_tokens=1, min_gain_share=0.0)


def to_keys(symbols) -> np.ndarray:
    return np.array(list(symbols), dtype=np.uint64)


def donor_of(symbols, donor_id="d", *, exact_len=None, readable=None, material=None) -> Donor:
    """By default a request that was computed in full."""
    keys = to_keys(symbols)
    readable = len(keys) if readable is None else readable
    exact_len = readable if exact_len is None else exact_len
    if material is None:
        material = np.arange(len(keys)) < exact_len
    return Donor(donor_id, keys, np.asarray(material, dtype=bool), readable, exact_len)


# -- ReusePlan --------------------------------------------------------------------------------


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
def test_repair_replaces_an_earlier_repair(plan):
    everything = plan.with_repair(np.arange(plan.num_tokens))
    assert everything.num_reused == 0
    assert everything.with_repair(np.empty(0, np.int64)).num_reused == plan.num_reused
    assert np.array_equal(plan.with_repair(everything.repair).repair, everything.repair)


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


def test_exact_runs_of_two_donors_may_follow_each_other():
    plan = ReusePlan(9, (KeptRun("a", 0, 0, 2, True), KeptRun("b", 2, 2, 3, True)))
    assert plan.num_exact == 5


def test_a_plan_is_a_frozen_value():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ReusePlan(3).num_tokens = 4


# -- make_plan, whatever the donors -----------------------------------------------------------


@st.composite
def edited(draw, symbols):
    result = list(symbols)
    for _ in range(draw(st.integers(0, 3))):
        a, b = sorted(draw(st.tuples(*[st.integers(0, len(result))] * 2)))
        block, rest = result[a:b], result[:a] + result[b:]
        at = draw(st.integers(0, len(rest)))
        new = draw(st.lists(st.integers(0, 40), max_size=4))
        result = draw(
            st.sampled_from([rest, result[:a] + new + result[b:], rest[:at] + block + rest[at:]])
        )
    return result


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
        material = np.where(np.arange(n) < exact_len, True, np.array(holes, dtype=bool))
        donors.append(
            donor_of(symbols, f"d{i}", readable=readable, exact_len=exact_len, material=material)
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
        assert source.stop <= len(donor.keys)
        assert np.array_equal(donor.keys[source], target[run.start : run.end])
        same_prefix = run.shift == 0 and run.end <= min(
            common_prefix(donor.keys, target), donor.readable
        )
        if run.exact:
            assert same_prefix
            assert run.end <= donor.exact_len
        else:
            assert not options.exact_only
            assert run.length >= options.min_run
            assert same_prefix or donor.material[source].all()


@settings(max_examples=150)
@given(tasks())
def test_the_longest_exact_prefix_is_reused(task):
    target, donors, options = task
    limit = len(target) - 1
    longest = max(
        (min(common_prefix(d.keys, target), d.exact_len, limit) for d in donors), default=0
    )
    assert make_plan(target, donors, options).num_exact == longest


def prefix_of(target: np.ndarray, donors: list[Donor], options: PlannerOptions) -> int:
    """End of what is reused because a donor begins with the very same tokens."""
    shared = [min(common_prefix(d.keys, target), d.readable, len(target) - 1) for d in donors]
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
            for d, _, length in maximal_matches(donor.keys, target[low:high], options.min_run):
                run = 0
                for usable in donor.material[d : d + length]:
                    run = run + 1 if usable else 0
                    assert run < options.min_run, (int(low), int(high), donor)


@settings(max_examples=100)
@given(tasks())
def test_a_donor_listed_twice_changes_nothing(task):
    target, donors, options = task
    once, twice = make_plan(target, donors, options), make_plan(target, donors * 2, options)
    assert once.runs == twice.runs
    assert once.declined == twice.declined


@given(st.lists(st.integers(0, 5), min_size=2, max_size=40), st.booleans())
def test_of_an_identical_prompt_only_the_last_position_is_computed(symbols, exact_only):
    plan = make_plan(to_keys(symbols), [donor_of(symbols)], PlannerOptions(exact_only=exact_only))
    assert plan.compute.tolist() == [len(symbols) - 1]
    assert plan.num_exact == len(symbols) - 1
    assert plan.declined is None


# -- make_plan, case by case ------------------------------------------------------------------


def blocks(*names: str, length: int = 20) -> list[int]:
    """A prompt of blocks; each name stands for its own `length` keys."""
    return [1000 * ord(name) + i for name in names for i in range(length)]


def describe(plan: ReusePlan) -> list[tuple[str, int, int, int, bool]]:
    return [tuple(r) for r in plan.runs]


def test_a_changed_number_in_the_middle():
    donor = donor_of(blocks(*"ABC"))
    target = to_keys([*blocks("A"), 1, 2, *blocks("C")])
    plan = make_plan(target, [donor], PlannerOptions())
    assert describe(plan) == [("d", 0, 0, 20, True), ("d", 40, 22, 19, False)]
    assert plan.compute.tolist() == [20, 21, 41]


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


def test_a_moved_block_fills_the_gap_that_the_main_alignment_leaves():
    donor = donor_of(blocks(*"PABQ"))
    plan = make_plan(to_keys([*blocks(*"PBAQ"), 0]), [donor], PlannerOptions())
    assert describe(plan) == [
        ("d", 0, 0, 20, True),
        ("d", 40, 20, 20, False),
        ("d", 20, 40, 20, False),
        ("d", 60, 60, 20, False),
    ]


def test_moved_lines_that_share_their_ends_are_all_kept():
    """Every line's match reaches into its neighbours by the separator they have in common."""
    separator = [7, 8, 9]
    lines = {name: [*separator, *blocks(name, length=6)] for name in "ABCDEF"}
    donor = donor_of([key for name in "ABCDEF" for key in lines[name]])
    target = to_keys([*(key for name in "FEDCBA" for key in lines[name]), 0])
    plan = make_plan(target, [donor], PlannerOptions())
    assert plan.compute.tolist() == [len(target) - 1]


def test_a_second_donor_fills_what_the_first_lacks():
    first, second = donor_of(blocks(*"XABY"), "first"), donor_of(blocks(*"UCV"), "second")
    target = to_keys([0, *blocks(*"ACB"), 0])
    plan = make_plan(target, [second, first], PlannerOptions())
    assert describe(plan) == [
        ("first", 20, 1, 20, False),
        ("second", 20, 21, 20, False),
        ("first", 40, 41, 20, False),
    ]
    assert plan.donors == ("first", "second")


def test_the_donor_that_covers_more_is_the_main_one_not_the_one_listed_first():
    little, much = donor_of(blocks(*"XA"), "little"), donor_of(blocks(*"XXABC"), "much")
    plan = make_plan(to_keys([0, *blocks(*"ABC"), 0]), [little, much], PlannerOptions())
    assert plan.donors == ("much",)


def test_the_same_media_is_reused_and_other_media_is_not():
    from kvshare_mm.stream import media_keys

    text = np.arange(20, dtype=np.uint64)
    donor = donor_of(np.concatenate((text, media_keys(1, 30), text + np.uint64(50))))
    same = np.concatenate((to_keys([99]), media_keys(1, 30), to_keys([0])))
    other = np.concatenate((to_keys([99]), media_keys(2, 30), to_keys([0])))
    assert make_plan(same, [donor], PlannerOptions()).num_reused == 30
    assert make_plan(other, [donor], PlannerOptions()).declined is Decline.BELOW_MIN_GAIN


def test_an_approximate_request_repeated_is_reused_whole():
    donor = donor_of(blocks(*"ABC"), exact_len=20)
    plan = make_plan(to_keys(blocks(*"ABC")), [donor], PlannerOptions())
    assert describe(plan) == [("d", 0, 0, 20, True), ("d", 20, 20, 39, False)]


def test_an_approximate_request_gives_nothing_behind_the_first_edit():
    donor = donor_of(blocks(*"ABC"), exact_len=20)
    target = to_keys([*blocks("A"), 1, *blocks("C"), 0])
    plan = make_plan(target, [donor], PlannerOptions())
    assert describe(plan) == [("d", 0, 0, 20, True)]


def test_what_an_approximate_request_borrowed_exactly_may_be_edited_again():
    material = np.arange(60) // 20 != 1
    donor = donor_of(blocks(*"ABC"), exact_len=20, material=material)
    target = to_keys([*blocks("A"), 1, *blocks("B"), *blocks("C"), 0])
    plan = make_plan(target, [donor], PlannerOptions(min_gain_share=0.0))
    assert describe(plan) == [("d", 0, 0, 20, True), ("d", 40, 41, 20, False)]


def test_material_cuts_a_run_and_short_leftovers_are_dropped():
    material = np.ones(60, bool)
    material[[23, 30, 45]] = False
    donor = donor_of(blocks(*"ABC"), exact_len=20, material=material)
    target = to_keys([0, *blocks(*"BC"), 0])
    plan = make_plan(target, [donor], PlannerOptions(min_run=4, min_gain_share=0.0))
    # 20..22 is too short; 24..29, 31..44 and 46..59 stay.
    assert [(r.donor_start, r.length) for r in plan.runs] == [(24, 6), (31, 14), (46, 14)]
    assert all(r.shift == -19 for r in plan.runs)


def test_a_hole_ends_the_prefix_and_what_is_behind_it_is_material():
    material = np.arange(60) // 20 != 1
    donor = donor_of(blocks(*"ABC"), readable=20, exact_len=20, material=material)
    plan = make_plan(to_keys(blocks(*"ABC")), [donor], PlannerOptions())
    assert describe(plan) == [("d", 0, 0, 20, True), ("d", 40, 40, 19, False)]


def test_the_approximate_prefix_continues_another_donors_exact_one():
    sure = donor_of(blocks(*"ABX"), "sure")
    long = donor_of(blocks(*"ABC"), "long", exact_len=10)
    plan = make_plan(to_keys([*blocks(*"ABC"), 0]), [long, sure], PlannerOptions())
    assert describe(plan) == [("sure", 0, 0, 40, True), ("long", 40, 40, 20, False)]


def test_one_approximate_position_more_does_not_spoil_an_exact_prefix():
    # Everything behind an approximate run is approximate, whatever it saved.
    sure = donor_of(blocks("A"), "sure")
    other = donor_of([*blocks("A"), 1, 2, *blocks("X")], "other", exact_len=5)
    plan = make_plan(to_keys([*blocks("A"), 1, 3, 4, 5, 6]), [sure, other], PlannerOptions())
    assert describe(plan) == [("sure", 0, 0, 20, True)]


def test_exact_only_reuses_no_approximate_position_even_of_an_identical_prompt():
    donor = donor_of(blocks(*"ABC"), exact_len=20)
    plan = make_plan(to_keys(blocks(*"ABC")), [donor], PlannerOptions(exact_only=True))
    assert describe(plan) == [("d", 0, 0, 20, True)]
    assert plan.declined is Decline.EXACT_ONLY


@pytest.mark.parametrize("extra", [0, 1, 5])
def test_a_target_that_a_donor_goes_beyond(extra):
    donor = donor_of([*blocks("A"), *range(extra)])
    plan = make_plan(to_keys(blocks("A")), [donor], PlannerOptions())
    assert describe(plan) == [("d", 0, 0, 19, True)]


def test_a_target_that_extends_its_donor():
    plan = make_plan(to_keys(blocks(*"AB")), [donor_of(blocks("A"))], PlannerOptions())
    assert describe(plan) == [("d", 0, 0, 20, True)]
    assert plan.declined is None


@pytest.mark.parametrize("donors", [[], [donor_of([1])], [donor_of([2])]])
def test_of_one_token_nothing_can_be_reused(donors):
    plan = make_plan(to_keys([1]), donors, EAGER)
    assert plan.runs == ()
    assert plan.compute.tolist() == [0]


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


# -- rotary positions -------------------------------------------------------------------------


def axes(*columns) -> np.ndarray:
    return np.array(columns, dtype=np.int64).T


def test_without_positions_a_run_turns_by_its_shift():
    assert one_turn(None, 7, None, 3, 5) == 4


def test_a_run_turns_by_what_all_its_positions_move():
    picture = axes((5, 5, 5), (5, 5, 6), (5, 6, 5), (5, 6, 6), (7, 7, 7))
    assert one_turn(picture + 3, 0, picture, 0, 5) == 3
    assert one_turn(picture, 4, None, 6, 1) == 1
    assert one_turn(None, 2, picture, 4, 1) == -5


def test_a_run_whose_axes_part_has_no_turn():
    picture = axes((5, 5, 5), (5, 5, 6), (5, 6, 5), (5, 6, 6))
    line = axes((5, 5, 5), (5, 5, 6), (5, 5, 7), (5, 5, 8))
    assert one_turn(picture, 0, line, 0, 4) is None
    assert one_turn(picture, 0, line, 0, 2) == 0
    assert one_turn(picture, 0, None, 0, 4) is None


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


def test_an_exact_prefix_stands_where_it_stood():
    keys = to_keys(range(20))
    donor = dataclasses.replace(donor_of(range(20)), positions=np.tile(np.arange(20), (3, 1)))
    plan = make_plan(keys, [donor], EAGER, np.tile(np.arange(20) + 1, (3, 1)))
    assert plan.num_exact == 0
