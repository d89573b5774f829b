"""Numbered windows: equal where the windows are, and nowhere else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvshare_mm.reuse.ranks import rank_windows, widened
from kvshare_mm.stream import media_keys

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
