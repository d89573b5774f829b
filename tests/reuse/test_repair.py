"""Repair policies: what each one picks, and their text form."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvshare_mm.reuse.divergence import (
    FRONT,
    TAIL,
    WINDOW,
    WORD,
    risk,
    risk_within,
    stale_fronts,
)
from kvshare_mm.reuse.plan import Decline, KeptRun, ReusePlan
from kvshare_mm.reuse.repair import (
    PICTURE_KL,
    BoundaryWindow,
    MaxDivergence,
    NoRepair,
    Tail,
    Union,
    make_policy,
    repaired_plan,
)

from .plans import plans

POLICIES = [
    NoRepair(),
    BoundaryWindow(3),
    BoundaryWindow(0),
    Tail(5),
    Tail(0),
    MaxDivergence(0.01),
    MaxDivergence(0.0),
    MaxDivergence(1000.0),
    Union((BoundaryWindow(2), Tail(4))),
    *map(make_policy, ["none", "window", "tail:3", "auto", "window:2+tail:3"]),
]


@settings(max_examples=30)
@pytest.mark.parametrize("policy", POLICIES, ids=str)
@given(plan=plans())
def test_every_policy_gives_positions_of_the_prompt(policy, plan):
    positions = policy.positions(plan)
    assert positions.ndim == 1
    assert np.issubdtype(positions.dtype, np.integer)
    assert ((positions >= 0) & (positions < plan.num_tokens)).all()
    repaired = plan.with_repair(positions)
    assert repaired.num_exact == plan.num_exact
    assert 0 <= repaired.num_reused <= plan.num_reused


@given(plans(), st.integers(0, 50))
def test_windows_open_every_approximate_run_and_tails_end_the_prompt(plan, width):
    tail = Tail(width).positions(plan)
    assert tail.tolist() == list(range(max(0, plan.num_tokens - width), plan.num_tokens))
    picked = BoundaryWindow(width).positions(plan)
    both = plan.with_repair(Union((BoundaryWindow(width), Tail(width))).positions(plan)).repair
    assert set(both) == {*picked, *tail} & set(np.flatnonzero(plan.approximate))
    opened = {r.start for r in plan.runs if not r.exact and width}
    assert opened <= set(picked)
    assert len(picked) == sum(min(width, r.length) for r in plan.runs if not r.exact)
    assert plan.approximate[picked].all()


def _always(plan: ReusePlan) -> np.ndarray:
    tail = np.arange(max(0, plan.num_tokens - TAIL), plan.num_tokens)
    return np.unique(np.concatenate([tail, stale_fronts(plan)]))


@given(plans(), st.floats(0, 1e308, allow_nan=False), st.integers(0, 2**32 - 1))
def test_max_divergence_repairs_the_riskiest_and_no_more_than_it_must(plan, kl, seed):
    attention = np.random.default_rng(seed).dirichlet(np.ones(plan.num_tokens)).astype(np.float32)
    plan = replace(plan, attention=attention)
    danger = risk(plan)
    danger[_always(plan)] = 0
    picked = MaxDivergence(kl).positions(plan)
    left = np.delete(danger, picked)
    chosen = np.setdiff1d(picked, _always(plan))
    assert math.hypot(*left) <= risk_within(kl) * (1 + 1e-6) + 1e-12
    if len(chosen):
        assert danger[chosen].min() >= left.max(initial=0)
        assert math.hypot(*left, danger[chosen].min()) >= risk_within(kl) * (1 - 1e-6)


@pytest.mark.parametrize("kl", [0.0, 1.0, 1e6])
def test_the_end_of_the_prompt_and_what_follows_an_edit_are_always_repaired(kl):
    plan = ReusePlan(100, (KeptRun("a", 9, 8, 41, False), KeptRun("b", 50, 50, 49, False)))
    picked = set(MaxDivergence(kl).positions(plan).tolist())
    assert {*range(8, 8 + FRONT), *range(50, 50 + FRONT), *range(84, 100)} <= picked


# A token replaced in the middle of a long prompt, and another one further on.
SMALL_EDITS = ReusePlan(
    700,
    (
        KeptRun("a", 0, 0, 600, True),
        KeptRun("a", 601, 601, 31, False),
        KeptRun("a", 633, 633, 66, False),
    ),
)


def test_an_edited_word_is_repaired_to_its_end_as_far_as_that_is_near():
    joined = np.zeros(700, dtype=bool)
    joined[[601, 602, 603, 604, 606]] = True
    joined[633:673] = True
    plan = replace(SMALL_EDITS, joined=joined)
    picked = sorted(set(MaxDivergence(1e6).positions(plan).tolist()))
    assert picked == [*range(601, 605), *range(633, 633 + WORD), *range(684, 700)]
    runs = (SMALL_EDITS.runs[0], KeptRun("a", 601, 601, 3, False))
    cut = replace(plan, runs=runs)
    repaired = cut.with_repair(MaxDivergence(1e6).positions(cut)).repair
    assert repaired.tolist() == [601, 602, 603]


def test_behind_a_small_edit_little_is_repaired_and_behind_a_large_one_more():
    assert stale_fronts(SMALL_EDITS).tolist() == [
        *range(601, 601 + FRONT),
        *range(633, 633 + FRONT),
    ]
    prefix = KeptRun("a", 0, 0, 300, True)
    reach = []
    for left_out in (1, 5, 20, 300):
        plan = ReusePlan(700, (prefix, KeptRun("a", 300 + left_out, 300, 399, False)))
        reach.append(len(stale_fronts(plan)))
    assert reach[0] == FRONT < reach[1] < reach[2] < reach[3] == WINDOW
    short = ReusePlan(700, (prefix, KeptRun("a", 600, 300, 5, False)))
    assert stale_fronts(short).tolist() == [*range(300, 305)]


def test_a_picture_behind_an_edit_or_at_the_end_is_trusted():
    pictures = np.zeros(100, dtype=bool)
    pictures[8:30] = True
    pictures[80:92] = True
    plan = replace(ReusePlan(100, (KeptRun("a", 9, 8, 91, False),)), pictures=pictures)
    seen = {*range(8, 30), *range(80, 92)}
    for kl in (PICTURE_KL, 0.01, 1e6):
        picked = set(MaxDivergence(kl).positions(plan))
        assert not picked & seen and {*range(92, 100)} <= picked
    assert seen <= set(MaxDivergence(0.0).positions(plan))


def test_no_target_repairs_everything_and_a_loose_one_the_end_and_what_follows_edits_alone():
    plan = SMALL_EDITS
    assert set(plan.approximate.nonzero()[0]) <= set(MaxDivergence(0.0).positions(plan))
    loose = sorted(set(MaxDivergence(1e6).positions(plan).tolist()))
    assert loose == [601, 633, *range(684, 700)]


@pytest.mark.parametrize(
    ("spec", "policy"),
    [
        ("none", NoRepair()),
        ("window", BoundaryWindow(8)),
        ("window:5", BoundaryWindow(5)),
        ("window:0", BoundaryWindow(0)),
        ("tail", Tail(16)),
        ("tail:4", Tail(4)),
        ("auto", MaxDivergence(0.01)),
        ("auto:1.5", MaxDivergence(1.5)),
        ("auto:0", MaxDivergence(0.0)),
        (" window:2 + tail:4 ", Union((BoundaryWindow(2), Tail(4)))),
        (
            "auto+window:1+none",
            Union((MaxDivergence(0.01), BoundaryWindow(1), NoRepair())),
        ),
    ],
)
def test_the_text_form(spec, policy):
    assert make_policy(spec) == policy


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("+".join(["tail"] * 9), "at most 8"),
        ("", "'' is none of none, window, tail, auto"),
        ("best", "'best' is none of"),
        ("window:3+", "'' is none of"),
        ("Window:3", "'Window' is none of"),
        ("window:x", "window:x"),
        ("window:1.5", "window:1.5"),
        ("window:-1", "window:-1"),
        ("tail:many", "tail:many"),
        ("tail:-2", "tail:-2"),
        # Each of these would else fail a request, long after it was set.
        ("auto:-1", "auto:-1"),
        ("auto:nan", "auto:nan"),
        ("auto:inf", "auto:inf"),
        ("none:4", "none:4"),
        ("tail:4+window:x", "window:x"),
    ],
)
def test_a_wrong_text_form_is_refused_by_name(spec, says):
    with pytest.raises(ValueError, match="repair policy") as error:
        make_policy(spec)
    assert says in str(error.value)


@pytest.mark.parametrize("behind", [0, 7])
def test_the_prompts_end_is_repaired_even_in_a_picture_behind_the_question(behind):
    plan = replace(edited_plan(), pictures=np.arange(100) < 100 - behind)
    assert MaxDivergence(0.01).positions(plan).tolist() == list(range(84, 100))


def edited_plan() -> ReusePlan:
    """A hundred positions behind ten that changed."""
    return ReusePlan(
        100,
        (KeptRun("d", 10, 10, 89, exact=False),),
        attention=np.full(100, 0.01, np.float32),
    )


def test_a_plan_that_keeps_little_in_the_end_keeps_nothing():
    prefix = KeptRun("a", 0, 0, 10, True)
    for kept in (8, 15, 16, 40):
        plan = ReusePlan(10 + 1 + kept + 16, (prefix, KeptRun("a", 11, 11, kept, False)))
        left = repaired_plan(plan, NoRepair())
        assert left.num_reused == (kept if kept >= 16 else 0)
        assert left.declined == (None if kept >= 16 else Decline.DIVERGENCE)
        assert left.num_exact == 10
