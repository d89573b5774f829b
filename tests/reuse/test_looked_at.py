"""Where a prompt's end looks, told from where its donors' ends looked."""

from __future__ import annotations

import numpy as np
import pytest

from kvshare_mm.reuse.plan import Donor
from kvshare_mm.reuse.planner import make_plan

from .plans import EAGER, blocks, to_keys


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
