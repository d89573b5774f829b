"""Which runs behind the exact prefix come from which donor: the search that a plan is made of.

The donor whose alignment covers most is the primary one; the others, and moved blocks of its own,
fill the gaps it leaves (the paper's "combine", section 4.2).

The engine plans in its only thread, so no prompt may hold up the others, whatever it is made of.
What is looked at is bounded (here, in `align` and in `chain`), always alike for the same prompt;
the clock only cuts what is too slow even so.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvshare_mm.reuse.align import Matcher
from kvshare_mm.reuse.plan import Donor, PlannerOptions
from kvshare_mm.reuse.ranks import Ints, consecutive

Keys = NDArray[np.uint64]
Mask = NDArray[np.bool_]

MAX_RUNS = 1024
"""Runs of one plan, the longest ones. Each costs an edit, and what is computed behind it."""

TOKENS_OF_BUDGET = 32_768
"""The time for the search is meant for a prompt of up to so many tokens; a longer one, which costs
as much more to compute, has that time for each part of this length."""

_MAX_PIECES = 4096
"""Pieces of a donor's matches that gaps are filled from, the longest ones."""

_FIRST_ROUND, _ROUND = 32, 512
"""Pieces are laid down so many at a time; in between those are dropped whose place is taken."""

_LAID_PER_TOKEN = 64
_LEAST_LAID = 1 << 16
"""Pieces are laid down until they have so many positions together."""


class Kept(NamedTuple):
    """Target ``[start, start + length)`` is donor number `donor`'s from `donor_start`."""

    donor: int
    donor_start: int
    start: int
    length: int


