"""Equal windows, and only those, get equal hashes; samples of two prompts agree."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvshare_mm.index.ngrams import ngram_hashes, smallest_ngrams

token_lists = st.lists(st.integers(0, 3), max_size=40)


def keys(tokens: list[int]) -> np.ndarray:
    return np.array(tokens, dtype=np.uint64)


@given(token_lists, st.integers(1, 5))
def test_hashes_are_equal_exactly_where_windows_are(tokens: list[int], n: int) -> None:
    hashes = ngram_hashes(keys(tokens), n)
    windows = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    assert hashes.dtype == np.uint64
    assert len(hashes) == len(windows)
    assert len(set(zip(windows, hashes.tolist(), strict=True))) == len(set(windows))
    assert len(set(hashes.tolist())) == len(set(windows))


def test_small_ids_and_media_keys_do_not_collide() -> None:
    ids = np.arange(20_000, dtype=np.uint64)
    media = ids | np.uint64(1 << 63)
    hashes = np.concatenate([ngram_hashes(x, 3) for x in (ids, ids[::-1].copy(), media)])
    assert len(np.unique(hashes)) == len(hashes)


def test_low_bits_and_high_bits_are_spread_evenly() -> None:
    hashes = ngram_hashes(np.arange(64_000, dtype=np.uint64))
    for shift in (0, 58):
        counts = np.bincount(((hashes >> np.uint64(shift)) & np.uint64(63)).astype(int))
        assert counts.min() > 800
        assert counts.max() < 1200


@pytest.mark.parametrize(
    ("bad", "n"),
    [(np.zeros((2, 2), np.uint64), 3), (np.zeros(5, np.int64), 3), (np.zeros(5, np.uint64), 0)],
)
def test_wrong_input_is_refused(bad: np.ndarray, n: int) -> None:
    with pytest.raises(ValueError, match=r"n-grams|uint64"):
        ngram_hashes(bad, n)


@given(token_lists, token_lists, st.integers(1, 20))
def test_samples_share_what_lies_below_both_thresholds(a: list[int], b: list[int], k: int) -> None:
    (sample_a, rate_a), (sample_b, rate_b) = (
        smallest_ngrams(keys(a), k),
        smallest_ngrams(keys(b), k),
    )
    all_a, all_b = np.unique(ngram_hashes(keys(a))), np.unique(ngram_hashes(keys(b)))
    assert np.array_equal(sample_a, all_a[:k])
    assert rate_a == (len(sample_a) / len(all_a) if len(all_a) else 1.0)
    limits = [s[-1] for s, rate in ((sample_a, rate_a), (sample_b, rate_b)) if rate < 1]
    shared = np.intersect1d(all_a, all_b)
    if limits:
        shared = shared[shared <= min(limits)]
    assert np.array_equal(np.intersect1d(sample_a, sample_b), shared)
