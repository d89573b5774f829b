"""How much of what a kept run's KV was computed behind is not what stands before it now.

A position reads what is near it more than what is far: a token ``d`` positions away weighs
``1 / (1 + d)``. What counts is *new* before a run (in the target, not in the donor before the run)
and *missing* (the other way round). What stands before it in both is neither, wherever it was moved
to: documents in another order are the same documents.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvshare_mm.reuse.plan import KeptRun, ReusePlan

Ints = NDArray[np.int64]

_NEAREST = 32
"""Edits before a run that are counted each by itself; those further away are spread evenly."""


class _Kept(NamedTuple):
    """What a target has of one donor behind its prefix, ascending in the target: ``[r]`` each."""

    start: Ints
    end: Ints
    donor_start: Ints


def changed_context(plan: ReusePlan) -> np.ndarray:
    """``[num_tokens]`` float64 in 0..1, read only: the share of each position's context that is not
    the one that its KV was computed in; 0 outside edited runs.

    It costs milliseconds where edits are many, and the plan is asked for it again and again: what
    is repaired, what is promised, what is passed on. So the plan remembers it.
    """
    if plan.context is None:
        found = _changed_context(plan)
        found.flags.writeable = False
        object.__setattr__(plan, "context", found)
        return found
    return plan.context


def _changed_context(plan: ReusePlan) -> NDArray[np.float64]:
    found = np.zeros(plan.num_tokens)
    prefix = max((run.end for run in plan.runs if run.exact or run.continued), default=0)
    edited: list[tuple[KeptRun, tuple[int, int, int]]] = []
    kept: dict[str, list[tuple[int, int, int]]] = {}
    end = 0
    for run in plan.runs:
        # What stands before it unedited is not computed anew for anybody's sake.
        lead = run.start - end if plan.goes_on(end, run) else 0
        end = run.end
        if not run.exact and not run.continued:
            row = run.start - lead, run.end, run.donor_start - lead
            edited.append((run, row))
            kept.setdefault(run.donor, []).append(row)
    columns = {donor: _Kept(*np.array(rows, np.int64).T) for donor, rows in kept.items()}
    seen = dict.fromkeys(kept, 0)
    for run, (start, _, donor_start) in edited:
        own, before = columns[run.donor], seen[run.donor]
        seen[run.donor] += 1
        # The prefix is the donor's too, but for what is foreign to it.
        shared = min(prefix - run.foreign, donor_start)
        here, there = _in_both(_Kept(*(column[:before] for column in own)), shared, donor_start)
        at = np.arange(run.start, run.end)
        found[at] = np.maximum(
            _weight(at, _gaps(shared, here, start)),
            _weight(at - run.shift, _gaps(shared, there, donor_start)),
        )
    return found


def _in_both(kept: _Kept, begin: int, end: int) -> tuple[Ints, Ints]:
    """What of a donor's ``[begin, end)`` is kept: ``[g, 2]`` spans in the target and ``[g, 2]`` in
    the donor, each ascending. In text that repeats itself one position may be kept for several:
    what stood before a run once stands there in both once."""
    order = np.argsort(kept.donor_start, kind="stable")
    starts, ends, there = (column[order] for column in kept)
    shift = starts - there
    until = there + ends - starts
    low = np.maximum.accumulate(np.concatenate(([begin], until)))[:-1]
    spans = np.stack((np.maximum(there, low), np.minimum(until, end)), axis=1)
    some = spans[:, 1] > spans[:, 0]
    spans, here = spans[some], (spans + shift[:, None])[some]
    return here[np.argsort(here[:, 0], kind="stable")], spans


def _gaps(begin: int, spans: Ints, end: int) -> Ints:
    """``[g, 2]``: what of ``[begin, end)`` is in none of `spans`, ascending by their starts."""
    low = np.maximum.accumulate(np.concatenate(([begin], spans[:, 1])))
    gaps = np.stack((low, np.concatenate((spans[:, 0], [end]))), axis=1)
    found: Ints = gaps[gaps[:, 1] > gaps[:, 0]]
    return found


def _weight(at: Ints, spans: Ints) -> NDArray[np.float64]:
    """``[n]`` share of the context of positions `at` (ascending, behind all `spans`) that is in
    `spans` (``[g, 2]``)."""
    if not len(spans):
        return np.zeros(len(at))
    near, far = spans[-_NEAREST:], spans[:-_NEAREST]
    read = _read(at, near).sum(0)
    if len(far):
        whole = np.array([[far[0, 0], far[-1, 1]]])
        read += _read(at, whole)[0] * ((far[:, 1] - far[:, 0]).sum() / (whole[0, 1] - whole[0, 0]))
    share: NDArray[np.float64] = np.minimum(1.0, read / np.log1p(at))
    return share


def _read(at: Ints, spans: Ints) -> NDArray[np.float64]:
    """``[g, n]``: what each position reads of each span."""
    away = np.log1p(at - spans[:, :, None])
    read: NDArray[np.float64] = away[:, 0] - away[:, 1]
    return read