def cover(
    target: Keys,
    prefix: int,
    donors: Sequence[Donor],
    options: PlannerOptions,
    positions: Ints | None,
) -> list[Kept]:
    """Runs of at least `min_run` keys that donors have for a target behind its prefix.

    Args:
        target: ``[N]`` uint64 keys.
        prefix: end of what is reused already.
        donors: the better candidates first.
        options: `min_run`, `min_gain_tokens` and `max_seconds` are used.
        positions: ``[3, N]`` rotary positions of the target; None: the index.

    Returns:
        Disjoint runs, ascending, none of which reaches the last position; at most `MAX_RUNS`. Once
        the time is over, what was found until then.
    """
    parts = -(-len(target) // TOKENS_OF_BUDGET)
    deadline = time.thread_time() + options.max_seconds * parts
    limit, min_run = len(target) - 1, options.min_run
    if limit - prefix < min_run or not donors or time.thread_time() >= deadline:
        return []
    matcher = Matcher(target, [d.align_keys for d in donors], min_run)
    shared = [matcher.shared(i)[prefix : limit - min_run + 1] for i in range(len(donors))]
    reach = [_reach(s, min_run) for s in shared]
    best, covered = _NO_RUNS, 0
    # Aligning costs milliseconds: a donor that cannot win by a gain worth having is left out.
    for i in sorted(range(len(donors)), key=lambda i: -reach[i]):
        if reach[i] < covered + (options.min_gain_tokens if len(best) else 1):
            break
        if time.thread_time() >= deadline:
            break
        whole = _gaps(_NO_RUNS, prefix, limit, min_run)
        usable = _usable(matcher.align(i), donors[i], whole, min_run)
        runs = _longest(_runs(i, usable, donors[i], positions, options))
        length = int(runs[:, 3].sum())
        if length > covered:
            best, covered = runs, length
    for i, donor in enumerate(donors):
        if len(best) >= MAX_RUNS or time.thread_time() >= deadline:
            break
        gaps = _gaps(best, prefix, limit, min_run)
        # A gap without any window that the donor has too is not worth a search.
        known = np.concatenate(([0], np.cumsum(shared[i])))
        gaps = gaps[known[gaps[:, 1] - min_run + 1 - prefix] > known[gaps[:, 0] - prefix]]
        if len(gaps):
            usable = _usable(matcher.matches(i), donor, gaps, min_run)
            filled = _lay_down(usable, len(target), min_run)
            found = _runs(i, filled, donor, positions, options)
            best = _longest(np.concatenate((best, found)))
    return [Kept(*row) for row in best.tolist()]


_NO_RUNS = np.empty((0, 4), dtype=np.int64)


def _reach(begins: Mask, min_run: int) -> int:
    """At most so many positions are in runs that a donor has too, by where `min_run` keys begin."""
    begun = np.zeros(len(begins) + min_run, dtype=np.int64)
    begun[: len(begins)] += begins
    begun[min_run:] -= begins
    return int(np.count_nonzero(np.cumsum(begun)))


def _usable(matches: Ints, donor: Donor, gaps: Ints, min_run: int) -> Ints:
    """What of `matches` (``[m, 3]``) is in a gap (``[g, 2]``) and reusable of the donor."""
    matches = _clip(matches, 1, gaps, min_run)
    if donor.reusable.all():
        return matches
    return _clip(matches, 0, _stretches(donor.reusable, min_run), min_run)


def _runs(
    number: int, matches: Ints, donor: Donor, positions: Ints | None, options: PlannerOptions
) -> Ints:
    """Matches as rows of ``[r, 4]``, without those whose rotary positions do not move as one; or
    the parts of them that do, if keys move on each axis by itself."""
    if (positions is not None or donor.positions is not None) and len(matches):
        moved = _moved(matches, positions, donor.positions)
        if options.each_axis:
            matches = _parted(matches, moved, options.min_run)
        else:
            matches = matches[_moving_as_one(matches, moved)]
    return np.concatenate((np.full((len(matches), 1), number), matches), axis=1)


def _longest(runs: Ints) -> Ints:
    """The longest runs, ascending."""
    if len(runs) > MAX_RUNS:
        runs = runs[np.argsort(-runs[:, 3], kind="stable")[:MAX_RUNS]]
    return runs[np.argsort(runs[:, 2], kind="stable")]


def _gaps(runs: Ints, low: int, high: int, min_run: int) -> Ints:
    """``[g, 2]``: the stretches of at least `min_run` positions of ``[low, high)`` without runs."""
    gaps = np.empty((len(runs) + 1, 2), dtype=np.int64)
    gaps[0, 0], gaps[-1, 1] = low, high
    gaps[1:, 0], gaps[:-1, 1] = runs[:, 2] + runs[:, 3], runs[:, 2]
    return gaps[gaps[:, 1] - gaps[:, 0] >= min_run]


def _stretches(mask: Mask, min_run: int) -> Ints:
    """``[s, 2]``: bounds of the stretches of at least `min_run` true positions."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], mask.astype(np.int8), [0]))))
    stretches = edges.reshape(-1, 2)
    return stretches[stretches[:, 1] - stretches[:, 0] >= min_run]


def _clip(matches: Ints, axis: int, spans: Ints, min_run: int) -> Ints:
    """The pieces, `min_run` long or more, of matches in each of `spans` (ascending, disjoint).

    Args:
        matches: ``[m, 3]``.
        axis: what the spans are of: 0 the donor, 1 the target.
        spans: ``[s, 2]``.

    Returns:
        Pieces in the order of their matches; of more than `_MAX_PIECES` those of the longest.
    """
    start = matches[:, axis]
    end = start + matches[:, 2]
    first = np.searchsorted(spans[:, 1], start + min_run)
    count = np.searchsorted(spans[:, 0], end - min_run, "right") - first
    count = np.where(matches[:, 2] >= min_run, np.maximum(count, 0), 0)
    if count.sum() > _MAX_PIECES:
        longest = np.argsort(-matches[:, 2], kind="stable")
        count[longest[np.cumsum(count[longest]) > _MAX_PIECES]] = 0
    which, span = np.repeat(np.arange(len(matches)), count), spans[consecutive(first, count)]
    cut = np.maximum(0, span[:, 0] - start[which])
    length = np.minimum(end[which], span[:, 1]) - start[which] - cut
    return np.stack((matches[which, 0] + cut, matches[which, 1] + cut, length), axis=1)


def _lay_down(pieces: Ints, num_tokens: int, min_run: int) -> Ints:
    """Disjoint parts of overlapping pieces: the longest first, then what is free of the others.

    Matches of moved blocks reach into each other by whatever separates the blocks.
    """
    pieces = pieces[np.argsort(-pieces[:, 2], kind="stable")]
    free = bytearray(b"\1") * num_tokens
    enough = b"\1" * min_run
    taken: list[tuple[int, int, int]] = []
    budget, size = max(_LEAST_LAID, _LAID_PER_TOKEN * num_tokens), _FIRST_ROUND
    while len(pieces) and len(taken) < MAX_RUNS and budget > 0:
        for donor_start, start, length in pieces[:size].tolist():
            end = start + length
            low = free.find(enough, start, end)
            while low >= 0:
                high = free.find(0, low, end)
                high = end if high < 0 else high
                taken.append((donor_start + low - start, low, high - low))
                free[low:high] = bytes(high - low)
                low = free.find(enough, high, end)
        budget -= int(pieces[:size, 2].sum())
        pieces, size = pieces[size:], min(2 * size, _ROUND)
        position = np.concatenate(([0], np.cumsum(np.frombuffer(free, np.uint8), dtype=np.int64)))
        begins = position[min_run:] - position[:-min_run] == min_run
        begun = np.concatenate(([0], np.cumsum(begins)))
        last = pieces[:, 1] + pieces[:, 2] - min_run
        pieces = pieces[begun[last + 1] > begun[pieces[:, 1]]]
    return np.array(taken, dtype=np.int64).reshape(-1, 3)


def _moved(matches: Ints, target: Ints | None, donor: Ints | None) -> Ints:
    """``[3, n]``: by how much each position of the matches, one behind the other, moves.

    Args:
        target, donor: ``[3, N]`` and ``[3, M]`` rotary positions; None: the index of one.
    """
    at, donor_at = (consecutive(matches[:, axis], matches[:, 2]) for axis in (1, 0))
    here = at if target is None else target[:, at]
    return here - (donor_at if donor is None else donor[:, donor_at])


def _moving_as_one(matches: Ints, moved: Ints) -> Mask:
    """``[m]`` bool: all of a match moves by the same on all axes, see `plan.uniform_shift`."""
    begin = np.cumsum(matches[:, 2]) - matches[:, 2]
    same = (moved == np.repeat(moved[0, begin], matches[:, 2])).all(axis=0)
    return np.logical_and.reduceat(same, begin)


def _parted(matches: Ints, moved: Ints, min_run: int) -> Ints:
    """The parts of matches, `min_run` long or more, all of which move alike: see `plan.turn_of`."""
    begin = np.cumsum(matches[:, 2]) - matches[:, 2]
    parts = np.concatenate(([True], (moved[:, 1:] != moved[:, :-1]).any(axis=0)))
    parts[begin] = True
    cut = np.flatnonzero(parts)
    which = np.searchsorted(begin, cut, "right") - 1
    length = np.diff(np.append(cut, len(parts)))
    starts = matches[which, :2] + (cut - begin[which])[:, None]
    return np.column_stack((starts, length))[length >= min_run]
