"""Drafts are as long as they pay, and families learn from each other's answers."""

from __future__ import annotations

import random

import pytest

from kvshare_mm.native import acceptance
from kvshare_mm.native.acceptance import Acceptance, Families, Rate, step_cost


def gain(chance: float, length: int, batch: int = 1) -> float:
    """Tokens that a draft gains on the mean, less those that the batch loses to its rows."""
    right = sum(chance**i for i in range(1, length + 1))
    return right - batch * (step_cost(batch + length) / step_cost(batch) - 1)


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("chance", [0.0, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9, 1.0])
def test_a_draft_has_the_length_that_saves_most(chance: float, batch: int) -> None:
    length = Rate(chance, 1.0).length(8, batch)
    best = max(gain(chance, n, batch) for n in range(1, 9))
    assert gain(chance, length, batch) == pytest.approx(max(best, 0.0))
    assert (length == 0) == (best <= 0)


def test_rows_that_are_nearly_free_are_used_and_dear_ones_are_not() -> None:
    assert Rate(0.6, 1.0).length(8) == 3, "a step of four rows costs little more than one of one"
    assert Rate(0.6, 1.0).length(8, batch=2) == 2
    assert Rate(0.6, 1.0).length(8, batch=4) == 0
    assert Rate(0.95, 1.0).length(8) == 8


@pytest.mark.parametrize("chance", [0.05, 0.5, 0.95])
def test_a_rate_comes_near_what_is_drawn(chance: float) -> None:
    draw, rate, found = random.Random(1), Rate(2.0), []
    for _ in range(400):
        right = next((i for i in range(4) if draw.random() > chance), 4)
        rate.learn(4, right, 0.95)
        found.append(rate.chance)
    assert sum(found[100:]) / 300 == pytest.approx(chance, abs=0.05)


def test_what_is_never_right_costs_less_than_three_hundredths() -> None:
    """Of 20 answers of 48 tokens, each with a chance to draft at every token."""
    families, lost = Families(), 0.0
    for _ in range(20):
        answer = families.acceptance("ns", None)
        for _ in range(48):
            if length := answer.length("unsure", 8):
                lost += step_cost(1 + length) - 1
                answer.learn("unsure", length, 0)
    assert lost / (20 * 48) < 0.03


def test_what_gets_better_is_found_out() -> None:
    answer = Acceptance()
    for _ in range(20):
        answer.learn("unsure", 4, 0)
    assert answer.length("unsure", 8) == 0
    for _ in range(200):
        if length := answer.length("unsure", 8):
            answer.learn("unsure", length, length)
    assert answer.length("unsure", 8) == 8


def test_families_learn_apart() -> None:
    families = Families()
    for _ in range(30):
        families.acceptance("ns", "bad").learn("donor", 8, 0)
        families.acceptance("ns", "good").learn("donor", 8, 8)
    assert families.acceptance("ns", "bad").length("donor", 8) == 0
    assert families.acceptance("ns", "good").length("donor", 8) == 8
    new = Acceptance().length("donor", 8)
    assert families.acceptance("other", "bad").length("donor", 8) == new
    assert families.acceptance("ns", None).length("donor", 8) == new


def test_families_not_seen_for_long_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceptance, "_MOST_FAMILIES", 3)
    families = Families()
    for name in ("a", "b", "c", "a", "d"):
        families.acceptance("ns", name).learn("donor", 8, 0)
    assert [name for _, name in families._rates] == ["c", "a", "d"]
