"""Rotary positions in plans: a run moves as one, or is not reused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from kvshare_mm.reuse.plan import uniform_shift
from kvshare_mm.reuse.planner import make_plan

from .plans import EAGER, donor_of, to_keys

_PICTURE = np.array([(5, 5, 5), (5, 5, 6), (5, 6, 5), (5, 6, 6), (7, 7, 7)]).T
_LINE = np.array([(5, 5, 5), (5, 5, 6), (5, 5, 7), (5, 5, 8)]).T


@pytest.mark.parametrize(
    ("target", "start", "donor", "donor_start", "length", "turn"),
    [
        (None, 7, None, 3, 5, 4),
        (_PICTURE + 3, 0, _PICTURE, 0, 5, 3),
        (_PICTURE, 4, None, 6, 1, 1),
        (None, 2, _PICTURE, 4, 1, -5),
        (_PICTURE, 0, _LINE, 0, 2, 0),
        # Whose axes part have no turn.
        (_PICTURE, 0, _LINE, 0, 4, None),
        (_PICTURE, 0, None, 0, 4, None),
    ],
)
def test_a_run_turns_by_what_all_its_positions_move(
    target, start, donor, donor_start, length, turn
):
    assert uniform_shift(target, start, donor, donor_start, length) == turn


def test_runs_that_do_not_move_as_one_are_dropped():
    """Equal keys with other positions do not happen; if they did, nothing wrong is reused."""
    keys = to_keys(range(20))
    straight, bent = (np.tile(np.arange(20), (3, 1)) for _ in range(2))
    bent[1, 10:] += 2
    donor = dataclasses.replace(donor_of(range(20)), positions=straight)
    plan = make_plan(keys, [donor], EAGER, bent)
    assert plan.runs == ()
    same = make_plan(keys, [donor], EAGER, straight)
    assert same.num_exact == 19
    moved = make_plan(to_keys([99, *range(20)]), [donor], EAGER, np.tile(np.arange(21), (3, 1)))
    assert moved.num_reused == 19
    parted = np.tile(np.arange(21), (3, 1))
    parted[2, 12:] += 1
    assert make_plan(to_keys([99, *range(20)]), [donor], EAGER, parted).num_reused == 0


def test_an_exact_prefix_stands_where_it_stood():
    keys = to_keys(range(20))
    donor = dataclasses.replace(donor_of(range(20)), positions=np.tile(np.arange(20), (3, 1)))
    plan = make_plan(keys, [donor], EAGER, np.tile(np.arange(20) + 1, (3, 1)))
    assert plan.num_exact == 0
