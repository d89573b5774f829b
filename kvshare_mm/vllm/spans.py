"""Plans as vLLM can carry them out: one computed prefix a request, no holes behind it, and no
picture in what a load computes, because vLLM's encoder does not run for it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from kvshare_mm.node import Piece, Span
from kvshare_mm.reuse.plan import ReusePlan
from kvshare_mm.stream import Segment


def kept_in_the_end(plan: ReusePlan) -> np.ndarray:
    """``[num_tokens]`` bool: positions that take their KV from donors, repaired ones not."""
    kept = plan.kept
    kept[plan.repair] = False
    return kept


def loadable_end(plan: ReusePlan, local: int = 0, media: Sequence[Segment] = ()) -> int:
    """End of what a load may bring; what is behind it stays vLLM's.

    It is the last position that is kept in the end, or, if a picture before that is new or only
    partly kept, the last one before that picture.

    Args:
        local: length of the prefix that vLLM has already.
        media: where the prompt's pictures are.
    """
    kept = kept_in_the_end(plan)
    known = kept.copy()
    known[:local] = True
    new = [s.start for s in media if not known[s.start : s.end].all()]
    found = np.flatnonzero(kept[: min(new, default=plan.num_tokens)])
    return int(found[-1]) + 1 if len(found) else 0


def cut(plan: ReusePlan, end: int) -> ReusePlan:
    """The plan without what it reuses behind `end`."""
    runs = tuple(
        run._replace(length=min(run.end, end) - run.start) for run in plan.runs if run.start < end
    )
    return replace(plan, runs=runs, repair=plan.repair[plan.repair < end])


def within(pieces: Sequence[Piece], spans: Sequence[Span]) -> list[Piece]:
    """What of `pieces` lies in `spans`, which are ascending and disjoint."""
    ends = [span.end for span in spans]
    found = []
    for piece in pieces:
        for span in spans[bisect_right(ends, piece.start) :]:
            low, high = max(piece.start, span.start), min(piece.end, span.end)
            if low >= high:
                break
            moved = low - piece.start
            found.append(Piece(piece.owner, piece.owner_start + moved, low, high - low))
    return found
