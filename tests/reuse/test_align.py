"""Alignment against slow, obvious references: difflib, brute force, and dynamic programming."""

from __future__ import annotations

import difflib
from unittest import mock

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvshare_mm.reuse import align as align_module
from kvshare_mm.reuse import runs
from kvshare_mm.reuse.align import MAX_MATCHES, Match, align, common_prefix
from kvshare_mm.stream import media_keys

from .plans import edited, maximal_matches

# Text, the ends of the range, and media keys, which only fit an unsigned type.
EDGES = np.array([0, 1, 7, 2**63 - 1, 2**63, 2**64 - 1], dtype=np.uint64)
SYMBOLS = np.concatenate((EDGES, media_keys("5a" * 32, 26)))
min_runs = st.integers(1, 6)


def to_keys(symbols: list[int]) -> np.ndarray:
    return SYMBOLS[np.array(symbols, dtype=np.int64)]


@st.composite
def sequences(draw, max_size=32):
    """Few different keys, so that there are many matches."""
    alphabet = draw(st.sampled_from([1, 2, 3, 8, 32]))
    return draw(st.lists(st.integers(0, alphabet - 1), max_size=max_size))


@st.composite
def pairs(draw, max_size=32):
    donor = draw(sequences(max_size))
    target = draw(edited(donor) if draw(st.booleans()) else sequences(max_size))
    if draw(st.booleans()):
        donor, target = target, donor
    return to_keys(donor[:max_size]), to_keys(target[:max_size])


def check_valid(matches: list[Match], donor: np.ndarray, target: np.ndarray) -> None:
    at = donor_at = 0
    for match in matches:
        assert match.length > 0
        assert match.start >= at
        assert match.donor_start >= donor_at
        at, donor_at = match.end, match.donor_start + match.length
        assert at <= len(target)
        assert donor_at <= len(donor)
        assert np.array_equal(donor[match.donor_start : donor_at], target[match.start : at])


def covered(matches: list[Match]) -> int:
    return sum(m.length for m in matches)


def brute_force_matches(donor: np.ndarray, target: np.ndarray, min_run: int) -> set[Match]:
    found = set()
    for d in range(len(donor)):
        for t in range(len(target)):
            if d and t and donor[d - 1] == target[t - 1]:
                continue
            n = common_prefix(donor[d:], target[t:])
            if n >= min_run:
                found.add(Match(d, t, n))
    return found


def heaviest(donor: np.ndarray, target: np.ndarray, min_run: int) -> int:
    """Longest common subsequence of pairs that stand in a common run of at least `min_run`."""
    allowed = np.zeros((len(donor), len(target)), dtype=bool)
    for m in brute_force_matches(donor, target, min_run):
        allowed[m.donor_start + np.arange(m.length), m.start + np.arange(m.length)] = True
    best = np.zeros((len(donor) + 1, len(target) + 1), dtype=int)
    for d in range(len(donor)):
        for t in range(len(target)):
            best[d + 1, t + 1] = max(
                best[d, t + 1], best[d + 1, t], best[d, t] + int(allowed[d, t])
            )
    return int(best[-1, -1])


def difflib_covered(donor: np.ndarray, target: np.ndarray, min_run: int) -> int:
    matcher = difflib.SequenceMatcher(None, donor.tolist(), target.tolist(), autojunk=False)
    return sum(b.size for b in matcher.get_matching_blocks() if b.size >= min_run)


# Below 32 x 32 the seeds can never exceed their budget, whatever the keys.
@settings(max_examples=300)
@given(pairs(), min_runs)
@example((to_keys([]), to_keys([])), 1)
@example((to_keys([]), to_keys([1])), 1)
@example((to_keys([1]), to_keys([])), 1)
@example((to_keys([1]), to_keys([1])), 1)
def test_align_is_valid_and_as_heavy_as_can_be(pair, min_run):
    donor, target = pair
    matches = align(donor, target, min_run)
    check_valid(matches, donor, target)
    best = heaviest(donor, target, min_run)
    assert covered(matches) <= best
    # With more than 96 matches (and the common ends) speed goes before the last few keys.
    if len(brute_force_matches(donor, target, min_run)) <= 94:
        assert covered(matches) == best
        assert covered(matches) >= difflib_covered(donor, target, min_run)


@settings(max_examples=300)
@given(pairs(), min_runs, st.sampled_from([0, runs._PAIRS_PER_RUN]))
def test_maximal_matches_are_all_and_only_the_maximal_ones(pair, min_run, pairs_per_run):
    """Found from all pairs of windows, or from the ends of runs."""
    donor, target = pair
    with mock.patch.object(runs, "_PAIRS_PER_RUN", pairs_per_run):
        found = maximal_matches(donor, target, min_run)
    assert len(found) == len(set(found))
    assert set(found) == brute_force_matches(donor, target, min_run)


