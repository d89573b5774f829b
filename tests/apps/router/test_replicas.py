"""What is in flight at a replica, and how fast it is."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvshare_mm.apps.router.plan import ANSWER, Choice, choose
from kvshare_mm.apps.router.replicas import Replica, typical_seconds

from ...helpers import Clock

_STEPS = st.lists(
    st.tuples(st.sampled_from(["begin", "first", "end"]), st.integers(0, 9)), max_size=60
)


@given(_STEPS, st.floats(0, 1e5))
def test_work_is_that_of_what_is_in_flight(steps: list[tuple[str, int]], computed: float) -> None:
    replica = Replica(1, "http://a")
    flights = []
    for step, which in steps:
        if step == "begin":
            flights.append([replica.begin(Choice(1, "load", computed)), computed + ANSWER])
        elif flights:
            flight = flights[which % len(flights)]
            if step == "first":
                if not flight[0].answered:  # type: ignore[attr-defined]
                    flight[0].first(1.0, False)  # type: ignore[attr-defined]
                flight[1] = float(ANSWER)
            else:
                flight[0].end()  # type: ignore[attr-defined]
                flights.remove(flight)
        assert replica.in_flight == len(flights)
        assert replica.standing().work == pytest.approx(sum(left for _, left in flights), abs=1e-3)


def test_speed_is_measured_by_what_was_ahead_and_soon_forgotten() -> None:
    clock = Clock()
    replica = Replica(1, "http://a", clock)
    assert replica.standing(typical_s=0.5).seconds == 0.5
    first, second = replica.begin(Choice(1, "load", 100)), replica.begin(Choice(1, "load", 50))
    first.first(10.0, False)
    assert replica.standing(typical_s=0.5).seconds == pytest.approx(0.1)
    second.first(0.1 * (100 + 50), False)  # it waited for the first one
    assert replica.standing(typical_s=0.5).seconds == pytest.approx(0.1)
    replica.begin(Choice(1, "load", 0)).first(1e6, True)  # says nothing of prompts
    assert typical_seconds([replica, Replica(2, "http://b")]) == pytest.approx(0.1)
    clock.now += 60
    assert replica.standing(typical_s=0.5).seconds == pytest.approx(0.3)


def test_who_fails_five_in_a_row_rests_and_is_then_tried_with_one() -> None:
    clock = Clock()
    replica = Replica(1, "http://a", clock)
    for status in [500, 502, 500, 500, 404, 500, 500, 500, 500]:
        replica.answered(status)
    assert not replica.rests
    replica.answered(500)
    assert replica.rests
    clock.now += 29
    replica.answered(500)  # it was in flight, and makes the rest no longer
    assert replica.rests
    clock.now += 2
    assert not replica.rests
    replica.answered(500)
    assert replica.rests
    clock.now += 31
    replica.answered(200)
    for _ in range(4):
        replica.answered(500)
    assert not replica.rests


def test_a_path_leads_to_no_other_server() -> None:
    url = Replica(1, "https://[::1]:2").url("/v1/x?y")
    assert (url.scheme, url.host, url.port, url.target) == (b"https", b"::1", 2, b"/v1/x?y")


@given(st.lists(st.floats(0, 1e5), max_size=8), st.randoms())
def test_a_replica_can_be_chosen_whatever_its_sums_drift_to(
    sizes: list[float], draw: random.Random
) -> None:
    replica = Replica(1, "http://a")
    replica.begin(Choice(1, "donor", 0.0))  # it is never without a request
    flights = [replica.begin(Choice(1, "load", size)) for size in sizes]
    for flight in draw.sample(flights, len(flights)):
        flight.first(1.0, False)
    standing = replica.standing(share=1.0)
    assert standing.ahead >= 0
    assert choose(10, [standing], draw).replica == 1
