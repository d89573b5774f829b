"""The heaviest way to go through matches in one order: dynamic programming on many boxes at once.

A match is a row of donor start, target start and length (int64). Of a chain both starts and both
ends ascend; where a match reaches into the one before, that much of it is cut.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvshare_mm.reuse.ranks import Ints, consecutive

_MAX_CHAINED = 96
"""Matches of one box that are weighed against each other, the longest ones."""

_MAX_LEVELS = 4
"""How often boxes are split by what was chained in them; recorded agent sessions need three."""

_CELLS = 1 << 17
"""Pairs of matches looked at together: their table stays in the cache."""

_NEVER = np.iinfo(np.int64).min // 2


def heavy_chain(matches: Ints, min_run: int) -> Ints:
    """A heavy chain of matches: ``[m, 3]`` -> ``[c, 3]``, ascending.

    Up to 96 matches the heaviest chain is found. A template's repeated phrases make far more, most
    of them short and crossing each other: then the longest are chained first, and the others only
    fill the boxes between them, level by level.

    Args:
        matches: equal runs of at least one key, in any order.
        min_run: what is cut to fit a box must still be that long.
    """
    chained = [matches[:0]]
    box = np.zeros(len(matches), dtype=np.int64)
    for _ in range(_MAX_LEVELS):
        followers, mixed = _without_conflict(matches, box)
        chained.append(matches[followers])
        matches, box = matches[mixed], box[mixed]
        if not len(matches):
            break
        crowded = np.bincount(box)[box] > _MAX_CHAINED
        order = _order(box, np.where(crowded, matches[:, 2].max() - matches[:, 2], 0))
        matches, box = matches[order], box[order]
        now = np.arange(len(box)) - np.searchsorted(box, box) < _MAX_CHAINED
        chain, chain_box = _heaviest_chains(matches[now], box[now])
        chained.append(chain)
        matches, box = _into_boxes(matches[~now], box[~now], chain, chain_box, min_run)
    found = np.concatenate(chained)
    return found[np.argsort(found[:, 1], kind="stable")]


def _order(*columns: Ints) -> Ints:
    """Stable order by the first column, then the next: as `np.lexsort`, but packed and faster."""
    code = np.zeros(len(columns[0]), dtype=np.int64)
    for column in columns:
        code = (code << int(column.max(initial=0)).bit_length()) | column
    return np.argsort(code, kind="stable")


def _without_conflict(matches: Ints, box: Ints) -> tuple[Ints, NDArray[np.bool_]]:
    """Boxes in which the matches all follow each other are their own chains.

    Returns:
        Indexes of the matches of such boxes, each once; ``[m]`` bool: the match is in another box.
    """
    order = _order(box, matches[:, 1], matches[:, 0])
    repeated = (matches[order[1:]] == matches[order[:-1]]).all(axis=1)
    repeated &= box[order[1:]] == box[order[:-1]]
    order = order[np.concatenate(([True], ~repeated))[: len(order)]]
    (donor_start, start, length), of = matches[order].T, box[order]
    early = (start[1:] < (start + length)[:-1]) | (donor_start[1:] < (donor_start + length)[:-1])
    conflicts = np.zeros(int(box.max(initial=0)) + 1, dtype=bool)
    conflicts[of[1:][early & (of[1:] == of[:-1])]] = True
    return order[~conflicts[of]], conflicts[box]


def _heaviest_chains(matches: Ints, box: Ints) -> tuple[Ints, Ints]:
    """The heaviest chain of each box, and the box of each of its matches; both by box, ascending.

    Exact: an alignment's runs ascend with their starts and their ends.
    """
    order = _order(box, matches[:, 1], matches[:, 0])
    matches, box = matches[order], box[order]
    first = np.flatnonzero(np.diff(box, prepend=-1))
    size = np.diff(first, append=len(box))
    chosen = np.zeros(len(matches), dtype=bool)
    by_size = np.argsort(size, kind="stable")
    # Boxes of about the same size go together, so that little of their tables is padding.
    at = 0
    while at < len(by_size):
        cells = size[by_size[at:]] ** 2 * np.arange(1, len(by_size) - at + 1)
        together = by_size[at : at + max(1, int(np.searchsorted(cells, _CELLS, "right")))]
        at += len(together)
        place = np.arange(size[together[-1]])
        real = place < size[together, None]
        rows = np.where(real, first[together, None] + place, 0)
        donor_start, start, length = (np.where(real, matches[rows, i], 0) for i in range(3))
        picked = _pick(donor_start, start, length)
        chosen[rows[picked]] = True
    chain, chain_box = matches[chosen], box[chosen]
    donor_end, end = chain[:, 0] + chain[:, 2], chain[:, 1] + chain[:, 2]
    cut = np.maximum(0, np.maximum(donor_end[:-1] - chain[1:, 0], end[:-1] - chain[1:, 1]))
    cut[chain_box[:-1] != chain_box[1:]] = 0
    chain[1:] += cut[:, None] * np.array((1, 1, -1))
    return chain, chain_box


def _pick(donor_start: Ints, start: Ints, length: Ints) -> NDArray[np.bool_]:
    """``[B, m]`` matches, those of a row by start, then nothing (length 0) -> ``[B, m]`` chosen."""
    boxes, count = start.shape
    donor_end, end = donor_start + length, start + length
    # What each match (row) adds to a chain that ends in an earlier one (column).
    added = length[:, :, None] - np.maximum(
        0,
        np.maximum(
            end[:, None, :] - start[:, :, None], donor_end[:, None, :] - donor_start[:, :, None]
        ),
    )
    added[(added <= 0) | (donor_start[:, None, :] > donor_start[:, :, None])] = _NEVER
    added = np.concatenate((length[:, :, None], added), axis=2)
    # Column 0 stands for no earlier match.
    score = np.zeros((boxes, count + 1), dtype=np.int64)
    previous = np.zeros((boxes, count + 1), dtype=np.int64)
    each = np.arange(boxes)
    for i in range(count):
        gain = score[:, : i + 1] + added[:, i, : i + 1]
        best = gain.argmax(axis=1)
        previous[:, i + 1] = best
        score[:, i + 1] = gain[each, best]
    chosen = np.zeros((boxes, count + 1), dtype=bool)
    at = score.argmax(axis=1)
    while at.any():
        chosen[each, at] = True
        at = previous[each, at]
    return chosen[:, 1:]


def _into_boxes(
    matches: Ints, box: Ints, chain: Ints, chain_box: Ints, min_run: int
) -> tuple[Ints, Ints]:
    """What of `matches` lies between two neighbours of its box's chain, `min_run` long or more.

    Returns:
        Pieces in the order of their matches, and numbers of the smaller boxes that they lie in.
    """
    if not len(matches):
        return matches, box
    span = int(max(matches.max(), chain.max())) * 2 + 1
    before = np.searchsorted(chain_box, box)
    low, high = before, before + np.searchsorted(chain_box, box, "right") - before
    for axis in (0, 1):
        starts = chain_box * span + chain[:, axis]
        start = box * span + matches[:, axis]
        low = np.maximum(low, np.searchsorted(starts, start + min_run))
        last = start + matches[:, 2] - min_run
        high = np.minimum(high, np.searchsorted(starts + chain[:, 2], last, "right"))
    # The boxes from the one before chain match `low` to the one before (or behind) `high`.
    count = np.maximum(0, high - low + 1)
    which = np.repeat(np.arange(len(matches)), count)
    anchor = consecutive(low, count)
    matches, box = matches[which], box[which]
    # Boxes at the ends of a chain are open: their matches were cut to the larger box already.
    leads = (anchor > 0) & (np.append(chain_box, -1)[anchor - 1] == box)
    follows = np.append(chain_box, -1)[anchor] == box
    chain = np.concatenate((chain, chain[:1]))
    cut, over = np.zeros(len(which), np.int64), np.zeros(len(which), np.int64)
    for axis in (0, 1):
        start = matches[:, axis]
        low_end = chain[anchor - 1, axis] + chain[anchor - 1, 2]
        cut = np.maximum(cut, np.where(leads, low_end - start, 0))
        beyond = start + matches[:, 2] - chain[anchor, axis]
        over = np.maximum(over, np.where(follows, beyond, 0))
    left = matches[:, 2] - cut - over
    inside = left >= min_run
    pieces = np.stack((matches[:, 0] + cut, matches[:, 1] + cut, left), axis=1)
    return pieces[inside], (anchor + box)[inside]
