"""Plans as vLLM can carry them out: one computed prefix a request, no holes behind it."""

from __future__ import annotations

import numpy as np

from kvshare_mm.delta_tree import Span
from kvshare_mm.plan import ReusePlan


def spans_of(mask: np.ndarray) -> tuple[Span, ...]:
    """Spans of the true positions."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], mask.astype(np.int8), [0]))))
    return tuple(Span(int(a), int(b)) for a, b in edges.reshape(-1, 2))


def loadable_end(plan: ReusePlan) -> int:
    """End of the last position that is kept in the end; what is behind it stays vLLM's."""
    kept = plan.kept
    kept[plan.repair] = False
    found = np.flatnonzero(kept)
    return int(found[-1]) + 1 if len(found) else 0
