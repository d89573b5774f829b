"""Hashes of n-grams of alignment keys: the words of everything lexical."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

NGRAM = 3
"""Default n. On pairs of similar prompts 3 found the donor more often than 4 or 5 (short edits
break long n-grams), and as often as 2, whose posting lists are much longer."""

_SKETCH = 64

_SEED = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIER = np.uint64(0xBF58476D1CE4E5B9)
_FINAL = np.uint64(0x94D049BB133111EB)


def ngram_hashes(keys: NDArray[np.uint64], n: int = NGRAM) -> NDArray[np.uint64]:
    """Hash every window of `n` consecutive keys.

    Equal windows give equal hashes anywhere in any stream. The values are spread evenly over 64
    bits, so the smallest of them, or their low 32 bits, are a fair sample.

    Args:
        keys: ``[N]`` uint64 alignment keys.
        n: window length in positions, at least 1.

    Returns:
        ``[N - n + 1]`` uint64 in stream order, repeats included; empty if ``N < n``.

    Raises:
        ValueError: `n` is below 1 or `keys` is not a vector of uint64.
    """
    if n < 1:
        raise ValueError(f"n-grams need n >= 1, got {n}")
    if keys.ndim != 1 or keys.dtype != np.uint64:
        raise ValueError(f"keys must be a uint64 vector, got {keys.dtype} {keys.shape}")
    count = len(keys) - n + 1
    if count <= 0:
        return np.empty(0, dtype=np.uint64)
    state = np.full(count, _SEED, dtype=np.uint64)
    for offset in range(n):
        # Token ids are small: without a full mix per key, windows such as (1, 2) and (2, 1), or
        # ids that differ in few bits, would meet in the same hash.
        state ^= keys[offset : offset + count]
        state *= _MULTIPLIER
        state ^= state >> np.uint64(29)
    state *= _FINAL
    state ^= state >> np.uint64(32)
    return state


def smallest_ngrams(
    keys: NDArray[np.uint64], most: int, n: int = NGRAM
) -> tuple[NDArray[np.uint64], float]:
    """A bounded sample of the distinct n-grams: those with the smallest hashes.

    The choice depends on the hash alone, so what two prompts share is in both samples or in
    neither, up to the smaller of the two thresholds (bottom-k sampling).

    Args:
        keys: ``[N]`` uint64 alignment keys.
        most: largest sample.
        n: window length in positions.

    Returns:
        ``[U]`` uint64 distinct hashes, ascending, ``U <= most``; and the share of the distinct
        n-grams that is in the sample, in ``(0, 1]``.
    """
    distinct = np.unique(ngram_hashes(keys, n))
    # A copy, or the sample would keep the whole array alive.
    return distinct[:most].copy(), min(1.0, most / max(1, len(distinct)))


def sketch(keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """What tells whether two prompts are alike: see `overlap`."""
    return smallest_ngrams(keys, _SKETCH)[0]


def overlap(mine: NDArray[np.uint64], theirs: NDArray[np.uint64]) -> float:
    """About the share of one prompt's distinct n-grams that another has, by their sketches."""
    both = np.intersect1d(mine, theirs, assume_unique=True)
    return len(both) / max(1, len(mine))
