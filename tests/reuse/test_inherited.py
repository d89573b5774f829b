"""What a request inherits of the approximation in its donors, and how much of it it takes over."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvshare_mm.reuse.divergence import (
    FRONT,
    TAIL,
    WINDOW,
    as_risky_as,
    drift,
    passed_on,
    residual_risk,
    risk,
    risk_within,
    riskiest,
    stale_fronts,
)
from kvshare_mm.reuse.plan import Decline, Donor, KeptRun, PlannerOptions, ReusePlan, Tolerance
from kvshare_mm.reuse.planner import make_plan
from kvshare_mm.reuse.repair import RepairPolicy, make_policy, repaired_plan
from kvshare_mm.reuse.tree import DeltaTree

from .plans import EAGER, blocks, donor_of, to_keys

SPECS = ["none", "window:2", "tail:4", "auto:0", "auto:0.001", "auto:0.01", "auto:1", "auto+tail:3"]


def served(tree: DeltaTree, target: np.ndarray, policy: RepairPolicy) -> ReusePlan:
    """Plan a request of a tree from all its nodes, the newest first."""
    donors = [tree.donor(node.node_id) for node in tree][::-1]
    options = replace(EAGER, tolerance=policy.tolerance)
    return repaired_plan(make_plan(target, donors, options), policy)


def store(tree: DeltaTree, name: str, keys: np.ndarray, plan: ReusePlan) -> None:
    tree.insert(tree.derive(name, "ns", keys, plan, 0.0))


@pytest.fixture
def sloppy() -> tuple[DeltaTree, np.ndarray]:
    """A tree of a request, and of one like it that was served without repairs."""
    tree = DeltaTree()
    store(tree, "first", to_keys(blocks(*"ABCD")), ReusePlan(80))
    keys = to_keys([*blocks("A"), 1, 2, 3, *blocks(*"CD"), 9])
    plan = served(tree, keys, make_policy("none"))
    assert plan.num_exact == 20 and plan.num_reused == 40
    store(tree, "sloppy", keys, plan)
    return tree, keys


def test_what_was_not_repaired_behind_an_edit_and_at_the_end_is_not_trusted():
    plan = ReusePlan(60, (KeptRun("d", 0, 0, 10, True), KeptRun("d", 12, 15, 44, False)))
    found = passed_on(plan)
    assert found is not None and found.dtype == np.float16
    assert not found[:15].any() and found[59] == 0
    front = len(stale_fronts(plan))
    assert FRONT < front < WINDOW
    assert np.isinf(found[15 : 15 + front]).all() and np.isinf(found[60 - TAIL : 59]).all()
    middle = found[15 + front : 60 - TAIL]
    assert (middle > 0).all() and np.isfinite(middle).all()
    repaired = passed_on(replace(plan, repair=np.array([15, 20, *range(44, 59)])))
    assert repaired is not None
    assert repaired[[15, 20, 44, 58]].tolist() == [0, 0, 0, 0]
    assert np.isinf(repaired[16])


def test_of_computed_and_exact_positions_nothing_is_passed_on():
    assert passed_on(ReusePlan(9)) is None
    assert passed_on(ReusePlan(9, (KeptRun("d", 0, 0, 8, True),))) is None
    whole = ReusePlan(9, (KeptRun("d", 2, 1, 4, False),), repair=np.arange(1, 5))
    assert passed_on(whole) is None


def test_no_drift_is_too_small_to_be_kept():
    n = 3_000_000
    plan = ReusePlan(n, (KeptRun("d", 0, 0, 10, True), KeptRun("d", 11, 10, n - 11, False)))
    assert drift(plan)[n - 100] < 3e-8
    found = passed_on(plan)
    assert found is not None
    assert (found[10 : n - 1] > 0).all()


@pytest.mark.parametrize("spec", ["auto:0", "auto:0.000001", "auto:0.01", "window:8"])
def test_a_sloppy_request_repeated_by_a_stricter_one_is_planned_anew(sloppy, spec):
    tree, keys = sloppy
    policy = make_policy(spec)
    fresh = DeltaTree()
    store(fresh, "first", to_keys(blocks(*"ABCD")), ReusePlan(80))
    for target in (keys, np.concatenate((keys, to_keys(range(500, 530))))):
        plan, without = served(tree, target, policy), served(fresh, target, policy)
        assert not plan.continued.any()
        assert plan.num_exact >= without.num_exact
        # Nothing is reused that would not be if the sloppy request had never been.
        assert not (plan.reused & ~without.reused).any()


def test_a_donor_is_continued_as_far_as_its_risk_is_tolerated():
    donor = donor_of(blocks(*"ABC"), exact_len=20)
    uneven = np.zeros(60, np.float32)
    uneven[[25, 40, 50]] = 0.3, 0.4, 0.1
    donor = replace(donor, drift=uneven, attention=np.full(60, 0.5, np.float32))
    target = to_keys(blocks(*"ABC"))

    def reach(risk: float) -> int:
        plan = make_plan(target, [donor], replace(EAGER, tolerance=Tolerance(risk)))
        return plan.runs[-1].end

    assert [reach(r) for r in (0.0, 0.149, 0.151, 0.249, 0.251, 0.26)] == [25, 25, 40, 40, 50, 59]


def test_a_donor_that_looks_nowhere_is_not_trusted_where_it_was_not_repaired():
    donor = donor_of(blocks(*"AB"), exact_len=20)
    stale = np.zeros(40, np.float32)
    stale[30] = np.inf
    donor = replace(donor, drift=stale, attention=np.zeros(40, np.float32))
    target = to_keys([*blocks(*"AB"), 0])
    options = replace(EAGER, tolerance=Tolerance(1e30))
    assert make_plan(target, [donor], options).runs[-1].end == 30
    assert make_plan(target, [donor], EAGER).runs[-1].end == 40


def test_who_tolerates_nothing_reuses_nothing_though_nothing_looks_at_it():
    plan = ReusePlan(60, (KeptRun("d", 0, 0, 10, True), KeptRun("d", 12, 15, 44, False)))
    plan = replace(plan, attention=np.zeros(60, np.float32))
    assert not plan.with_repair(make_policy("auto:0").positions(plan)).num_reused


def test_what_a_shorter_prompt_continues_is_within_what_it_tolerates():
    """Where the end is nearer, it looks at the same positions more."""
    n, cut = 1000, 700
    keys = to_keys(list(range(1, n + 1)))
    drift_there = np.zeros(n, np.float32)
    drift_there[600:680] = 0.1
    uniform = np.full(n, 1 / n, np.float32)
    nothing = np.zeros(n, dtype=bool)
    donor = Donor("d", keys, nothing, n, 0, attention=uniform, drift=drift_there)
    target = np.append(keys[:cut], to_keys([5000]))
    for risk_there in (0.5, 0.9, 1.1, 3.0):
        limit = risk_there * 0.1 / n * np.sqrt(80)
        options = replace(EAGER, tolerance=Tolerance(limit))
        plan = make_plan(target, [donor], options)
        assert residual_risk(plan) <= limit * 1.001
        assert plan.continued.sum() == (cut if risk_there == 3.0 else plan.continued.sum()) >= 600


def test_why_a_request_that_could_continue_another_one_does_not():
    donor = replace(donor_of(blocks(*"AB"), exact_len=0), drift=np.ones(40, np.float32))
    options = replace(PlannerOptions(), tolerance=Tolerance(0.0))
    plan = make_plan(to_keys(blocks(*"AB")), [donor], options)
    assert plan.runs == ()
    assert plan.declined is Decline.DIVERGENCE


def test_pictures_count_as_exact_for_those_who_trust_them_only():
    pictures = np.arange(41) >= 20
    donor = replace(donor_of(blocks(*"AB"), exact_len=20), drift=np.where(pictures[:40], 9.0, 0))
    target = to_keys([*blocks(*"AB"), 0])
    for trusted in (True, False):
        options = replace(EAGER, tolerance=Tolerance(0.1, pictures=trusted))
        plan = make_plan(target, [donor], options, pictures=pictures)
        assert plan.runs[-1].end == (40 if trusted else 20)
    # What was always to be repaired and was not is no picture's affair.
    stale = replace(donor, drift=np.where(np.arange(40) == 30, np.inf, 0))
    options = replace(EAGER, tolerance=Tolerance(0.1))
    assert make_plan(target, [stale], options, pictures=pictures).runs[-1].end == 30


def test_a_picture_that_may_have_read_a_question_is_passed_on_as_stale():
    """Where the question stands before the picture, the prompt's end has read it."""
    runs = (KeptRun("d", 0, 0, 10, True), KeptRun("d", 12, 15, 84, False))
    behind = ReusePlan(100, runs, pictures=(np.arange(100) >= 30) & (np.arange(100) < 90))
    found = passed_on(behind)
    assert found is not None
    assert np.isfinite(found[30:90]).all() and np.isinf(found[90:99]).all()
    before = passed_on(replace(behind, pictures=np.arange(100) >= 30))
    assert before is not None
    assert np.isfinite(before[30 : 100 - TAIL]).all() and np.isinf(before[100 - TAIL : 99]).all()


