"""Policies that are compared with, each beside a slow reference of what it is to choose."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from kvshare_mm.apps.bench.policies import (
    AtHand,
    EarlierChunks,
    ToBoundary,
    TopAttended,
    TopDeviation,
    bench_policies,
    endings,
)
from kvshare_mm.reuse.plan import KeptRun, ReusePlan
from kvshare_mm.reuse.repair import RepairPolicy, Tail, Union, make_policy

PLAN = ReusePlan(
    40, (KeptRun("a", 0, 0, 4, True), KeptRun("a", 9, 8, 12, False), KeptRun("b", 0, 24, 10, False))
)


class Known:
    """A request of which all is set by hand; remembers what was asked for."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values.astype(np.float32)
        self.asked: list[int] = []
        self.request = AtHand(self._told, self._told, lambda: values.astype(bool))

    def _told(self, plan: ReusePlan, argument: int) -> np.ndarray:
        self.asked.append(argument)
        return self.values


def repaired(plan: ReusePlan, policy: RepairPolicy) -> list[int]:
    found: list[int] = plan.with_repair(policy.positions(plan)).repair.tolist()
    return found


# -- the most drifted, the most looked at ----------------------------------------------------

TOPS: list[tuple[Callable[[AtHand, float, int], RepairPolicy], bool]] = [
    (lambda request, share, end: TopDeviation(request, share, layer=3, tail=end), False),
    (lambda request, share, end: TopAttended(request, share, query=end), True),
]


@pytest.mark.parametrize(("make", "by_question"), TOPS)
@given(share=st.floats(0, 1), end=st.integers(0, 12), seed=st.integers(0, 2**16))
def test_those_that_measure_most_are_picked_and_no_more(
    make: Any, by_question: bool, share: float, end: int, seed: int
) -> None:
    known = Known(np.random.default_rng(seed).random(40) + 0.1)
    approximate = np.flatnonzero(PLAN.approximate)
    at_end = approximate[approximate >= 40 - end]
    asked = np.setdiff1d(approximate, at_end) if by_question else approximate
    most = asked[np.argsort(-known.values[asked])][: math.ceil(share * len(asked))]
    assert repaired(PLAN, make(known.request, share, end)) == sorted({*most, *at_end})
    assert known.asked == ([end if by_question else 3] if share else [])


@pytest.mark.parametrize("plan", [ReusePlan(7), ReusePlan(7, (KeptRun("a", 0, 0, 6, True),))])
@pytest.mark.parametrize("policy", [TopDeviation, TopAttended])
def test_nothing_is_measured_where_nothing_is_approximate(plan: ReusePlan, policy: Any) -> None:
    known = Known(np.zeros(7))
    assert repaired(plan, policy(known.request)) == []
    assert known.asked == []


# -- to the boundary -------------------------------------------------------------------------


def test_what_stands_behind_an_edit_up_to_the_end_of_its_line() -> None:
    ends = np.zeros(40)
    ends[[2, 11, 14, 30]] = 1
    assert repaired(PLAN, ToBoundary(Known(ends).request)) == [8, 9, 10, 11, *range(24, 31)]
    assert repaired(PLAN, ToBoundary(Known(ends).request, 3)) == [8, 9, 10, 24, 25, 26]
    assert repaired(PLAN, ToBoundary(Known(ends * 0).request)) == [*range(8, 20), *range(24, 34)]
    assert repaired(PLAN, ToBoundary(Known(ends + 1).request)) == [8, 24]
    # What goes on without a space ended nothing: 3.5 is no sentence.
    joined = np.arange(40) == 12
    found = repaired(replace(PLAN, joined=joined), ToBoundary(Known(ends).request))
    assert found == [*range(8, 15), *range(24, 31)]
    assert repaired(ReusePlan(7), ToBoundary(Known(np.ones(7)).request)) == []


def test_endings(tiny_folder: Any) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_folder)
    ids = np.array(tokenizer("One. Two, three?\nFour")["input_ids"])
    texts = [tokenizer.decode([i]) for i in ids]
    found = endings(tokenizer, ids)
    assert [text for text, ends in zip(texts, found, strict=True) if ends] == [".", "?", "\n"]


