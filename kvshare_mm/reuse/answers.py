"""What a donor's answer says once its old values are replaced by the new ones."""

from __future__ import annotations

import numpy as np

from kvshare_mm.node import Node
from kvshare_mm.reuse.plan import ReusePlan
from kvshare_mm.stream import MEDIA_BIT

_LONGEST_VALUE = 16
"""Tokens of an edit that is taken for a value; a longer one is another text."""


def likely_answer(donor: Node, plan: ReusePlan, target: np.ndarray) -> np.ndarray:
    """What the target may be answered, guessed from what `donor` was.

    Args:
        donor: the node that the target was edited from.
        target: ``[N]`` uint64 keys of the target.

    Returns:
        ``[A]`` int64 token ids; empty if the donor's answer is not known.
    """
    keys = donor.wide_keys
    if donor.attention is None:
        return np.empty(0, np.int64)
    answer = keys[len(donor.attention) :].astype(np.int64).tolist()
    values = _values(donor, keys, plan, target)
    longest_first = sorted(values, key=len, reverse=True)
    said: list[int] = []
    at = 0
    while at < len(answer):
        old = next((o for o in longest_first if tuple(answer[at : at + len(o)]) == o), None)
        said += values[old] if old else answer[at : at + 1]
        at += len(old) if old else 1
    return np.array(said, np.int64)


def _values(
    donor: Node, keys: np.ndarray, plan: ReusePlan, target: np.ndarray
) -> dict[tuple[int, ...], tuple[int, ...]]:
    """Old values and what stands in their place, each behind the token before it, which is the
    same: one token alone may be anything."""
    found: dict[tuple[int, ...], tuple[int, ...]] = {}
    end = start = 0  # in target and donor
    for run in plan.runs:
        mine = run.donor == donor.node_id
        if mine and start and end < run.start and start < run.donor_start:
            old, new = keys[start - 1 : run.donor_start], target[end - 1 : run.start]
            short = max(len(old), len(new)) <= _LONGEST_VALUE
            if short and old[0] == new[0] and not (new & MEDIA_BIT).any():  # nobody says pictures
                found[tuple(old.astype(np.int64).tolist())] = tuple(new.astype(np.int64).tolist())
        if mine or run.exact:  # what is exact is the donor's, too, as far as the two are the same
            same = run.exact and np.array_equal(keys[: run.end], target[: run.end])
            if mine or same:
                end, start = run.end, run.donor_start + run.length
            else:
                end = start = 0
    return found
