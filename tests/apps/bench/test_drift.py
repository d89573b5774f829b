"""CacheBlend's choice of repairs, as the bench measures it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvshare_mm.apps.bench.drift import TopDeviation, measuring_policies
from kvshare_mm.reuse.plan import KeptRun, ReusePlan
from kvshare_mm.reuse.repair import Tail, Union, make_policy

PLAN = ReusePlan(
    40, (KeptRun("a", 0, 0, 4, True), KeptRun("a", 9, 8, 12, False), KeptRun("b", 0, 24, 10, False))
)


class Measured:
    """Drift that was set by hand; remembers which layers were asked for."""

    def __init__(self, drift: np.ndarray) -> None:
        self.drift = drift.astype(np.float32)
        self.asked: list[int] = []

    def __call__(self, plan: ReusePlan, layer: int) -> np.ndarray:
        self.asked.append(layer)
        return self.drift


@given(st.floats(0, 1), st.integers(0, 12), st.integers(0, 2**16))
def test_those_that_drifted_most_are_picked_and_no_more(share: float, tail: int, seed: int) -> None:
    drift = np.random.default_rng(seed).random(40) + 0.1
    measured = Measured(np.where(PLAN.approximate, drift, 0))
    policy = TopDeviation(measured, share, layer=3, tail=tail)
    picked = PLAN.with_repair(policy.positions(PLAN)).repair
    approximate = np.flatnonzero(PLAN.approximate)
    in_tail = approximate[approximate >= 40 - tail]
    assert np.isin(in_tail, picked).all()
    assert len(picked) <= math.ceil(share * len(approximate)) + len(in_tail)
    chosen = picked[~np.isin(picked, in_tail)]
    left = np.setdiff1d(approximate, picked)
    if len(chosen) and len(left):
        assert measured.drift[chosen].min() >= measured.drift[left].max()
    assert measured.asked == ([3] if share else [])


@pytest.mark.parametrize("plan", [ReusePlan(7), ReusePlan(7, (KeptRun("a", 0, 0, 6, True),))])
def test_nothing_is_measured_where_nothing_is_approximate(plan: ReusePlan) -> None:
    measured = Measured(np.zeros(7))
    assert not plan.with_repair(TopDeviation(measured).positions(plan)).repair.size
    assert measured.asked == []


def test_in_words() -> None:
    measured = Measured(np.zeros(1))
    known = measuring_policies(measured)
    assert make_policy("deviation", known) == TopDeviation(measured, 0.15)
    assert make_policy("tail:8+deviation:0.2", known) == Union(
        (Tail(8), TopDeviation(measured, 0.2))
    )


@pytest.mark.parametrize("argument", ["a", "1.5", "-0.1", "nan", "inf"])
def test_shares_that_are_none(argument: str) -> None:
    known: Any = measuring_policies(Measured(np.zeros(1)))
    with pytest.raises(ValueError, match=f"deviation:{argument}"):
        make_policy(f"deviation:{argument}", known)
