"""How fast the queue moves."""

from __future__ import annotations

import pytest

from kvshare_mm.apps.server.pace import Pace

from ...helpers import Clock


def test_a_client_is_told_to_come_back_at_the_queues_pace() -> None:
    clock = Clock()
    pace = Pace(clock)
    assert pace.seconds == 1  # nothing is known yet
    for _ in range(40):  # four at a time, 20 s each: one ends every 5 s
        clock.now += 5
        pace.ended(20)
    assert pace.seconds == pytest.approx(5)
    clock.now += 3600  # what nobody asked in tells nothing
    assert pace.seconds == pytest.approx(5)
    for _ in range(32):
        clock.now += 10
        pace.ended(2)
    assert pace.seconds == pytest.approx(2)
    clock.now += 1000
    for _ in range(32):
        clock.now += 600
        pace.ended(600)
    assert pace.seconds == 60
