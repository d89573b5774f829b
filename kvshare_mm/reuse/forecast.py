"""What the next score of a family is like before it is seen: a random effects model.

Scores are taken as normal, with a mean for each family that varies around that of its namespace. A
family with many scores speaks for itself; one with few is told what the others teach, and how
unlike each other they are. Where nothing was seen, there is a prior.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

# Standard deviation of scores within a family and of the families' means, and so many scores' worth
# that is.
_SPREAD, _APART, _TRUST = 1.5, 1.5, 4


def _student(freedom: float) -> float:
    """About the 95% quantile of Student's t."""
    return 1.645 + 1.52 / freedom


# The mean of a family that nobody has seen: such that the constants hold as they are.
_MEAN = -_student(_TRUST) * math.sqrt(_SPREAD**2 + 2 * _APART**2)


class Forecast(NamedTuple):
    """What is known of the families of a namespace.

    Attributes:
        mean: of the families' means.
        apart: their variance.
        spread: variance within a family.
        families: so many were seen.
    """

    mean: float
    apart: float
    spread: float
    families: int

    @classmethod
    def of(cls, seen: Iterable[Sequence[float]]) -> Forecast:
        """Args: the scores of each family that has any."""
        families = [np.array(scores) for scores in seen]
        means = np.array([scores.mean() for scores in families])
        # One family that nobody has seen stands for what is not known of the others.
        mean = (_MEAN + means.sum()) / (1 + len(means))
        apart = (_TRUST * _APART**2 + np.square(means - mean).sum()) / (_TRUST + len(means))
        within = sum(float(np.square(s - m).sum()) for s, m in zip(families, means, strict=True))
        freedom = sum(len(scores) - 1 for scores in families)
        spread = (_TRUST * _SPREAD**2 + within) / (_TRUST + freedom)
        return cls(float(mean), float(apart), spread, len(means))

    def quantile(self, scores: Sequence[float]) -> float:
        """What the next score of a family with these stays below in 95% of the cases."""
        if scores:
            own = np.array(scores)
            worth = self.spread / self.apart  # so many scores tell as much as the other families
            centre = (worth * self.mean + own.sum()) / (worth + len(own))
            square = _TRUST * self.spread + float(np.square(own - own.mean()).sum())
            freedom = _TRUST + len(own) - 1
            variance = square / freedom * (1 + 1 / (worth + len(own)))
        else:
            centre, freedom = self.mean, _TRUST + self.families
            variance = self.spread + self.apart * (1 + 1 / (1 + self.families))
        return float(centre + _student(freedom) * math.sqrt(variance))
