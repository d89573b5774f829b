"""Numbers for the windows of several sequences: equal windows, and only they, have equal numbers.

Prefix doubling (Manber and Myers, "Suffix arrays", 1993): the number of a long window is made from
the numbers of shorter ones that cover it, so a few sorts number windows of any width, nothing is
hashed and no two different windows can be taken for each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

_SMALL = 1 << 20
"""Keys below it (token ids) number themselves."""


@dataclass(frozen=True, slots=True)
class Ranked:
    """Numbered windows of `width` keys.

    Attributes:
        numbers: per sequence of N keys ``[max(0, N - width + 1)]`` int64, each below `count`.
        width: keys in a window.
        count: number of different windows.
    """

    numbers: tuple[Ints, ...]
    width: int
    count: int


def rank_windows(sequences: Sequence[NDArray[np.uint64]], width: int) -> Ranked:
    """Number the windows of `width` keys of all `sequences`.

    Args:
        sequences: ``[N]`` uint64 keys each.
        width: at least 1.
    """
    largest = max((int(keys.max()) for keys in sequences if len(keys)), default=0)
    if width > 1 and largest < _SMALL:
        keys = Ranked(tuple(keys.astype(np.int64) for keys in sequences), 1, largest + 1)
    else:
        keys = _dense(sequences, 1)
    return widened(keys, width)


def widened(ranked: Ranked, width: int) -> Ranked:
    """Number windows of `width` keys from those of a smaller (or the same) width."""
    while ranked.width < width:
        index_bits = sum(map(len, ranked.numbers)).bit_length()
        bits = max(1, (ranked.count - 1).bit_length())
        # Two always fit: what does not fit beside an index is sorted without one.
        most = max(2, (63 - index_bits) // bits)
        now = min(width, most * ranked.width)
        offsets = [*range(0, now - ranked.width, ranked.width), now - ranked.width]
        packed = []
        for numbers in ranked.numbers:
            windows = max(0, len(numbers) - offsets[-1])
            joined = np.zeros(windows, dtype=np.int64)
            for offset in offsets:
                joined = (joined << bits) | numbers[offset : offset + windows]
            packed.append(joined)
        ranked = _dense(packed, now)
    return ranked


def _dense(sequences: Sequence[NDArray[Any]], width: int) -> Ranked:
    """Replace numbers by their rank among the different ones."""
    ends = np.cumsum([len(s) for s in sequences]).tolist()
    joined = np.concatenate([*sequences, np.empty(0, sequences[0].dtype)])
    if not len(joined):
        return Ranked(tuple(np.empty(0, np.int64) for _ in sequences), width, 0)
    index_bits = len(joined).bit_length()
    if int(joined.max()) >> (63 - index_bits):
        order = np.argsort(joined)
        ranked = joined[order]
    else:
        # A plain sort of values with their indexes is several times faster than an argsort.
        packed = np.sort((joined.astype(np.int64) << index_bits) | np.arange(len(joined)))
        order, ranked = packed & ((1 << index_bits) - 1), packed >> index_bits
    ranks = np.zeros(len(joined), dtype=np.int64)
    np.cumsum(ranked[1:] != ranked[:-1], out=ranks[1:])
    numbers = np.empty_like(ranks)
    numbers[order] = ranks
    return Ranked(tuple(np.split(numbers, ends[:-1])), width, int(ranks[-1]) + 1)


def consecutive(first: Ints, count: Ints) -> Ints:
    """``first, first + 1, ...``: so many as `count` says of each, one after the other."""
    return np.arange(count.sum()) + np.repeat(first - np.cumsum(count) + count, count)
