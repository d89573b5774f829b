"""A donor's answer with the target's values."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvshare_mm.node import Node
from kvshare_mm.reuse.answers import likely_answer
from kvshare_mm.reuse.plan import ReusePlan
from kvshare_mm.reuse.planner import make_plan
from kvshare_mm.stream import MEDIA_BIT

from .plans import EAGER, blocks, donor_of, to_keys

_HEAD, _MIDDLE, _END = blocks("A"), blocks("B"), blocks("C")


def answered(prompt: list[int], answer: list[int], **changes: Any) -> Node:
    found = {"attention": np.zeros(len(prompt), np.float16), **changes}
    return Node("d", "ns", to_keys([*prompt, *answer]), (), exact_len=len(prompt), **found)


def likely(
    old: list[int], answer: list[int], target: list[int], plan: ReusePlan | None = None
) -> list[int]:
    plan = plan or make_plan(to_keys(target), [donor_of(old)], EAGER)
    return likely_answer(answered(old, answer), plan, to_keys(target)).tolist()


def test_old_values_are_replaced_by_the_new_ones() -> None:
    old = [*_HEAD, 7, 8, *_MIDDLE, 5, *_END]
    new = [*_HEAD, 9, *_MIDDLE, 6, 6, *_END]
    answer = [100, _HEAD[-1], 7, 8, 101, _MIDDLE[-1], 5]
    assert likely(old, answer, new) == [100, _HEAD[-1], 9, 101, _MIDDLE[-1], 6, 6]
    # Behind another token it is another thing.
    assert likely(old, [7, 8, 5, 102], new) == [7, 8, 5, 102]


def test_an_equal_prompt_is_answered_as_before() -> None:
    prompt = [*_HEAD, *_MIDDLE]
    assert likely(prompt, [3, 4, 5], prompt) == [3, 4, 5]


def test_what_is_long_is_no_value() -> None:
    old = [*_HEAD, *blocks("X"), *_END]
    new = [*_HEAD, *blocks("Y"), *_END]
    answer = [_HEAD[-1], *blocks("X")]
    assert likely(old, answer, new) == answer


def test_a_picture_is_not_said_in_a_words_place() -> None:
    old = [*_HEAD, 7, 8, *_MIDDLE]
    new = [*_HEAD, MEDIA_BIT + 1, MEDIA_BIT + 2, *_MIDDLE]
    answer = [100, _HEAD[-1], 7, 8, 101]
    assert likely(old, answer, new) == answer


def test_without_a_known_end_of_the_prompt_there_is_no_answer() -> None:
    keys = [*_HEAD, *_MIDDLE]
    node = answered(keys, [3, 4], attention=None)
    assert not len(likely_answer(node, ReusePlan(len(keys)), to_keys(keys)))