@settings(max_examples=30)
@given(st.randoms(use_true_random=False), st.integers(1, 8))
def test_long_edited_prompts_are_covered_at_least_as_difflib_does(random, min_run):
    donor = [random.randrange(3000) for _ in range(random.randrange(200, 600))]
    target = list(donor)
    for _ in range(random.randrange(12)):
        a = random.randrange(len(target))
        b = min(len(target), a + random.choice([1, 2, 5, 40]))
        match random.randrange(4):
            case 0:
                del target[a:b]
            case 1:
                target[a:b] = [random.randrange(3000) for _ in range(random.randrange(20))]
            case 2:
                block = target[a:b]
                del target[a:b]
                at = random.randrange(len(target) + 1)
                target[at:at] = block
            case 3:
                target[a:a] = target[a:b]
    donor_keys, target_keys = np.array(donor, np.uint64), np.array(target, np.uint64)
    matches = align(donor_keys, target_keys, min_run)
    check_valid(matches, donor_keys, target_keys)
    assert covered(matches) >= difflib_covered(donor_keys, target_keys, min_run)


@pytest.mark.parametrize("min_run", [1, 4])
@pytest.mark.parametrize(
    ("donor", "target"),
    [
        pytest.param([5] * 4000, [5] * 3999 + [6], id="equal, other end"),
        pytest.param([6] + [5] * 4000, [5] * 4000, id="equal, other start"),
        pytest.param([5] * 4000, [7] + [5] * 2000 + [7], id="equal inside"),
        pytest.param([1, 2] * 2000, [2, 1] * 1500 + [3], id="two alternate"),
        pytest.param([1, 2, 3] * 1300, [9] + [3, 1, 2] * 1300 + [9], id="three rotate"),
        pytest.param([5] * 4000, [5], id="short target"),
    ],
)
def test_very_repetitive_input_is_aligned_truly(donor, target, min_run):
    donor_keys, target_keys = np.array(donor, np.uint64), np.array(target, np.uint64)
    matches = align(donor_keys, target_keys, min_run)
    check_valid(matches, donor_keys, target_keys)
    # One run or two of them, whatever the millions of others.
    assert covered(matches) >= min(len(donor), len(target)) - 3
    found = maximal_matches(donor_keys, target_keys, min_run)
    assert len(found) <= MAX_MATCHES
    for d, t, n in found:
        assert np.array_equal(donor_keys[d : d + n], target_keys[t : t + n])


@settings(max_examples=60)
@given(st.randoms(use_true_random=False), st.integers(1, 4), min_runs)
def test_input_with_too_many_runs_is_still_aligned_truly(random, alphabet, min_run):
    donor, target = (
        to_keys([random.randrange(alphabet) for _ in range(random.randrange(100, 700))])
        for _ in range(2)
    )
    with mock.patch.object(align_module, "_LEAST_RUNS", 0):
        check_valid(align(donor, target, min_run), donor, target)
        found = maximal_matches(donor, target, min_run)
    assert len(found) == len(set(found))
    for d, t, n in found:
        assert n >= min_run
        assert np.array_equal(donor[d : d + n], target[t : t + n])


def test_of_too_many_runs_the_long_ones_are_found():
    """Noise of two symbols, and in it one stretch in common that moved."""
    rng = np.random.default_rng(0)
    donor, target, common = (rng.integers(0, 2, n).astype(np.uint64) for n in (6000, 6000, 300))
    donor[1000:1300], target[4000:4300] = common, common
    with mock.patch.object(align_module, "_LEAST_RUNS", 0):
        found = maximal_matches(donor, target, 4)
    assert any(d <= 1000 and t - d == 3000 and d + n >= 1300 for d, t, n in found)


def test_of_too_many_runs_those_of_rare_keys_and_beside_them_are_found():
    """Between lines of one symbol stand words that are nowhere else."""
    lines = [[7] * 30 + [100 + 2 * i, 101 + 2 * i] for i in range(100)]
    donor = np.array([key for line in lines for key in line], np.uint64)
    target = np.array(
        [5, *(key for line in lines for key in [*line[:-2], 99, line[-1]])], np.uint64
    )
    with mock.patch.object(align_module, "_LEAST_RUNS", 0):
        matches = align(donor, target, 2)
    check_valid(matches, donor, target)
    # All but one key of a line.
    assert covered(matches) >= 31 * 99


@pytest.mark.parametrize("min_run", [0, -1])
def test_a_run_has_at_least_one_key(min_run):
    with pytest.raises(ValueError, match="min_run"):
        align(to_keys([1]), to_keys([1]), min_run)
