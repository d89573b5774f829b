"""What of a run's context is another, what is risked by it, and where a prompt's end looks."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvshare_mm.reuse import context, divergence
from kvshare_mm.reuse.context import changed_context
from kvshare_mm.reuse.divergence import (
    divergence_bound,
    looked_at,
    residual_risk,
    risk,
    risk_within,
)
from kvshare_mm.reuse.plan import Donor, KeptRun, ReusePlan
from kvshare_mm.reuse.planner import make_plan

from .plans import EAGER, blocks, to_keys

# -- what of a run's context is another: against sets of tokens, one position after the other ------


def slow(plan: ReusePlan) -> np.ndarray:
    """Plans of one donor, by the definition."""
    source = {}
    for run in plan.runs:
        source |= {run.start + i: run.donor_start + i for i in range(run.length)}
    found = np.zeros(plan.num_tokens)
    for run in plan.runs:
        if run.exact:
            continue
        for i in range(run.start, run.end):
            j = source[i]
            read = {t for t in range(i) if t in source and source[t] < j}
            had = {source[t] for t in read}
            new = sum(np.log1p(i - t) - np.log(i - t) for t in range(i) if t not in read)
            missing = sum(np.log1p(j - t) - np.log(j - t) for t in range(j) if t not in had)
            shares = [part / np.log1p(at) for part, at in ((new, i), (missing, j)) if at]
            found[i] = max(shares, default=0.0)
    return found


@st.composite
def edits(draw):
    """A prompt in blocks, and the same with blocks moved, replaced, left out and put in."""
    sizes = draw(st.lists(st.integers(4, 12), min_size=2, max_size=6))
    token = iter(range(10_000))
    blocks = [[next(token) for _ in range(size)] for size in sizes]
    target = draw(st.permutations(blocks)) if draw(st.booleans()) else list(blocks)
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(target) - 1))
        new = [next(token) for _ in range(draw(st.integers(0, 6)))]
        target[at : at + draw(st.integers(0, 1))] = [new]
    flat = [list(itertools.chain(*side)) for side in (blocks, target)]
    return [np.array([*tokens, 10_000 + i], np.uint64) for i, tokens in enumerate(flat)]


@given(edits())
def test_it_is_what_the_sets_of_tokens_say(pair):
    donor, target = pair
    m = len(donor)
    plan = make_plan(target, [Donor("d", donor, np.ones(m, bool), m, m)], EAGER)
    assert changed_context(plan) == pytest.approx(slow(plan))


def test_edits_far_away_are_counted_as_if_they_were_spread_evenly():
    r = random.Random(1)
    runs, end = [KeptRun("d", 0, 0, 20, True)], 20
    for _ in range(200):
        start = end + r.randint(1, 3)
        runs.append(KeptRun("d", start, start, r.randint(4, 20), False))
        end = runs[-1].end
    plan = ReusePlan(end + 5, tuple(runs))
    found, whole = changed_context(plan), slow(plan)
    assert found[:end] == pytest.approx(whole[:end], rel=0.02)
    assert not np.array_equal(found, whole)
    assert len(runs) > 4 * context._NEAREST


def test_what_a_donor_cannot_give_is_no_edit_to_what_it_gives_behind():
    runs = (KeptRun("d", 0, 0, 20, True), KeptRun("d", 25, 25, 30, False))
    plan = ReusePlan(60, runs)
    assert changed_context(plan)[25:55].all()
    unedited = np.zeros(60, bool)
    unedited[20:25] = True
    assert not changed_context(replace(plan, unedited=unedited)).any()


def test_a_plan_remembers_it_as_long_as_its_runs_are_the_same() -> None:
    runs = (KeptRun("a", 0, 0, 10, True), KeptRun("a", 12, 13, 20, False))
    plan = ReusePlan(40, runs)
    found = changed_context(plan)
    assert found.any()
    assert changed_context(plan) is found
    assert changed_context(plan.with_repair(np.array([15]))) is found
    assert not changed_context(replace(plan, runs=runs[:1])).any()
    with pytest.raises(ValueError, match="read-only"):
        found[0] = 1


def test_what_stands_before_a_run_once_in_the_donor_counts_once() -> None:
    """In text that repeats itself a donor's position may be kept for several of the target."""

    def changed(*runs: KeptRun) -> float:
        return changed_context(ReusePlan(100, runs))[runs[-1].start]

    prefix = KeptRun("a", 0, 0, 20, True)
    last = KeptRun("a", 30, 50, 40, False)
    new = np.log(31 / 1) / np.log(51)  # 20..50 of the target is nothing of the donor's
    assert changed(prefix, last) == pytest.approx(new)
    # The prefix again.
    assert changed(prefix, KeptRun("a", 5, 20, 15, False), last) == pytest.approx(new)
    # The run itself, before it.
    assert changed(prefix, KeptRun("a", 32, 20, 20, False), last) == pytest.approx(new)
    # Twice the same ten that stand between prefix and run.
    once = changed(prefix, KeptRun("a", 20, 20, 10, False), last)
    assert once == pytest.approx(np.log(21 / 1) / np.log(51))
    ten = KeptRun("a", 20, 40, 10, False)
    again = changed(prefix, KeptRun("a", 20, 20, 10, False), ten, last)
    assert again == pytest.approx(once)
    # What reaches into the run counts up to there.
    cut = changed(prefix, KeptRun("a", 25, 35, 15, False), last)
    assert cut == pytest.approx(np.log(31 / 16 * 11) / np.log(51))


