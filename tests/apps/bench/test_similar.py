"""The filter of prompts with a near-identical partner."""

from __future__ import annotations

import numpy as np
import pytest

from kvshare_mm.apps.bench.similar import have_partner, nearest_before


def at(*degrees: float) -> np.ndarray:
    radians = np.radians(degrees)
    return np.stack([np.cos(radians), np.sin(radians)], axis=1).astype(np.float32)


def test_partners_are_within_a_cosine_distance() -> None:
    # A cosine of 0.95 is 18.2 degrees.
    vectors = at(0, 18, 90, 110, 180)
    assert have_partner(vectors).tolist() == [True, True, False, False, False]
    assert have_partner(vectors, 0.07).tolist() == [True, True, True, True, False]


def test_nobody_is_his_own_partner() -> None:
    assert have_partner(at(0, 90)).tolist() == [False, False]
    assert have_partner(at(0)).tolist() == [False]
    assert have_partner(at(0, 0)).tolist() == [True, True]


def test_blocks_do_not_matter() -> None:
    vectors = at(*np.random.default_rng(0).uniform(0, 3600, 40))
    whole = have_partner(vectors, 0.0005)
    assert 0 < whole.sum() < 40
    assert (have_partner(vectors, 0.0005, block=7) == whole).all()


def test_the_nearest_of_those_before() -> None:
    vectors = at(0, 60, 90, 10)
    assert nearest_before(vectors, 3, 10) == pytest.approx(np.cos(np.radians(10)), abs=1e-6)
    assert nearest_before(vectors, 3, 2) == pytest.approx(np.cos(np.radians(50)), abs=1e-6)
    assert nearest_before(vectors, 0, 10) == -1