def test_what_was_computed_behind_stale_kv_stays_so_behind_an_exact_prefix(sloppy):
    """Its own drift is none, but it has read what the other donor's prefix takes the place of."""
    tree, prompt = sloppy
    answered = np.concatenate((prompt, to_keys(range(700, 720))))
    plan = served(tree, prompt, make_policy("none"))
    store(tree, "answered", answered, plan)
    store(tree, "exact", prompt, ReusePlan(len(prompt)))
    asked = np.concatenate((answered, to_keys([7, 8])))
    taken = served(tree, asked, make_policy("none"))
    assert taken.num_exact == len(prompt) and taken.continued[len(prompt) : len(answered)].all()
    store(tree, "laundered", asked, taken)
    for spec in ("auto:0", "auto:0.01"):
        strict = served(tree, np.concatenate((asked, to_keys([9]))), make_policy(spec))
        assert strict.num_exact >= len(prompt) and not strict.num_reused


def test_what_is_continued_behind_another_donors_prefix_is_tolerated_as_what_it_read():
    """The worst of a donor stands where another one's prefix takes its place, and was read."""
    keys = blocks(*"ABC")
    drift = np.full(60, np.float32(1e-3))
    drift[3] = 0.5
    loose = replace(donor_of(keys, "loose", exact_len=0), drift=drift)
    exact = donor_of(blocks(*"AX"), "exact")
    target, options = to_keys([*keys, 0]), replace(EAGER, tolerance=Tolerance(0.05))
    plan = make_plan(target, [loose, exact], options)
    first, then = plan.runs
    assert (first.donor, first.end, then.donor, then.continued) == ("exact", 20, "loose", True)
    assert plan.inherited is not None and plan.inherited[20 : then.end] == pytest.approx(0.5)
    assert then.end < 60 and 0.04 < residual_risk(plan) <= 0.05


