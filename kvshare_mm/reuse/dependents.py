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
        place = np.full(len(donor.align_keys), -1, np.int32)
        # The beginning is another's run, and the same.
        shared = min(common_prefix(donor.align_keys, target), prefix)
        place[:shared] = np.arange(shared)
        for run in mine:
            place[run.donor_start : run.donor_start + run.length] = np.arange(run.start, run.end)
        pairs = place[donor.reads]
        found.append(pairs[pairs[:, 0] >= 0])
    return np.concatenate(found) if found else None


def dependents(plan: ReusePlan) -> np.ndarray:
    """Ascending int64 positions of approximate runs that have read what is not kept, or who has,
    with those around them."""
    if plan.reads is None:
        return np.empty(0, np.int64)
    stale = np.zeros(plan.num_tokens, dtype=bool)
    open_ = plan.approximate
    reader, read = plan.reads.T
    gone = read < 0
    while True:
        new = reader[(gone | stale[read]) & open_[reader] & ~stale[reader]]
        if not len(new):
            break
        stale[new] = True
    found = np.flatnonzero(stale)
    if not len(found):
        return found
    parts = np.split(found, np.flatnonzero(np.diff(found) > _BETWEEN) + 1)
    wide = [np.arange(max(0, p[0] - _BEFORE), p[-1] + 1 + _BEHIND) for p in parts]
    near = np.unique(np.concatenate(wide))
    return near[near < plan.num_tokens]


def all_reads(plan: ReusePlan, computed: np.ndarray | None) -> np.ndarray | None:
    """What a request served with `plan` reads: what was recorded of its computed positions, and
    what the others have read in their donor. None: unknown.

    Args:
        computed: ``[R, 2]``, or None.
    """
    if computed is None:
        return None
    if plan.reads is None:
        return computed
    reader, read = plan.reads.T
    left = np.ones(plan.num_tokens, dtype=bool)
    left[plan.compute] = False
    pairs = np.concatenate((plan.reads[(read >= 0) & left[reader]], computed))
    return np.unique(pairs.astype(np.int32), axis=0)
