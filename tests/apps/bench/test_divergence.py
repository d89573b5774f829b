"""Divergence, checked against slow formulas and known answers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvshare_mm.apps.bench.divergence import KVDeviation, agreement, kv_deviation, mean_deviation
from kvshare_mm.reuse.audits import kl_divergence
from kvshare_mm.reuse.plan import KeptRun, ReusePlan


def slow_kl(full: list[float], other: list[float]) -> float:
    def log_probs(logits: list[float]) -> list[float]:
        top = max(logits)
        total = math.fsum(math.exp(x - top) for x in logits)
        return [x - top - math.log(total) for x in logits]

    pairs = zip(log_probs(full), log_probs(other), strict=True)
    return math.fsum(math.exp(p) * (p - q) for p, q in pairs)


_LOGITS = st.floats(-30, 30, width=32)


@settings(max_examples=50)
@given(st.lists(st.tuples(_LOGITS, _LOGITS), min_size=1, max_size=20))
def test_kl_is_the_formula(pairs: list[tuple[float, float]]) -> None:
    full, other = [list(column) for column in zip(*pairs, strict=True)]
    found = kl_divergence(torch.tensor(full), torch.tensor(other))
    assert found == pytest.approx(slow_kl(full, other), rel=1e-6, abs=1e-9)
    assert found >= 0
    assert kl_divergence(torch.tensor(full), torch.tensor(full)) == 0


@pytest.mark.parametrize(
    ("full", "other", "share"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 4], 1),
        ([1, 2, 3, 4], [1, 2, 9, 4], 0.5),  # what agrees again later does not count
        ([1, 2, 3, 4], [9, 2, 3, 4], 0),
        ([1, 2, 3, 4], [1], 0.25),
        ([1], [1, 2, 3], 1),
    ],
)
def test_agreement_is_the_common_beginning(full: list[int], other: list[int], share: float) -> None:
    assert agreement(full, other) == share


def test_kv_deviation_by_hand() -> None:
    # Positions 2 and 3 are reused, 4 is repaired, the others were computed or are exact.
    plan = ReusePlan(6, (KeptRun("d", 0, 0, 1, True), KeptRun("d", 2, 2, 3, False)), np.array([4]))
    key = torch.ones(2, 1, 8, 4)  # every position's key has norm 2
    value = key.clone()
    other_key, other_value = key.clone(), value.clone()
    other_key[1, 0, 2, 0] += 1.0  # layer 1, position 2: off by 1 of 2
    other_value[0, 0, 3] *= 2  # layer 0, position 3: off by 2 of 2
    other_value[:, :, 4] = 99  # repaired: not compared
    other_value[:, :, 6:] = 99  # behind the prompt: not compared
    found = kv_deviation(plan, (key, value), (other_key, other_value))
    assert found == KVDeviation((0.0, 0.25), (0.5, 0.0), 2)


def test_kv_deviation_of_nothing() -> None:
    kv = (torch.ones(1, 1, 4, 2), torch.ones(1, 1, 4, 2))
    assert kv_deviation(ReusePlan(4, (KeptRun("d", 0, 0, 2, True),)), kv, kv) is None
    assert mean_deviation([]) is None


def test_mean_deviation_weighs_positions() -> None:
    parts = [KVDeviation((1.0,), (0.0,), 1), KVDeviation((0.0,), (0.4,), 3)]
    found = mean_deviation(parts)
    assert found is not None
    assert found.key == (0.25,)
    assert found.value == pytest.approx((0.3,))
    assert found.positions == 4