def test_stale_stays_stale_at_no_risk_and_what_is_no_number_is_trusted_by_nobody():
    stale = np.array([0.0, np.inf, 0.5], np.float32)
    found = as_risky_as(stale, np.ones(3, np.float32), 0.0)
    assert found[0] == 0 and np.isinf(found[1]) and 0 < found[2] < 1e-6
    danger = np.array([0.1, np.nan, 0.2, 0.0])
    assert 1 in riskiest(danger, 0.5, np.zeros(4, dtype=bool))
    donor = replace(donor_of(blocks(*"AB"), exact_len=20), drift=np.full(40, np.nan, np.float32))
    options = replace(EAGER, tolerance=Tolerance(1e30))
    assert make_plan(to_keys([*blocks(*"AB"), 0]), [donor], options).runs[-1].end == 20


def test_a_request_that_looked_elsewhere_than_was_guessed_is_as_good_as_it_was_found():
    """Where a request looks is known only when it was computed."""
    tree = DeltaTree()
    store(tree, "first", to_keys(blocks(*"ABCDEF")), ReusePlan(120))
    keys = to_keys([*blocks("A"), 1, *blocks(*"CDEF"), 9])
    policy = make_policy("auto:1")
    plan = served(tree, keys, policy)
    assert plan.num_reused > 40
    attention = np.where(plan.reused, 5 / len(keys), 0).astype(np.float32)
    tree.insert(tree.derive("second", "ns", keys, plan, 0.0, attention))
    assert tree["second"].risk == pytest.approx(residual_risk(plan))
    again = served(tree, np.concatenate((keys, to_keys([7]))), policy)
    assert again.num_computed == 1
    assert residual_risk(again) <= residual_risk(plan) * (1 + 1e-3)
    # Of what it was made with no more is tolerated than before.
    stricter = served(tree, np.concatenate((keys, to_keys([7]))), make_policy("auto:0.1"))
    assert residual_risk(stricter) <= risk_within(0.1) * (1 + 1e-3)


def test_drift_adds_to_what_was_inherited():
    plan = ReusePlan(60, (KeptRun("d", 0, 0, 10, True), KeptRun("d", 12, 15, 44, False)))
    inherited = np.full(60, 0.25, np.float32)
    both = drift(replace(plan, inherited=inherited))
    assert both[15:59] == pytest.approx(drift(plan)[15:59] + 0.25)
    assert not both[:15].any()


def test_what_a_donor_computed_itself_is_no_edit_where_it_stands_the_same():
    """Of a request that was edited from another one, its placeholders cannot be had."""
    reusable = np.ones(60, bool)
    reusable[20:25] = False
    donor = donor_of(blocks(*"ABC"), exact_len=20, reusable=reusable)
    donor = replace(donor, drift=np.where(np.arange(60) < 25, 0, 0.1))
    # Behind an edit of its own at the very beginning.
    target = to_keys([7, 8, *blocks(*"ABC")[2:], 0])
    plan = make_plan(target, [donor], EAGER)
    assert [(r.start, r.end) for r in plan.runs] == [(2, 20), (25, 60)]
    behind = drift(plan)[25:60]
    at = np.arange(25, 60)
    assert behind == pytest.approx(0.1 + 1 - np.log(at - 1) / np.log1p(at))


