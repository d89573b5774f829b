"""Token alignment: which runs of a target's keys also stand in a donor, in the same order.

`align` finds maximal common runs by hashed k-gram seeds and chains them into the heaviest
monotone alignment (no shorter run than `min_run`), so its cost grows with the number of distinct
matches and not with the product of the lengths. `difflib` without autojunk is the reference that
the tests compare it with.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from kvshare_mm.index.ngrams import ngram_hashes

_MAX_SEEDS_PER_POSITION = 16
_MAX_MATCHES = 4096
_MAX_CHAINED = 96


class Op(StrEnum):
    KEEP = "keep"
    INSERT = "insert"
    DELETE = "delete"
    REPLACE = "replace"


class Match(NamedTuple):
    """`length` equal keys: target from `start`, donor from `donor_start`."""

    donor_start: int
    start: int
    length: int

    @property
    def end(self) -> int:
        return self.start + self.length


class Edit(NamedTuple):
    """One run of an edit script: donor ``[donor_start, donor_end)`` -> target ``[start, end)``."""

    op: Op
    donor_start: int
    donor_end: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class EditScript:
    """Runs that turn a donor's keys into the target's, in order, tiling both."""

    edits: tuple[Edit, ...]

    def __post_init__(self) -> None:
        donor_end = end = 0
        for edit in self.edits:
            if (edit.donor_start, edit.start) != (donor_end, end):
                raise ValueError(f"edit script has a gap or an overlap at {edit}")
            if edit.donor_end < edit.donor_start or edit.end < edit.start:
                raise ValueError(f"an edit runs backwards: {edit}")
            if edit.op is Op.KEEP and edit.donor_end - edit.donor_start != edit.end - edit.start:
                raise ValueError(f"a kept run changes its length: {edit}")
            donor_end, end = edit.donor_end, edit.end

    def apply(self, donor: np.ndarray, target: np.ndarray) -> np.ndarray:
        """The target: kept runs from `donor` (``[M]``), the rest from `target` (``[N]``)."""
        parts = [
            donor[e.donor_start : e.donor_end] if e.op is Op.KEEP else target[e.start : e.end]
            for e in self.edits
        ]
        return np.concatenate(parts) if parts else target[:0]

    @property
    def num_kept(self) -> int:
        return sum(e.end - e.start for e in self.edits if e.op is Op.KEEP)


def edit_script(matches: list[Match], donor_len: int, target_len: int) -> EditScript:
    """The script whose kept runs are `matches` (monotone, disjoint, as `align` returns)."""
    edits: list[Edit] = []
    donor_at = at = 0
    for match in [*matches, Match(donor_len, target_len, 0)]:
        deleted, inserted = match.donor_start > donor_at, match.start > at
        if deleted or inserted:
            op = Op.REPLACE if deleted and inserted else Op.DELETE if deleted else Op.INSERT
            edits.append(Edit(op, donor_at, match.donor_start, at, match.start))
        donor_at, at = match.donor_start + match.length, match.start + match.length
        if match.length:
            edits.append(Edit(Op.KEEP, match.donor_start, donor_at, match.start, at))
    return EditScript(tuple(edits))


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """Number of equal leading keys."""
    n = min(len(a), len(b))
    differs = np.flatnonzero(a[:n] != b[:n])
    return int(differs[0]) if len(differs) else n


def align(donor: np.ndarray, target: np.ndarray, min_run: int = 4) -> list[Match]:
    """A heavy monotone alignment made of runs of at least `min_run` equal keys.

    Args:
        donor: ``[M]`` uint64 keys.
        target: ``[N]`` uint64 keys.
        min_run: shortest run worth keeping, at least 1.

    Returns:
        Disjoint matches, ascending in both sequences. A match that overlaps its predecessor is cut
        and may end up shorter than `min_run`. It is the heaviest alignment unless there are more
        than 96 matches, or on very repetitive input more than 16 seeds per position (the most
        frequent are left out then); it is always a valid one.
    """
    if min_run < 1:
        raise ValueError("min_run must be at least 1")
    prefix = common_prefix(donor, target)
    if prefix == len(target):
        return [Match(0, 0, prefix)] if prefix >= min_run else []
    suffix = common_prefix(donor[prefix:][::-1], target[prefix:][::-1])
    # The common ends are maximal matches already, unless their seeds were too frequent to use.
    ends = Match(0, 0, prefix), Match(len(donor) - suffix, len(target) - suffix, suffix)
    matches = maximal_matches(donor, target, min_run)
    return _chain([*matches, *(m for m in ends if m.length >= min_run)], min_run)


def maximal_matches(donor: np.ndarray, target: np.ndarray, min_run: int) -> list[Match]:
    """All maximal common runs of at least `min_run` keys, in any order, overlaps included.

    Seeds are `min_run`-gram hashes; equal keys are verified, so a hash collision costs nothing.
    """
    if len(donor) < min_run or len(target) < min_run:
        return []
    donor_grams, target_grams = ngram_hashes(donor, min_run), ngram_hashes(target, min_run)
    order = np.argsort(donor_grams, kind="stable")
    ranked = donor_grams[order]
    low = np.searchsorted(ranked, target_grams, side="left")
    counts = np.searchsorted(ranked, target_grams, side="right") - low
    budget = _MAX_SEEDS_PER_POSITION * (len(donor) + len(target))
    if counts.sum() > budget:
        # Very repetitive input: keep the rarest seeds that fit the budget.
        by_count = np.argsort(counts, kind="stable")
        cut = by_count[np.cumsum(counts[by_count]) > budget]
        counts[cut] = 0
    at = np.repeat(np.arange(len(target_grams)), counts)
    if not len(at):
        return []
    offsets = np.arange(len(at)) - np.repeat(np.cumsum(counts) - counts, counts)
    donor_at = order[np.repeat(low, counts) + offsets]
    same = (
        sliding_window_view(donor, min_run)[donor_at] == sliding_window_view(target, min_run)[at]
    ).all(axis=1)
    at, donor_at = at[same], donor_at[same]
    if not len(at):
        return []
    # Seeds next to each other on one diagonal are one run.
    diagonal = donor_at - at
    by_diagonal = np.lexsort((at, diagonal))
    at, donor_at, diagonal = at[by_diagonal], donor_at[by_diagonal], diagonal[by_diagonal]
    breaks = np.flatnonzero((np.diff(at) != 1) | (np.diff(diagonal) != 0)) + 1
    starts = np.concatenate(([0], breaks))
    lengths = np.diff(np.concatenate((starts, [len(at)]))) + min_run - 1
    if len(starts) > _MAX_MATCHES:
        longest = np.sort(np.argsort(-lengths, kind="stable")[:_MAX_MATCHES])
        starts, lengths = starts[longest], lengths[longest]
    return [
        Match(int(d), int(t), int(n))
        for d, t, n in zip(donor_at[starts], at[starts], lengths, strict=True)
    ]


def _chain(matches: list[Match], min_run: int) -> list[Match]:
    """A heavy chain of matches ascending in both sequences; overlaps are cut from the later one.

    Up to 96 matches the heaviest chain is found. A template's repeated phrases make far more, most
    of them short and crossing each other: then the longest are chained first, and the others only
    fill the boxes between them.
    """
    if len(matches) <= _MAX_CHAINED:
        return _heaviest_chain(matches)
    by_length = sorted(matches, key=lambda m: -m.length)
    anchors = _heaviest_chain(by_length[:_MAX_CHAINED])
    table = np.array(by_length[_MAX_CHAINED:])
    chain: list[Match] = []
    donor_at = at = 0
    infinite = np.iinfo(np.int64).max
    for anchor in [*anchors, Match(infinite, infinite, 0)]:
        box = _clip(table, donor_at, anchor.donor_start, at, anchor.start, min_run)
        chain.extend(_chain(box, min_run))
        if anchor.length:
            chain.append(anchor)
            donor_at, at = anchor.donor_start + anchor.length, anchor.end
    return chain


def _clip(
    table: np.ndarray, donor_low: int, donor_high: int, low: int, high: int, min_run: int
) -> list[Match]:
    """What of the matches (``[M, 3]``) lies in donor and target bounds, `min_run` long or more."""
    if high - low < min_run or donor_high - donor_low < min_run:
        return []
    donor_start, start, length = table.T
    cut = np.maximum(0, np.maximum(donor_low - donor_start, low - start))
    over = np.maximum(0, np.maximum(donor_start + length - donor_high, start + length - high))
    left = length - cut - over
    inside = left >= min_run
    return [
        Match(int(d), int(t), int(n))
        for d, t, n in zip(
            (donor_start + cut)[inside], (start + cut)[inside], left[inside], strict=True
        )
    ]


def _heaviest_chain(matches: list[Match]) -> list[Match]:
    """The heaviest chain. Exact: an alignment's runs ascend with their starts and their ends."""
    if not matches:
        return []
    matches = sorted(matches, key=lambda m: (m.start, m.donor_start))
    start = np.array([m.start for m in matches])
    donor_start = np.array([m.donor_start for m in matches])
    length = np.array([m.length for m in matches])
    end, donor_end = start + length, donor_start + length
    score = length.astype(np.int64).copy()
    previous = np.full(len(matches), -1)
    for i in range(1, len(matches)):
        overlap = np.maximum(0, np.maximum(end[:i] - start[i], donor_end[:i] - donor_start[i]))
        gain = score[:i] + length[i] - overlap
        gain[
            (overlap >= length[i]) | (donor_start[:i] > donor_start[i]) | (start[:i] > start[i])
        ] = -1
        best = int(np.argmax(gain))
        if gain[best] > score[i]:
            score[i], previous[i] = gain[best], best
    chain: list[Match] = []
    i = int(np.argmax(score))
    while i >= 0:
        chain.append(matches[i])
        i = int(previous[i])
    chain.reverse()
    trimmed: list[Match] = []
    at = donor_at = 0
    for match in chain:
        cut = max(0, at - match.start, donor_at - match.donor_start)
        kept = Match(match.donor_start + cut, match.start + cut, match.length - cut)
        trimmed.append(kept)
        at, donor_at = kept.end, kept.donor_start + kept.length
    return trimmed
