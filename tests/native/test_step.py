"""A chunk of a prompt and running answers in one forward: the numbers are those of two."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from kvshare_mm.attention import TailAttention
from kvshare_mm.native.inputs import MediaInputs
from kvshare_mm.native.slots import Chunk, SlotRunner
from kvshare_mm.native.step import step
from kvshare_mm.reads import Reads

from .donor_server import ATOL

_LENGTH, _DONE = 50, 30
_ANSWERS = {0: 7, 2: 21}  # by slot, the tokens that are there


def _runner(tiny: Any) -> tuple[SlotRunner, np.ndarray]:
    """A runner whose answers run, and a prompt in slot 1 of which 30 positions are computed."""
    rng = np.random.default_rng(3)
    runner = SlotRunner(tiny.loaded, 3, 64, 64)
    for slot, length in _ANSWERS.items():
        runner.prefill(slot, rng.integers(0, 128, length), np.arange(length))
    ids = rng.integers(0, 128, _LENGTH)
    runner.prefill(1, ids, np.arange(_DONE))
    return runner, ids


def _rows(drafted: int) -> tuple[list[int], list[int], list[int]]:
    """What is decoded: a token of each answer, and behind the second one's a draft."""
    slots = [0, *[2] * (1 + drafted)]
    positions = [_ANSWERS[0], *range(_ANSWERS[2], _ANSWERS[2] + 1 + drafted)]
    return slots, [5, *range(9, 10 + drafted)], positions


@pytest.mark.parametrize("drafted", [0, 3])
@pytest.mark.parametrize(
    "compute",
    [np.arange(_DONE, _LENGTH), np.array([31, 32, 40, _LENGTH - 1]), np.array([_LENGTH - 1])],
    ids=["a chunk", "scattered", "one"],
)
def test_logits_kv_and_what_is_recorded(tiny: Any, compute: np.ndarray, drafted: int) -> None:
    apart, ids = _runner(tiny)
    heads = {0: (0, 1), 1: (1,)}
    tail, reads = TailAttention(), Reads(heads)
    want_prompt = apart.prefill(1, ids, compute, tail, None, reads.add)
    want_answers = apart.decode(*_rows(drafted))
    runner, _ = _runner(tiny)
    tail_packed, reads_packed = TailAttention(), Reads(heads)
    got = runner.step(Chunk(1, ids, compute, tail_packed, None, reads_packed.add), *_rows(drafted))
    assert got.shape == (3 + drafted, want_prompt.shape[0])
    assert torch.allclose(got[0], want_prompt, atol=ATOL)
    assert torch.allclose(got[1:], want_answers, atol=ATOL)
    for slot in range(3):
        for one, other in zip(apart.slot_kv(slot), runner.slot_kv(slot), strict=True):
            assert torch.allclose(one, other, atol=ATOL)
    assert tail.mass is not None and tail_packed.mass is not None
    assert np.allclose(tail.mass, tail_packed.mass, atol=ATOL)
    keys = np.arange(len(ids), dtype=np.uint64)
    assert np.array_equal(reads.pairs(keys), reads_packed.pairs(keys))


def test_media_have_a_forward_of_their_own(tiny: Any) -> None:
    runner = SlotRunner(tiny.loaded, 2, 64, 64)

    def chunk(media: MediaInputs | None) -> Chunk:
        return Chunk(0, np.arange(9), np.arange(9), media=media)

    assert runner.packs(chunk(None)) and runner.packs(chunk(MediaInputs()))
    assert not runner.packs(chunk(MediaInputs(features=((0, torch.zeros(9, 16)),))))


@pytest.mark.parametrize(("asked", "chunk", "most"), [(None, 64, 16), (9, 64, 9), (99, 64, 64)])
def test_a_chunk_beside_answers_is_no_larger_than_one_alone(
    tiny: Any, asked: int | None, chunk: int, most: int
) -> None:
    assert SlotRunner(tiny.loaded, 1, 64, chunk, beside=asked).beside(0) == most


def test_a_chunk_beside_answers_is_smaller_the_more_its_positions_attend_to(tiny: Any) -> None:
    runner = SlotRunner(tiny.loaded, 1, 64, 64, beside=64)
    sizes = [runner.beside(context) for context in range(0, 100_000, 100)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == 1
    assert runner.beside(round(runner._doubled)) == 32


def test_a_prompt_keeps_its_own_logits_alone(tiny: Any) -> None:
    """Not those of all who were answered beside its last chunk."""
    runner, ids = _runner(tiny)
    prompt = Mock(context=_DONE, next=lambda most: Chunk(1, ids, np.arange(_DONE, _LENGTH)))
    answers = [
        Mock(slot=slot, token_ids=[5], draft=[], num_cached=length, prefill=None)
        for slot, length in _ANSWERS.items()
    ]
    _, decoded = step(runner, prompt, answers, alone=False)
    kept = prompt.computed.call_args.args[1]
    assert len(decoded) == 2 and kept.untyped_storage().nbytes() == kept.nbytes
