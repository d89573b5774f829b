"""Token alignment: which runs of a target's keys also stand in a donor, in the same order.

`Matcher` finds the maximal common runs and `chain` picks the heaviest monotone alignment of them
(no shorter run than `min_run`), so the cost grows with the number of distinct runs and not with the
product of the lengths. Input that repeats itself has more runs than that is worth: then the work is
bounded, and the longest runs are the ones that are found. `difflib` without autojunk is the
reference that the tests compare it with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvshare_mm.reuse.chain import heavy_chain
from kvshare_mm.reuse.ranks import Ints, rank_windows, widened
from kvshare_mm.reuse.runs import (
    chief_diagonals,
    joined,
    longest,
    maximal_runs,
    on_diagonals,
    without_frequent,
)

Keys = NDArray[np.uint64]

MAX_MATCHES = 4096
"""Matches of one donor that are looked at, the longest ones. Prompts of documents and recorded
agent sessions of 10,000 tokens have a few thousand."""

_LEAST_RUNS = 1 << 16
"""Maximal runs that are listed: one per position of donor and target, of short ones so many. Text
has about 0.1 per position, one key repeated has one."""

_WIDER = (4, 32)
"""What has more is searched for runs that are so many times `min_run` long."""

_MAX_REPETITIVE = 1024
"""The most matches that are kept of each way to search what has more."""

_MAX_DIAGONALS = 8
"""Diagonals, those that most was found on, on which short runs are looked for as well."""


class Match(NamedTuple):
    """`length` equal keys: target from `start`, donor from `donor_start`."""

    donor_start: int
    start: int
    length: int

    @property
    def end(self) -> int:
        return self.start + self.length


def common_prefix(a: Keys, b: Keys) -> int:
    """Number of equal leading keys."""
    n = min(len(a), len(b))
    differs = np.flatnonzero(a[:n] != b[:n])
    return int(differs[0]) if len(differs) else n


def align(donor: Keys, target: Keys, min_run: int = 4) -> list[Match]:
    """A heavy monotone alignment made of runs of at least `min_run` equal keys.

    Args:
        donor: ``[M]`` uint64 keys.
        target: ``[N]`` uint64 keys.
        min_run: shortest run worth keeping, at least 1.

    Returns:
        Disjoint matches, ascending in both sequences. A match that overlaps its predecessor is cut
        and may end up shorter than `min_run`. It is the heaviest alignment unless there are more
        than 96 matches, or so many that not all are found (see `Matcher.matches`); it is always a
        valid one.
    """
    return _as_matches(Matcher(target, [donor], min_run).align(0))


class Matcher:
    """Common runs of one target with each of its donors.

    Args:
        target: ``[N]`` uint64 keys.
        donors: ``[M]`` uint64 keys each.
        min_run: shortest run that counts, at least 1.
    """

    def __init__(self, target: Keys, donors: Sequence[Keys], min_run: int) -> None:
        if min_run < 1:
            raise ValueError("min_run must be at least 1")
        self._target, self._donors, self._min_run = target, donors, min_run
        # Of `min_run` keys, and wider as needed; of the target and then the donors.
        self._windows = [rank_windows([target, *donors], min_run)]
        self._level = 1  # of those, the first that is not too narrow for the donors until now
        self._found: dict[int, Ints] = {}

    def shared(self, donor: int) -> NDArray[np.bool_]:
        """``[N - min_run + 1]`` bool: the donor has the `min_run` keys from here on too."""
        windows = self._windows[0]
        present = np.zeros(windows.count, dtype=bool)
        present[windows.numbers[1 + donor]] = True
        return present[windows.numbers[0]]

    def matches(self, donor: int) -> Ints:
        """Maximal common runs of a donor and the target, overlaps included.

        These are all there are, or the 4,096 longest. Only if there are more than 65,536 (or one
        per position) not all of them are looked at: then they are the runs of rare windows, those
        at least 4 times as long as `min_run` (or 32 times), and all on the diagonals that most of
        these are on.

        Returns:
            ``[m, 3]`` int64 of donor start, target start and length, by diagonal and then start.
        """
        if donor not in self._found:
            self._found[donor] = self._search(donor)
        return self._found[donor]

    def align(self, donor: int) -> Ints:
        """``[m, 3]`` int64: see the function of this name."""
        keys, target = self._donors[donor], self._target
        prefix = common_prefix(keys, target)
        if prefix == len(target):
            return _rows([(0, 0, prefix)], self._min_run)
        suffix = common_prefix(keys[prefix:][::-1], target[prefix:][::-1])
        # The common ends are maximal matches already, unless those were too many to find.
        ends = _rows(
            [(0, 0, prefix), (len(keys) - suffix, len(target) - suffix, suffix)], self._min_run
        )
        return heavy_chain(np.concatenate((self.matches(donor), ends)), self._min_run)

    def _search(self, donor: int) -> Ints:
        budget = max(_LEAST_RUNS, len(self._target) + len(self._donors[donor]))
        if not self._surely_more(donor, budget):
            found = self._runs(0, donor, budget)
            if found is not None:
                return found
        # The rarest windows tell most, and what they miss is worth finding if it is long or lies
        # where most else does.
        windows = self._windows[0]
        numbers = windows.numbers[1 + donor], windows.numbers[0]
        rare = without_frequent(*numbers, windows.count, budget // 4)
        found = maximal_runs(*rare, windows, budget, _MAX_REPETITIVE)
        assert found is not None  # there are no more runs than pairs
        while self._level <= len(_WIDER):
            longer = self._runs(self._level, donor, budget)
            if longer is not None:
                found = joined(found, longer)
                break
            # What is too narrow for one donor is for the next: it is not tried again.
            self._level += 1
        keys, target = self._donors[donor], self._target
        diagonals = {0, len(keys) - len(target), *chief_diagonals(found, _MAX_DIAGONALS)}
        along = on_diagonals(keys, target, sorted(diagonals), self._min_run)
        return joined(found, along[longest(along[:, 2], _MAX_REPETITIVE)])

    def _runs(self, level: int, donor: int, budget: int) -> Ints | None:
        """The longest maximal runs of one window or more; None if there are too many."""
        if level == len(self._windows):
            width = _WIDER[level - 1] * self._min_run
            self._windows.append(widened(self._windows[-1], width))
        windows = self._windows[level]
        numbers = windows.numbers[1 + donor], windows.numbers[0]
        return maximal_runs(*numbers, windows, budget, _MAX_REPETITIVE if level else MAX_MATCHES)

    def _surely_more(self, donor: int, budget: int) -> bool:
        """There are more runs than `budget`, by the windows that other donors were searched with.

        A run of L windows makes L pairs of equal windows, and at least ``L - k`` of windows wider
        by k. So the difference of both counts is at most k times the number of runs.
        """
        narrow, wide = self._windows[0], self._windows[-1]
        pairs = [
            np.bincount(w.numbers[1 + donor], minlength=w.count)
            @ np.bincount(w.numbers[0], minlength=w.count)
            for w in (narrow, wide)
        ]
        return bool(pairs[0] - pairs[1] > (wide.width - narrow.width) * budget)


def _rows(matches: list[tuple[int, int, int]], min_run: int) -> Ints:
    """``[m, 3]``: those of `matches` that are long enough."""
    return np.array([m for m in matches if m[2] >= min_run], dtype=np.int64).reshape(-1, 3)


def _as_matches(table: Ints) -> list[Match]:
    return [Match(*row) for row in table.tolist()]
