"""Maximal runs of two number sequences, listed by where they start and end.

A run is a row of donor start, target start and length (int64). What is listed is bounded, so that
the cost is too: pairs of equal numbers may be as many as the product of the lengths.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvshare_mm.reuse.ranks import Ints, Ranked, consecutive

_Pairs = tuple[Ints, Ints]  # positions in the donor and in the target

_PAIRS_PER_RUN = 4
"""Pairs of equal windows are listed one by one while they are not more than so many times the runs
that may be looked at; of more, only the ends of runs are sought."""


def maximal_runs(donor: Ints, target: Ints, windows: Ranked, budget: int, most: int) -> Ints | None:
    """The longest maximal runs of keys in which all windows are equal; None if there are too many.

    Args:
        donor, target: ``[M]`` and ``[N]`` numbers of windows; `windows.count` in the donor and
            ``windows.count + 1`` in the target are equal to nothing.
        budget: most runs that are looked at.
        most: how many of them are returned.

    Returns:
        ``[m, 3]`` int64 of donor start, target start and length, by diagonal and then start.
    """
    count = windows.count
    # Nothing equals what is beyond the ends.
    donor = np.pad(donor, 1, constant_values=count)
    target = np.pad(target, 1, constant_values=count + 1)
    amounts = np.bincount(donor, minlength=count + 2)
    starts: _Pairs | None
    ends: _Pairs | None
    if amounts[target].sum() <= _PAIRS_PER_RUN * budget:
        donor_at, at = _equal_pairs(donor, target, amounts)
        first = donor[donor_at - 1] != target[at - 1]
        last = donor[donor_at + 1] != target[at + 1]
        starts, ends = (donor_at[first], at[first]), (donor_at[last], at[last])
    else:
        starts = _edge_pairs(donor, target, -1, count + 2, budget)
        ends = _edge_pairs(donor, target, 1, count + 2, budget) if starts else None
    if starts is None or ends is None:
        return None
    # On one diagonal starts and ends alternate: sorted alike, they belong together one by one.
    bits = (len(donor) + len(target)).bit_length()
    first_code = np.sort(((starts[0] - starts[1] + len(target)) << bits) | starts[1])
    last_code = np.sort(((ends[0] - ends[1] + len(target)) << bits) | ends[1])
    length = last_code - first_code + windows.width
    kept = longest(length, most)
    diagonal, start = first_code[kept] >> bits, first_code[kept] & ((1 << bits) - 1)
    return np.stack((diagonal - len(target) + start - 1, start - 1, length[kept]), axis=1)


def _equal_pairs(donor: Ints, target: Ints, amounts: Ints) -> _Pairs:
    """All pairs of a donor's and a target's position with equal numbers.

    Args:
        amounts: how often a donor has each number.
    """
    count = amounts[target]
    hit = np.flatnonzero(count)
    shared = np.zeros(len(amounts), dtype=bool)
    shared[target[hit]] = True
    # Sorting is what costs: only what the target has too.
    mine = np.flatnonzero(shared[donor])
    order = mine[np.argsort(donor[mine])]
    amounts = np.where(shared, amounts, 0)
    low = (np.cumsum(amounts) - amounts)[target[hit]]
    return order[consecutive(low, count[hit])], np.repeat(hit, count[hit])


def _edge_pairs(donor: Ints, target: Ints, step: int, base: int, most: int) -> _Pairs | None:
    """Pairs with equal numbers whose neighbours differ: where runs start, or end.

    Sorted by number and neighbour, the positions of a donor that a target's is *not* continued with
    are those of its number before and behind one stretch, so nothing else is looked at.

    Args:
        donor, target: numbers, the first and last equal to nothing.
        step: -1 for starts, 1 for ends.
        base: above all numbers.
        most: None is returned if there are more pairs.
    """
    amounts = np.bincount(donor[1:-1], minlength=base)
    first = np.cumsum(amounts) - amounts
    donor_at = np.arange(1, len(donor) - 1)
    at = np.flatnonzero(amounts[target])
    donor_pair = donor[donor_at] * base + donor[donor_at + step]
    pair = target[at] * base + target[at + step]
    # Sorted, searching is several times faster.
    order, at_order = np.argsort(donor_pair), np.argsort(pair)
    donor_pair, pair, number = donor_pair[order], pair[at_order], target[at[at_order]]
    low, high = first[number], first[number] + amounts[number]
    same, other = np.searchsorted(donor_pair, pair), np.searchsorted(donor_pair, pair, "right")
    before, behind = same - low, high - other
    if before.sum() + behind.sum() > most:
        return None
    chosen = np.concatenate((consecutive(low, before), consecutive(other, behind)))
    mine = np.concatenate((np.repeat(at_order, before), np.repeat(at_order, behind)))
    return donor_at[order[chosen]], at[mine]


def without_frequent(donor: Ints, target: Ints, count: int, budget: int) -> tuple[Ints, Ints]:
    """The numbers, the frequent ones replaced, so that at most `budget` pairs are equal.

    Args: see `maximal_runs`.
    """
    pairs = np.bincount(donor, minlength=count) * np.bincount(target, minlength=count)
    ranked = np.sort(pairs)
    over = np.flatnonzero(np.cumsum(ranked) > budget)
    frequent = pairs >= ranked[over[0]] if len(over) else np.zeros(count, dtype=bool)
    return np.where(frequent[donor], count, donor), np.where(frequent[target], count + 1, target)


def chief_diagonals(runs: Ints, most: int) -> list[int]:
    """The diagonals (donor minus target position) with most keys in runs."""
    diagonals, which = np.unique(runs[:, 0] - runs[:, 1], return_inverse=True)
    weight = np.bincount(which, runs[:, 2], minlength=len(diagonals))
    chief: list[int] = diagonals[np.argsort(-weight, kind="stable")[:most]].tolist()
    return chief


def on_diagonals(
    donor: NDArray[Any], target: NDArray[Any], diagonals: Iterable[int], min_run: int
) -> Ints:
    """All maximal runs of at least `min_run` keys on some diagonals.

    Args:
        donor, target: ``[M]`` and ``[N]`` keys.
        diagonals: donor minus target positions.
    """
    found = [np.empty((0, 3), dtype=np.int64)]
    for diagonal in diagonals:
        start, donor_start = max(0, -diagonal), max(0, diagonal)
        count = min(len(target) - start, len(donor) - donor_start)
        equal = donor[donor_start : donor_start + count] == target[start : start + count]
        edges = np.flatnonzero(np.diff(equal, prepend=False, append=False)).reshape(-1, 2)
        first, length = edges[:, 0], edges[:, 1] - edges[:, 0]
        found.append(np.stack((donor_start + first, start + first, length), axis=1))
    runs = np.concatenate(found)
    return runs[runs[:, 2] >= min_run]


def joined(some: Ints, longer: Ints) -> Ints:
    """Runs of two searches, by diagonal and then start, without those that lie in others."""
    runs = np.concatenate((longer, some))
    if not len(runs):
        return runs
    diagonal = runs[:, 0] - runs[:, 1]
    order = np.lexsort((-runs[:, 2], runs[:, 1], diagonal))
    # One number for diagonal and end: what lies in a run before it does not go beyond that.
    end = (diagonal - diagonal.min()) * int(runs.max() * 2 + 1) + runs[:, 1] + runs[:, 2]
    kept = np.ones(len(runs), dtype=bool)
    kept[1:] = end[order][1:] > np.maximum.accumulate(end[order])[:-1]
    ordered: Ints = runs[order][kept]
    return ordered


def longest(length: Ints, most: int) -> Ints:
    """Indexes of the longest, the first of equal ones, ascending."""
    if len(length) <= most:
        return np.arange(len(length))
    shortest = np.partition(length, -most)[-most]
    longer, equal = np.flatnonzero(length > shortest), np.flatnonzero(length == shortest)
    return np.sort(np.concatenate((longer, equal[: most - len(longer)])))
