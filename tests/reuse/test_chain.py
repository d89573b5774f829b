"""Numbered windows, and the chain of matches that they make."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvshare_mm.reuse.chain import heavy_chain
from kvshare_mm.reuse.ranks import rank_windows, widened
from kvshare_mm.stream import media_keys

# -- numbered windows: equal where the windows are, and nowhere else -------------------------------


SYMBOLS = np.array(
    [0, 1, 2, 150_000, 2**32, 2**63, 2**64 - 1, *media_keys("05" * 32, 3)], dtype=np.uint64
)
sequences = st.integers(1, len(SYMBOLS)).flatmap(
    lambda n: st.lists(st.lists(st.integers(0, n - 1), max_size=30), min_size=1, max_size=4)
)


def check(ranked, keys, width) -> None:
    assert ranked.width == width
    number_of: dict[tuple[int, ...], int] = {}
    for numbers, sequence in zip(ranked.numbers, keys, strict=True):
        windows = [
            tuple(sequence[i : i + width].tolist()) for i in range(len(sequence) - width + 1)
        ]
        assert len(numbers) == len(windows)
        for number, window in zip(numbers.tolist(), windows, strict=True):
            assert number_of.setdefault(window, number) == number
            assert 0 <= number < ranked.count
    assert len(set(number_of.values())) == len(number_of)


@given(sequences, st.integers(1, 9), st.integers(0, 12))
def test_windows_have_equal_numbers_only_if_they_are_equal(symbols, width, more):
    keys = [SYMBOLS[np.array(s, dtype=np.int64)] for s in symbols]
    ranked = rank_windows(keys, width)
    check(ranked, keys, width)
    check(widened(ranked, width + more), keys, width + more)


@pytest.mark.parametrize("alphabet", [1, 2, 100_000, 2**60])
def test_windows_of_many_keys(alphabet):
    """Where numbers of windows and their indexes fill 64 bits, too."""
    keys = [np.random.default_rng(i).integers(0, alphabet, 3000).astype(np.uint64) for i in (0, 1)]
    check(rank_windows(keys, 4), keys, 4)


# -- the chain of matches against the plain recursion that it does for many boxes at once ----------


MOST = 96
Row = tuple[int, int, int]


def slow_chain(matches: list[Row], min_run: int) -> list[Row]:
    """Donor start, target start, length: the longest are chained, the others fill the boxes."""
    if len(matches) <= MOST:
        return heaviest(matches)
    matches = sorted(matches, key=lambda m: -m[2])
    anchors = heaviest(matches[:MOST])
    found: list[Row] = []
    donor_at = at = 0
    for donor_start, start, length in [*anchors, (10**9, 10**9, 0)]:
        box = []
        for d, t, n in matches[MOST:]:
            cut = max(0, donor_at - d, at - t)
            left = n - cut - max(0, d + n - donor_start, t + n - start)
            if left >= min_run:
                box.append((d + cut, t + cut, left))
        found += slow_chain(box, min_run)
        if length:
            found.append((donor_start, start, length))
        donor_at, at = donor_start + length, start + length
    return found


def heaviest(matches: list[Row]) -> list[Row]:
    matches = sorted(matches, key=lambda m: (m[1], m[0]))
    score, previous = [], []
    for i, (d, t, n) in enumerate(matches):
        score.append(n)
        previous.append(-1)
        for j, (e, u, m) in enumerate(matches[:i]):
            overlap = max(0, u + m - t, e + m - d)
            if e <= d and overlap < n and score[j] + n - overlap > score[i]:
                score[i], previous[i] = score[j] + n - overlap, j
    chain: list[Row] = []
    i = score.index(max(score)) if score else -1
    while i >= 0:
        chain.append(matches[i])
        i = previous[i]
    cut_chain: list[Row] = []
    at = donor_at = 0
    for d, t, n in reversed(chain):
        cut = max(0, at - t, donor_at - d)
        cut_chain.append((d + cut, t + cut, n - cut))
        at, donor_at = t + n, d + n
    return cut_chain


@st.composite
def tables(draw):
    """Matches anywhere, few or crowded, some of them twice, some in each other's way."""
    size = draw(st.sampled_from([0, 1, 5, 40, 96, 97, 200, 300]))
    spread = draw(st.sampled_from([20, 300, 3000]))
    longest = draw(st.sampled_from([4, 9, 60]))
    aligned = draw(st.sampled_from([0, 3, spread]))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    start = rng.integers(0, spread, size)
    donor_start = np.abs(start + rng.integers(-aligned, aligned + 1, size))
    return np.stack((donor_start, start, rng.integers(3, longest, size)), axis=1)


@settings(max_examples=150)
@given(tables(), st.integers(1, 4))
def test_many_boxes_at_once_give_what_one_after_the_other_does(table, min_run):
    chain = heavy_chain(table, min_run)
    slow = slow_chain([tuple(row) for row in table.tolist()], min_run)
    # Where several chains weigh the same, either may be found.
    assert chain[:, 2].sum() == sum(n for _, _, n in slow)
    assert (chain[:, 2] > 0).all()
    for axis in (0, 1):
        assert (chain[1:, axis] >= (chain[:, axis] + chain[:, 2])[:-1]).all()


def test_what_follows_each_other_is_its_own_chain_however_long():
    start = np.arange(0, 30_000, 10)
    table = np.stack((start + 3, start, np.full(len(start), 6)), axis=1)
    shuffled = np.random.default_rng(0).permutation(np.concatenate((table, table[:5])))
    assert heavy_chain(shuffled, 4).tolist() == table.tolist()
