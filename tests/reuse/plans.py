"""Donors and targets for the planner, and plans in short."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from kvshare_mm.reuse.align import Match, Matcher
from kvshare_mm.reuse.plan import Donor, KeptRun, PlannerOptions, ReusePlan

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


@st.composite
def edited(draw, symbols):
    """`symbols` after a few edits: cut, insert, overwrite, move, repeat."""
    result = list(symbols)
    for _ in range(draw(st.integers(0, 4))):
        a, b = sorted(draw(st.tuples(*[st.integers(0, len(result))] * 2)))
        new = draw(st.lists(st.integers(0, 31), max_size=3))
        block, rest = result[a:b], result[:a] + result[b:]
        at = draw(st.integers(0, len(rest)))
        result = draw(
            st.sampled_from(
                [
                    rest,
                    result[:a] + new + result[a:],
                    result[:a] + new + result[b:],
                    rest[:at] + block + rest[at:],
                    result[:a] + block + result[a:],
                ]
            )
        )[:60]
    return result


@st.composite
def plans(draw):
    """Any valid plan: some exact prefix, then approximate runs with and without gaps."""
    runs, end = [], draw(st.integers(0, 6))
    if end:
        runs.append(KeptRun("a", 0, 0, end, exact=True))
    for _ in range(draw(st.integers(0, 4))):
        start = end + draw(st.integers(0, 4))
        end = start + draw(st.integers(1, 30))
        shift = draw(st.integers(-20, start))
        runs.append(
            KeptRun(draw(st.sampled_from("abc")), start - shift, start, end - start, exact=False)
        )
    return ReusePlan(end + draw(st.integers(1, 5)), tuple(runs))
