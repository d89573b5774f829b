"""Intervals by paired bootstrap."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from kvshare_mm.apps.bench.bootstrap import Interval, difference, draws, interval


def mean(totals: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    return totals[..., 0] / count


def test_draws_are_resamples() -> None:
    times = draws(7, 50, seed=1)
    assert times.shape == (50, 7)
    assert (times.sum(axis=1) == 7).all()
    assert len({tuple(row) for row in times}) > 40
    assert (draws(7, 50, seed=1) == times).all()
    assert (draws(7, 50, seed=2) != times).any()


def test_the_interval_of_a_mean_has_its_standard_error() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(3, 2, (400, 1))
    found = interval(mean, values, draws(400, 4000, seed=0))
    error = values.std() / 400**0.5
    assert found.estimate == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)


def test_what_is_hard_for_both_does_not_widen_the_difference() -> None:
    rng = np.random.default_rng(0)
    hard = rng.normal(0, 100, (200, 1))
    times = draws(200, 1000, seed=0)
    found = difference(mean, hard + 1, hard, times)
    assert found.estimate == pytest.approx(1)
    assert (found.low, found.high) == (pytest.approx(1), pytest.approx(1))
    assert found.excludes_zero


def test_no_difference() -> None:
    values = np.arange(10.0)[:, None]
    found = difference(mean, values, values, draws(10, 100, seed=0))
    assert found == Interval(0, 0, 0)
    assert not found.excludes_zero
    mixed = np.array([[1.0], [-1.0]] * 10)
    assert not difference(mean, mixed, np.zeros((20, 1)), draws(20, 500, seed=0)).excludes_zero


def test_intervals_as_json() -> None:
    assert Interval(1, 0.5, 2).as_json() == {"estimate": 1, "low": 0.5, "high": 2}
    assert Interval(-1, -2, -0.5).excludes_zero