# -- llama.cpp -------------------------------------------------------------------------------


def shifted(old: list[int], new: list[int], least: int) -> int:
    """Up to where the server's own loop takes a prompt from the old one."""
    done = 0
    while done < min(len(old), len(new)) and old[done] == new[done]:
        done += 1
    head = done
    while head < len(old) and done < len(new):
        same = 0
        while head + same < len(old) and done + same < len(new):
            if old[head + same] != new[done + same]:
                break
            same += 1
        if same >= least:
            done += same
            head += same
        else:
            head += 1
    return done


def kept(old: list[int], new: list[int], least: int) -> list[tuple[int, int, int]]:
    keys = np.array(new, np.uint64), np.array(old, np.uint64)
    plan = EarlierChunks(least).plan(keys[0], "d", keys[1])
    for run in plan.runs:
        assert new[run.start : run.end] == old[run.donor_start : run.donor_start + run.length]
        assert run.shift < 0 or run.exact
    return [(run.donor_start, run.start, run.length) for run in plan.runs]


@given(st.data())
def test_chunks_that_moved_to_the_front(data: st.DataObject) -> None:
    """Blocks of an old prompt left out, moved, and others put in between; few different tokens, so
    that there are chunks by chance too."""
    tokens = data.draw(st.sampled_from([2, 5, 1000]))
    old = data.draw(st.lists(st.integers(0, tokens), min_size=1, max_size=60))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(old)), max_size=6)))
    blocks = [old[a:b] for a, b in pairwise([0, *cuts, len(old)])]
    others = st.lists(st.integers(0, tokens), max_size=5)
    drawn = data.draw(st.lists(st.sampled_from(blocks) | others, max_size=8))
    new = [key for block in drawn for key in block] + [data.draw(st.integers(0, tokens))]
    least = data.draw(st.integers(1, 12))
    # The last token is computed in any case, and so part of no chunk.
    runs = kept(old, new, least)
    assert sum(length for _, _, length in runs) == shifted(old, new[:-1], least)


def test_a_replaced_field_ends_it_and_what_is_left_out_does_not() -> None:
    old = list(range(600))
    assert kept(old, [*old[:100], 999, *old[101:]], 64) == [(0, 0, 100)]
    left_out = [*old[:100], *old[200:300], *old[310:]]
    assert kept(old, left_out, 64) == [(0, 0, 100), (200, 100, 100), (310, 200, 289)]
    assert kept(old, left_out, 256) == [(0, 0, 100)]
    assert kept(old, [*old[:100], 700, *old[100:]], 64) == [(0, 0, 100)]
    assert kept(old, [*old[300:], *old[:300]], 256) == [(300, 0, 300)]


# -- in words --------------------------------------------------------------------------------


def test_in_words() -> None:
    request = Known(np.zeros(1)).request
    known = bench_policies(request)
    assert make_policy("deviation", known) == TopDeviation(request, 0.15)
    assert make_policy("prophet", known) == TopAttended(request, 0.2)
    assert make_policy("boundary", known) == ToBoundary(request, 64)
    assert make_policy("earlier", known) == EarlierChunks(256)
    assert make_policy("tail:8+deviation:0.2", known) == Union(
        (Tail(8), TopDeviation(request, 0.2))
    )


@pytest.mark.parametrize("name", ["deviation", "prophet"])
@pytest.mark.parametrize("argument", ["a", "1.5", "-0.1", "nan", "inf"])
def test_shares_that_are_none(name: str, argument: str) -> None:
    known: Any = bench_policies(Known(np.zeros(1)).request)
    with pytest.raises(ValueError, match=f"{name}:{argument}"):
        make_policy(f"{name}:{argument}", known)


@pytest.mark.parametrize("spec", ["boundary:0", "boundary:-1", "boundary:x", "earlier:0"])
def test_numbers_of_positions_that_are_none(spec: str) -> None:
    known: Any = bench_policies(Known(np.zeros(1)).request)
    with pytest.raises(ValueError, match=spec):
        make_policy(spec, known)
