"""Confidence intervals of a score, and of the difference of two, by paired bootstrap.

Every resample draws the same items for both systems (Koehn 2004, "Statistical significance tests
for machine translation evaluation"), so what makes an item hard for both does not widen the
interval.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Score = Callable[[NDArray[np.float64], int], NDArray[np.float64]]


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and the bounds of its percentile interval."""

    estimate: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0

    def as_json(self) -> dict[str, float]:
        return {"estimate": self.estimate, "low": self.low, "high": self.high}


def draws(items: int, resamples: int, seed: int) -> NDArray[np.float64]:
    """``[resamples, items]``: how often each resample has each item."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(items, np.full(items, 1 / items), resamples).astype(float)


def interval(
    score: Score,
    statistics: NDArray[np.float64],
    times: NDArray[np.float64],
    confidence: float = 0.95,
) -> Interval:
    """The interval of one system's score.

    Args:
        score: from statistics summed over items, ``[..., dim]``, and the number of items.
        statistics: ``[items, dim]``.
        times: from `draws`.
        confidence: of the interval.
    """
    items = len(statistics)
    return _bounded(
        float(score(statistics.sum(0), items)), score(times @ statistics, items), confidence
    )


def difference(
    score: Score,
    statistics: NDArray[np.float64],
    baseline: NDArray[np.float64],
    times: NDArray[np.float64],
    confidence: float = 0.95,
) -> Interval:
    """The paired interval of a system's score minus the baseline's; arguments as of `interval`."""
    items = len(statistics)
    estimate = score(statistics.sum(0), items) - score(baseline.sum(0), items)
    resampled = score(times @ statistics, items) - score(times @ baseline, items)
    return _bounded(float(estimate), resampled, confidence)


def _bounded(estimate: float, resampled: NDArray[np.float64], confidence: float) -> Interval:
    tail = (1 - confidence) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return Interval(estimate, float(low), float(high))