def test_the_prefix_of_another_donor_counts_as_far_as_ones_own_donor_lacks_it():
    """The edit may stand in what is exact: to who was edited from, it is one all the same."""
    first = donor_of(blocks(*"ABC"), "first")
    other = donor_of([*blocks("A"), 1, 2, 3, *blocks("B")[3:], *blocks("X")], "other", exact_len=30)
    other = replace(other, drift=np.where(np.arange(60) < 30, 0, np.float32(np.inf)))
    target = to_keys([*blocks("A"), 1, 2, 3, *blocks("B")[3:], *blocks("C"), 0])
    plan = make_plan(target, [other, first], replace(EAGER, tolerance=Tolerance(0.1)))
    exact, run = plan.runs
    assert (exact.donor, exact.end, run.donor, run.start) == ("other", 30, "first", 30)
    assert run.foreign == 3
    assert drift(plan)[30] == pytest.approx(np.log(4) / np.log(31))
    assert {30, 31} <= set(make_policy("auto:1").positions(plan).tolist())


def test_an_edit_that_another_donor_fills_is_one_to_the_first():
    runs = (
        KeptRun("a", 0, 0, 20, True),
        KeptRun("a", 24, 24, 16, False),
        KeptRun("b", 40, 40, 10, False),
        KeptRun("a", 50, 50, 39, False),
    )
    filled = drift(ReusePlan(90, runs))
    empty = drift(ReusePlan(90, (*runs[:2], runs[3])))
    assert filled[50:89] == pytest.approx(empty[50:89])
    assert filled[50] == pytest.approx(np.log(31 / 27 * 11) / np.log(51))


def test_a_donor_that_fills_a_gap_does_not_make_others_more_foreign():
    runs = (
        KeptRun("a", 0, 0, 100, True),
        KeptRun("b", 100, 100, 5, False, foreign=100),
        KeptRun("a", 100, 105, 90, False),
    )
    found = drift(ReusePlan(200, runs))
    assert found[100] == pytest.approx(1)
    assert found[105] == pytest.approx(np.log(6) / np.log(106))


@st.composite
def histories(draw):
    """Requests that are edits or extensions of one another, with the policies of each."""
    alphabet = draw(st.sampled_from([6, 1000]))
    symbols = st.integers(0, alphabet - 1)
    prompts = [draw(st.lists(symbols, min_size=30, max_size=60))]
    for _ in range(draw(st.integers(1, 7))):
        base = list(draw(st.sampled_from(prompts)))
        for _ in range(draw(st.integers(0, 2))):
            a = draw(st.integers(0, len(base)))
            base[a : a + draw(st.integers(0, 4))] = draw(st.lists(symbols, max_size=4))
        base += draw(st.lists(symbols, max_size=20))
        prompts.append(base if len(base) > 20 else prompts[0])
    return [(p, draw(st.sampled_from(SPECS))) for p in prompts]


@settings(max_examples=200)
@given(histories(), st.integers(0, 3))
def test_nobody_reads_what_is_looser_than_they_asked_for(history, answer):
    """Over any history of careless and careful requests."""
    tree = DeltaTree()
    for i, (prompt, spec) in enumerate(history):
        target, policy = to_keys(prompt), make_policy(spec)
        plan = served(tree, target, policy)
        left = risk(plan)
        left[plan.repair] = 0
        residual = float(np.sqrt(np.square(left).sum()))
        if spec.startswith("auto"):
            assert residual <= policy.tolerance.risk * (1 + 1e-3)
        if spec == "auto:0":
            assert not plan.num_reused
        if plan.inherited is not None and plan.attention is not None:
            old = plan.inherited.astype(float)
            old[plan.repair] = 0
            taken = np.sqrt(np.square(old * plan.attention)[np.isfinite(old)].sum())
            assert taken <= policy.tolerance.risk * (1 + 1e-3)
            assert spec == "none" or not np.isinf(old).any()
        keys = to_keys([*prompt, *range(2000, 2000 + answer)])
        store(tree, f"n{i}", keys, plan)
        node = tree[f"n{i}"]
        reused = plan.reused
        if node.drift is None:
            assert not reused.any()
        else:
            # Zero only where it was computed, by itself or by the one that it continues.
            assert not node.drift[~reused].any()
            assert (node.drift[reused & ~plan.continued] > 0).all()
        assert node.exact_len >= plan.num_exact
        assert not reused[: node.exact_len].any()


@pytest.mark.parametrize(
    ("spec", "kl"),
    [("window:3", 0.01), ("auto:0.5", 0.5), ("auto:0.5+tail", 0.01)],
)
def test_how_approximate_a_donor_may_be(spec, kl):
    assert make_policy(spec).tolerance.risk == pytest.approx(risk_within(kl))
    assert make_policy("none").tolerance == Tolerance()
    assert not make_policy("auto:0.0001").tolerance.pictures
    assert not make_policy("auto:0.0001+none").tolerance.pictures
