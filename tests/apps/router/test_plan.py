"""Which replica is chosen, of all that may be known of them."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from kvshare_mm.apps.router.plan import ANSWER, Standing, choose

_SHARES = st.just(0.0) | st.floats(0, 1)
_STANDINGS = st.lists(
    st.builds(
        Standing,
        replica=st.just(0),
        share=_SHARES,
        ahead=st.floats(0, 1e6),
        work=st.floats(0, 1e6),
        seconds=st.floats(1e-6, 1),
    ),
    min_size=1,
    max_size=8,
).map(lambda those: [replace(each, replica=i) for i, each in enumerate(those)])
_LENGTHS = st.integers(0, 100_000)
_SEEDS = st.integers(0, 3)


@given(_LENGTHS, _STANDINGS, _SEEDS)
def test_nobody_gets_much_more_to_do_than_the_others(
    length: int, standings: list[Standing], seed: int
) -> None:
    choice = choose(length, standings, random.Random(seed))
    chosen = standings[choice.replica]
    mean = sum(s.work for s in standings) / len(standings)
    assert chosen.work + choice.work <= (1.25 * mean + length + ANSWER) * (1 + 1e-9)
    assert 0 <= choice.computed <= length


@given(_LENGTHS, _STANDINGS, _SEEDS)
def test_nobody_with_as_much_of_it_and_less_to_do_is_passed_over(
    length: int, standings: list[Standing], seed: int
) -> None:
    choice = choose(length, standings, random.Random(seed))
    chosen = standings[choice.replica]
    if choice.reason == "load":
        assert all(s.share < 0.1 for s in standings)
        return
    assert choice.reason == (
        "donor" if chosen.share == max(s.share for s in standings) else "moved"
    )
    for other in standings:
        better = other.share >= chosen.share and other.seconds <= chosen.seconds
        idler = other.work <= chosen.work and other.ahead < chosen.ahead * (1 - 1e-6) - 1e-6
        assert not (better and idler)


@given(_LENGTHS, _STANDINGS, _SEEDS, st.floats(0.5, 4))
def test_units_do_not_matter(
    length: int, standings: list[Standing], seed: int, factor: float
) -> None:
    assume(any(s.share >= 0.1 for s in standings))

    def cost(s: Standing) -> float:
        return (s.ahead + 2 * length * (1 - s.share * (s.share >= 0.1))) * s.seconds

    costs = sorted(map(cost, standings))
    assume(all(b - a > 1e-6 * b for a, b in pairwise(costs)))
    other = [replace(s, seconds=s.seconds * factor) for s in standings]
    assert choose(length, standings, random.Random(seed)) == choose(
        length, other, random.Random(seed + 1)
    )


@pytest.mark.parametrize(
    ("standings", "expected"),
    [
        # An idle donor; one with less to wait for than it saves, and with more.
        ([Standing(0, 0.9), Standing(1)], (0, "donor")),
        ([Standing(0, 0.9, ahead=800), Standing(1)], (0, "donor")),
        ([Standing(0, 0.9, ahead=1000), Standing(1)], (1, "moved")),
        # A slow donor computes a tenth in the time in which a fast one computes all.
        ([Standing(0, 0.9, seconds=11), Standing(1)], (1, "moved")),
        # More than the mean and a request: the cap, whatever it would save.
        ([Standing(0, 0.9, 0, 1000), Standing(1), Standing(2, 0, 1)], (1, "moved")),
        # Answers of others are not waited for.
        ([Standing(0, 0.9, work=500), Standing(1)], (0, "donor")),
        # Common words alone.
        ([Standing(0, 0.09, work=1), Standing(1)], (1, "load")),
    ],
)
def test_saving_against_waiting(standings: list[Standing], expected: tuple[int, str]) -> None:
    choice = choose(500, standings, random.Random(0))
    assert (choice.replica, choice.reason) == expected


def test_of_equals_each_gets_some_and_of_two_drawn_the_idler() -> None:
    draw = random.Random(0)
    equal = [Standing(i, 0.5) for i in range(4)]
    assert set(Counter(choose(100, equal, draw).replica for _ in range(100))) == {0, 1, 2, 3}
    busy = [Standing(i, work=100.0 + i) for i in range(4)]
    drawn = Counter(choose(100, busy, draw).replica for _ in range(400))
    assert drawn[0] > drawn[1] > drawn[2] > drawn[3] == 0


def test_there_must_be_one() -> None:
    with pytest.raises(ValueError, match="no replica"):
        choose(1, [], random.Random(0))


def test_one_familys_flood_is_spread_and_a_mixture_stays_where_it_is() -> None:
    """Requests that all are in flight; a replica that was sent a family knows it."""

    def sent(families: list[int]) -> tuple[list[float], float]:
        draw, work, ahead = random.Random(1), [0.0] * 4, [0.0] * 4
        known: set[tuple[int, int]] = set()
        computed = 0.0
        for family in families:
            at = [Standing(i, 0.9 * ((i, family) in known), ahead[i], work[i]) for i in range(4)]
            choice = choose(400, at, draw)
            known.add((choice.replica, family))
            work[choice.replica] += choice.work
            ahead[choice.replica] += choice.computed
            computed += choice.computed
        return work, computed / (400 * len(families))

    work, computed = sent([0] * 64)
    assert max(work) < 2 * min(work) and computed < 0.2
    work, computed = sent([i % 12 for i in range(120)])
    assert max(work) < 2 * min(work) and computed < 0.3