# -- risk of reuse: attention of the prompt's end times the drift that edits cause -----------------


def test_by_hand():
    # Four tokens of ten replaced, then two kept, and one more put in before the last kept ones.
    attention = np.linspace(0.05, 0.2, 10)
    runs = (KeptRun("a", 4, 4, 2, False), KeptRun("a", 6, 7, 2, False))
    plan = ReusePlan(10, runs, attention=attention)
    seen = np.log1p([4, 5, 7, 8])
    changed = [
        1,
        (np.log(6) - np.log(2)) / seen[1],
        (np.log(8) - np.log(4) + np.log(2)) / seen[2],
        (np.log(9) - np.log(5) + np.log(3) - np.log(2)) / seen[3],
    ]
    want = np.zeros(10)
    looked = np.sqrt(attention**2 + divergence.THROUGH_OTHERS / 10)
    want[[4, 5, 7, 8]] = looked[[4, 5, 7, 8]] * np.array(changed)
    assert risk(plan) == pytest.approx(want)


def test_what_nobody_looks_at_counts_by_its_share_of_a_prompt_however_long():
    def worth(n: int, moved: int) -> float:
        drift = np.where(np.arange(n) < moved, 0.3, 0.0)
        return float(np.sqrt(np.square(looked_at(drift, np.zeros(n), n)).sum()))

    assert worth(4000, 2000) == pytest.approx(worth(100, 50))
    assert worth(4000, 4000) > worth(4000, 40) > 0


def test_what_is_repaired_is_no_risk_any_more_and_the_rest_adds_up_as_squares():
    plan = ReusePlan(10, (KeptRun("a", 4, 4, 4, False),), attention=np.full(10, 0.1))
    danger = risk(plan)
    assert residual_risk(plan) == pytest.approx(np.sqrt((danger**2).sum()))
    repaired = replace(plan, repair=np.array([4, 6]))
    assert residual_risk(repaired) == pytest.approx(np.hypot(danger[5], danger[7]))
    assert residual_risk(replace(plan, repair=np.arange(4, 8))) == 0


@given(st.floats(1e-9, 10))
def test_the_bound_and_its_inverse(kl):
    assert divergence_bound(risk_within(kl)) == pytest.approx(kl)


# -- where a prompt's end looks, told from where its donors' ends looked ---------------------------


def attention_of(target: list[int], donor: list[int], known: int | None = None) -> np.ndarray:
    keys = to_keys(donor)
    n = len(keys)
    attention = np.linspace(0.01, 0.02, n).astype(np.float32)[:known]
    plan = make_plan(to_keys(target), [Donor("d", keys, np.ones(n, bool), n, n, attention)], EAGER)
    assert plan.attention is not None
    return plan.attention


def test_what_stands_as_far_from_the_end_is_looked_at_as_before():
    found = attention_of([*blocks("X"), *blocks(*"BCD"), 0], [*blocks("A"), *blocks(*"BCD"), 1])
    assert found[20:80] == pytest.approx(np.linspace(0.01, 0.02, 81)[20:80], rel=1e-5)


def test_what_moved_to_the_end_is_looked_at_more_and_what_moved_away_less():
    found = attention_of([*blocks(*"BCDA"), 0], [*blocks(*"ABCD"), 1])
    before = np.linspace(0.01, 0.02, 81)
    assert found[60] == pytest.approx(before[0] * np.sqrt(81 / 21), rel=1e-5)
    assert found[0] == pytest.approx(before[20] * np.sqrt(61 / 81), rel=1e-5)


def test_what_a_donor_answered_is_looked_at_as_anything():
    """The answer behind a donor's prompt was looked at by nobody that was asked."""
    found = attention_of([*blocks("X"), *blocks(*"BCD"), 0], [*blocks("A"), *blocks(*"BCD"), 1], 40)
    assert found[40:80] == pytest.approx(1 / 81)
    assert (found[20:40] != np.float32(1 / 81)).all()
    moved = attention_of([*blocks(*"DBC"), 0], [*blocks(*"ABCD"), 1], 10)
    assert moved == pytest.approx(1 / 61)
