"""What depends on an edit, however far behind it: the positions that have read what was edited.

A model notes what it reads in the KV of who reads it: of a status that is looked up in a later
sentence, the KV of that sentence holds the old one ("Contiguity, Not Importance", arXiv 2609.17983,
where no rule that looks at the edit alone finds it behind 250 tokens). Who has read what is
recorded when a prompt is computed (`kvshare_mm.reads`) and kept with it. Here it is followed, from
what an edit took away over who read it to who read those.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvshare_mm.reuse.align import common_prefix
from kvshare_mm.reuse.plan import Donor, KeptRun, ReusePlan

# Whoever reads is repaired with those next to it: what is computed by itself reads neighbours that
# still say the old.
_BEFORE, _BEHIND = 1, 2
_BETWEEN = 8
# What was read is noted again at the end of the sentence and where the next one begins: without
# that, little of a fact that follows from an edit is recovered (`kvshare bench derived`).
_PASSED_ON = 12
# Who read a longer passage that is gone (a turn, a document) is not followed: many have, a little
# of it each, and computing them again brought no answer nearer (`kvshare bench workloads`: 9.8% of
# 4,000 tokens computed instead of 7.9%, at the same divergence).
_VALUE = 64


def carried_reads(
    target: np.ndarray, runs: Sequence[KeptRun], donors: Sequence[Donor]
) -> np.ndarray | None:
    """What kept positions read, as `ReusePlan.reads` has it.

    Args:
        target: ``[N]`` uint64 keys.
        donors: those of the runs, and others.
    """
    prefix = max((run.end for run in runs if run.exact or run.continued), default=0)
    found = []
    for donor in donors:
        mine = [run for run in runs if run.donor == donor.donor_id]
        if donor.reads is None or not mine:
            continue
        # The beginning is another's run, and the same.
        shared = min(common_prefix(donor.align_keys, target), prefix)
        parts = [(0, shared, 0)]
        parts += [
            (run.donor_start, run.donor_start + run.length, run.shift)
            for run in mine
            if run.end > shared
        ]
        reader, read = donor.reads.T
        # Of what is kept twice, the last before its reader is meant. What is kept further behind is
        # not gone either: what was read is said there.
        before = np.full(len(donor.align_keys), -1, np.int32)
        behind = before.copy()
        for start, end, shift in parts:
            behind[start:end] = np.arange(start + shift, end + shift)
        followed = ~_long_stretches(behind < 0)[read]
        for start, end, shift in parts:
            before[start:end] = np.arange(start + shift, end + shift)
            its = (reader >= start) & (reader < end) & followed
            place = before[read[its]]
            place = np.where(place < 0, behind[read[its]], place)
            found.append(np.stack((reader[its] + shift, place), axis=1))
    return np.concatenate(found) if found else None


def _long_stretches(gone: np.ndarray) -> np.ndarray:
    """``[M]`` bool: what of `gone` (``[M]`` bool) is more than `_VALUE` in a row."""
    edges = np.flatnonzero(np.diff(gone, prepend=False, append=False)).reshape(-1, 2)
    found = np.zeros(len(gone), dtype=bool)
    for start, end in edges[edges[:, 1] - edges[:, 0] > _VALUE]:
        found[start:end] = True
    return found


def dependents(plan: ReusePlan) -> np.ndarray:
    """Ascending int64 positions of approximate runs that have read what is not kept, or who has,
    with those around them."""
    if plan.reads is None:
        return np.empty(0, np.int64)
    found = np.flatnonzero(_stale(plan.reads, plan.approximate))
    if not len(found):
        return found
    parts = np.split(found, np.flatnonzero(np.diff(found) > _BETWEEN) + 1)
    wide = [
        np.arange(max(0, p[0] - _BEFORE), max(p[0] + _PASSED_ON, p[-1] + _BEHIND) + 1)
        for p in parts
    ]
    near = np.unique(np.concatenate(wide))
    return near[near < plan.num_tokens]


def _stale(reads: np.ndarray, may_be: np.ndarray) -> np.ndarray:
    """``[N]`` bool: readers of what is gone, and of those, among the positions that `may_be`. Each
    pair is looked at once, however long the chains are."""
    n = len(may_be)
    reader, read = reads[np.argsort(reads[:, 1], kind="stable")].T
    first = np.searchsorted(read, np.arange(n + 1))
    stale = np.zeros(n, dtype=bool)
    new = reader[: first[0]]
    while len(new := np.unique(new[may_be[new] & ~stale[new]])):
        stale[new] = True
        counts = first[new + 1] - first[new]
        begun = np.cumsum(counts) - counts
        new = reader[np.repeat(first[new] - begun, counts) + np.arange(counts.sum())]
    return stale


def all_reads(plan: ReusePlan, computed: np.ndarray | None) -> np.ndarray | None:
    """What a request served with `plan` reads: what was recorded of its computed positions, and
    what the others have read in their donor. None: unknown.

    Args:
        computed: ``[R, 2]``, or None.
    """
    if computed is None or not plan.runs:
        return computed
    if plan.reads is None:
        return None
    reader, read = plan.reads.T
    left = np.ones(plan.num_tokens, dtype=bool)
    left[plan.compute] = False
    kept = (read >= 0) & (read < reader) & left[reader]
    pairs = np.concatenate((plan.reads[kept], computed))
    return np.unique(pairs.astype(np.int32), axis=0)
