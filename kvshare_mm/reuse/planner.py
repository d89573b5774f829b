"""Planning: what to reuse of which donors.

Planning is arithmetic on keys: no tensors, no store, no text. The order of trust is fixed:

1. the longest prefix that is token-identical to a donor's and exact there is reused exactly;
2. what follows is aligned with every candidate; the one that covers most becomes the primary
   donor, the others fill the gaps it leaves (the paper's "combine", section 4.2);
3. the last position is always computed, because its hidden state gives the first token.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from kvshare_mm.reuse.align import align, common_prefix
from kvshare_mm.reuse.cover import cover
from kvshare_mm.reuse.dependents import carried_reads
from kvshare_mm.reuse.divergence import harmless, looked_at
from kvshare_mm.reuse.plan import (
    Decline,
    Donor,
    KeptRun,
    PlannerOptions,
    ReusePlan,
    Tolerance,
    uniform_shift,
)


def make_plan(
    target: np.ndarray,
    donors: Sequence[Donor],
    options: PlannerOptions,
    positions: np.ndarray | None = None,
    pictures: np.ndarray | None = None,
) -> ReusePlan:
    """Plan the reuse of `donors` for a target.

    A run is kept only if its rotary positions move as one. Equal keys see to that: a medium's key
    names its grid, so what is equal is laid out equally. Not so a video's pictures, whose times
    move and their rows and columns do not; so runs end there, where keys can be moved like that.

    Args:
        target: ``[N]`` uint64 keys.
        donors: the better candidates first.
        options: when reuse is worth it.
        positions: ``[3, N]`` rotary positions of the target; None: the index.
        pictures: ``[N]`` bool: positions that are pictures; None: none are.
    """
    n = len(target)
    runs, too_loose = _prefix_runs(target, donors, options, positions, pictures)
    prefix = runs[-1].end if runs else 0
    rest: list[KeptRun] = []
    declined: Decline | None = None
    if options.exact_only:
        declined = None if prefix >= n - 1 else Decline.EXACT_ONLY
    elif prefix < n - 1:
        rest = _approximate_runs(target, prefix, donors, options, positions)
        if not rest and not runs:
            declined = Decline.BELOW_MIN_GAIN if donors else Decline.NO_DONOR
        if sum(r.length for r in rest) < max(
            options.min_gain_tokens, options.min_gain_share * (n - prefix)
        ):
            declined = Decline.BELOW_MIN_GAIN if rest else declined
            declined = Decline.DIVERGENCE if too_loose else declined
            rest = []
        rest = _with_foreign(target, prefix, rest, donors, options.min_run)
    return _made(target, (*runs, *rest), donors, declined, pictures)


def _with_foreign(
    target: np.ndarray, prefix: int, runs: list[KeptRun], donors: Sequence[Donor], min_run: int
) -> list[KeptRun]:
    """The runs behind the prefix with what of the prefix their donors do not have."""
    keys = {d.donor_id: d.align_keys for d in donors}
    first: dict[str, int] = {}
    for run in runs:
        first[run.donor] = min(run.donor_start, first.get(run.donor, run.donor_start))
    foreign: dict[str, int] = {}
    for donor, start in first.items():
        mine = keys[donor]
        begun = min(common_prefix(mine, target), prefix)
        there = mine[begun : max(begun, start)]
        found = align(there, target[begun:prefix], min_run) if begun < prefix else []
        foreign[donor] = prefix - begun - sum(match.length for match in found)
    return [run._replace(foreign=foreign[run.donor]) for run in runs]


def _made(
    target: np.ndarray,
    runs: tuple[KeptRun, ...],
    donors: Sequence[Donor],
    declined: Decline | None,
    pictures: np.ndarray | None,
) -> ReusePlan:
    """The plan of these runs, with what is known of what they are taken from."""
    n = len(target)
    attention = inherited = unedited = None
    if not all(run.exact for run in runs):
        attention = np.full(n, 1 / n, np.float32)
        looked = {d.donor_id: d.attention for d in donors}
        _carry(attention, runs, looked)
        _look_from_the_end(attention, runs, looked)
        if any(d.drift is not None for d in donors):
            drifts = {d.donor_id: d.drift for d in donors}
            inherited = np.zeros(n, np.float32)
            _carry(inherited, runs, drifts)
            _carry_what_was_read(inherited, runs, drifts)
            unedited = _unedited(target, runs, {d.donor_id: d.align_keys for d in donors})
    return ReusePlan(
        n,
        runs,
        declined=declined,
        attention=attention,
        inherited=inherited,
        unedited=unedited,
        pictures=pictures,
        reads=carried_reads(target, runs, donors),
    )


def _carry(
    into: np.ndarray, runs: Iterable[KeptRun], known: Mapping[str, np.ndarray | None]
) -> None:
    """Put what is known of donors' positions where approximate runs take their KV to."""
    for run in runs:
        values = known[run.donor]
        if values is not None and not run.exact:
            part = values[run.donor_start : run.donor_start + run.length]
            into[run.start : run.start + len(part)] = part


