"""Donors and targets for the planner, and plans in short."""

from __future__ import annotations

import numpy as np

from kvshare_mm.reuse.align import Match, Matcher
from kvshare_mm.reuse.plan import Donor, PlannerOptions, ReusePlan

EAGER = PlannerOptions(min_run=2, min_gain_tokens=1, min_gain_share=0.0)


def to_keys(symbols) -> np.ndarray:
    return np.array(list(symbols), dtype=np.uint64)


def donor_of(symbols, donor_id="d", *, exact_len=None, readable=None, reusable=None) -> Donor:
    """By default a request that was computed in full."""
    keys = to_keys(symbols)
    readable = len(keys) if readable is None else readable
    exact_len = readable if exact_len is None else exact_len
    if reusable is None:
        reusable = np.arange(len(keys)) < exact_len
    return Donor(donor_id, keys, np.asarray(reusable, dtype=bool), readable, exact_len)


def maximal_matches(donor: np.ndarray, target: np.ndarray, min_run: int) -> list[Match]:
    """Maximal common runs, in any order, overlaps included."""
    return [Match(*row) for row in Matcher(target, [donor], min_run).matches(0).tolist()]


def blocks(*names: str, length: int = 20) -> list[int]:
    """A prompt of blocks; each name stands for its own `length` keys."""
    return [1000 * ord(name) + i for name in names for i in range(length)]


def describe(plan: ReusePlan) -> list[tuple[str, int, int, int, bool]]:
    return [tuple(r)[:5] for r in plan.runs]