def _look_from_the_end(
    attention: np.ndarray, runs: Iterable[KeptRun], known: Mapping[str, np.ndarray | None]
) -> None:
    """What moved towards the prompt's end is looked at more, what moved away from it less: by the
    root of how much nearer it is, in dialogues and documents alike."""
    for run in runs:
        values = known[run.donor]
        if values is not None and not run.exact:
            length = max(0, min(run.length, len(values) - run.donor_start))
            factor = _nearer(len(values), len(attention), run.donor_start, run.start, length)
            attention[run.start : run.start + length] *= factor


def _nearer(before: int, now: int, donor_start: int, start: int, length: int) -> np.ndarray:
    """``[length]``: the root of how much nearer to the end than before positions of a run are."""
    was = before - np.arange(donor_start, donor_start + length)
    away = now - np.arange(start, start + length)
    factor: np.ndarray = np.sqrt(was / away)
    return factor


def _carry_what_was_read(
    into: np.ndarray, runs: Iterable[KeptRun], drifts: Mapping[str, np.ndarray | None]
) -> None:
    """What is continued keeps what it has read."""
    for run in runs:
        drift = drifts[run.donor]
        if run.continued and drift is not None:
            into[run.start : run.end] = _still_read(drift, run.start, run.end)


def _unedited(
    target: np.ndarray, runs: Sequence[KeptRun], keys: Mapping[str, np.ndarray]
) -> np.ndarray:
    same = np.zeros(len(target), dtype=bool)
    for before, run in itertools.pairwise(runs):
        if (before.donor, before.shift) == (run.donor, run.shift):
            gap = slice(before.end, run.start)
            there = keys[run.donor][before.end - run.shift : run.donor_start]
            same[gap] = np.array_equal(target[gap], there)
    return same


def _prefix_runs(
    target: np.ndarray,
    donors: Sequence[Donor],
    options: PlannerOptions,
    positions: np.ndarray | None,
    pictures: np.ndarray | None,
) -> tuple[tuple[KeptRun, ...], bool]:
    """The exact prefix, and the approximate one that continues it token for token.

    A request that repeats or extends an approximate one sees the very context that its KV was
    computed in, so nothing is compounded: it gets the answer that one got. That is as far from full
    recompute as the other was, so it is continued only as far as this one tolerates it. Less than
    `min_run` positions are not worth it that all behind them are approximate too.

    Returns:
        The runs, and whether a donor could have been continued further by a more tolerant request.
    """
    limit = len(target) - 1
    exact: KeptRun | None = None
    shares: list[tuple[Donor, int]] = []
    for donor in donors:
        shared = min(common_prefix(donor.align_keys, target), donor.readable, limit)
        if shared and uniform_shift(positions, 0, donor.positions, 0, shared) != 0:
            continue
        sure = min(shared, donor.exact_len)
        if sure > (exact.length if exact else 0):
            exact = KeptRun(donor.donor_id, 0, 0, sure, exact=True)
        shares.append((donor, shared))
    runs = [exact] if exact else []
    if options.exact_only:
        return tuple(runs), False
    sure = end = exact.length if exact else 0
    longest = ""
    for donor, shared in shares:
        reach = _reach_within(donor, sure, shared, len(target), options.tolerance, pictures)
        if reach > end:
            longest, end = donor.donor_id, reach
    if end - sure >= options.min_run:
        runs.append(KeptRun(longest, sure, sure, end - sure, exact=False, continued=True))
    else:
        end = sure
    could = max((shared for _, shared in shares), default=0)
    return tuple(runs), could - end >= options.min_run


def _reach_within(
    donor: Donor, sure: int, shared: int, n: int, tolerance: Tolerance, pictures: np.ndarray | None
) -> int:
    """Up to where a target of `n` tokens may continue a donor whose first `shared` positions it
    has, behind `sure` ones that are exact, whoever gives them."""
    if donor.drift is None or sure >= shared:
        return shared
    drift = _still_read(donor.drift, sure, shared)
    looked = np.full(len(drift), 1 / n, np.float32)
    if donor.attention is not None:
        known = donor.attention[sure:shared]
        looked[: len(known)] = known * _nearer(len(donor.attention), n, sure, sure, len(known))
    danger = looked_at(drift, looked, n)
    if tolerance.pictures and pictures is not None:
        harmless(danger, pictures[sure:shared])
    # Drift is kept in 16 bits: what is just tolerated where it was made is so where it is read.
    limit = tolerance.risk * (1 + float(np.finfo(np.float16).eps))
    beyond = np.flatnonzero(~(np.sqrt(np.cumsum(np.square(danger))) <= limit))
    return sure + int(beyond[0]) if len(beyond) else shared


def _still_read(drift: np.ndarray, start: int, end: int) -> np.ndarray:
    """The drift of a donor's ``[start, end)`` where something exact takes the place of what is
    before: computed behind approximate KV, it has read that, and keeps as much of it as was worst
    there."""
    own = drift[start:end]
    found = np.zeros(end - start, np.float32)
    found[: len(own)] = own
    np.maximum(found, drift[:start].max(initial=0), out=found)
    return found


def _approximate_runs(
    target: np.ndarray,
    prefix: int,
    donors: Sequence[Donor],
    options: PlannerOptions,
    positions: np.ndarray | None,
) -> list[KeptRun]:
    return [
        KeptRun(donors[i].donor_id, donor_start, start, length, exact=False)
        for i, donor_start, start, length in cover(target, prefix, donors, options, positions)
    ]
