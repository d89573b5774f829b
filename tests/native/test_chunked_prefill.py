"""Long prompts are computed in chunks: whoever runs or waits beside them gets a turn in between."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from kvshare_mm import EngineClosedError, KVShare, RequestOptions, RequestOutput
from kvshare_mm.native.prefill import Prefill, PrefillResult
from kvshare_mm.native.slots import Chunk
from kvshare_mm.stream import text_stream

from .asking import (
    _DONOR,
    _PROMPTS,
    _TARGET,
    PATIENCE_S,
    Gate,
    Inbox,
    OpenLLM,
    idle,
    inside,
    params,
)
from .donor_server import ATOL, NS, Server, _edited, _ids

_CHUNK = 16
_SMALL = 4  # of a chunk beside answers
_OFF = RequestOptions(reuse="off")


class Steps:
    """What a server's model computes, in order: the prompt and how many positions of a chunk; the
    number of answers of a decode step. Both of a forward that computes both, the chunk first.

    Attributes:
        before: called before a chunk with its number among those of its prompt, from 1.
    """

    def __init__(self, llm: KVShare) -> None:
        self.log: list[tuple[tuple[int, ...], int] | int] = []
        self.before: Callable[[tuple[int, ...], int], None] = lambda prompt, number: None
        runner = inside(llm).runner
        self._prefill, self._decode, self._step = runner.prefill, runner.decode, runner.step
        runner.prefill, runner.decode, runner.step = self._prefilled, self._decoded, self._stepped

    def _prefilled(self, slot: int, ids: np.ndarray, compute: np.ndarray, *rest: Any) -> Any:
        if len(ids) > 1:  # else it is tried whether the model works at all
            self._begin(ids, compute)
        return self._prefill(slot, ids, compute, *rest)

    def _stepped(self, chunk: Chunk, slots: Any, *rest: Any) -> Any:
        self._begin(chunk.token_ids, chunk.compute)
        self.log.append(len(set(slots)))
        return self._step(chunk, slots, *rest)

    def _begin(self, ids: np.ndarray, compute: np.ndarray) -> None:
        prompt = tuple(ids.tolist())
        self.log.append((prompt, len(compute)))
        self.before(prompt, len(self.chunks(prompt)))

    def _decoded(self, slots: Any, *rest: Any) -> Any:
        self.log.append(len(set(slots)))
        return self._decode(slots, *rest)

    def chunks(self, prompt: tuple[int, ...]) -> list[int]:
        return [step[1] for step in self.log if isinstance(step, tuple) and step[0] == prompt]

    def places(self, prompt: tuple[int, ...]) -> list[int]:
        """Where in the order a prompt's chunks are."""
        return [
            i for i, step in enumerate(self.log) if isinstance(step, tuple) and step[0] == prompt
        ]


def held(steps: Steps, prompt: tuple[int, ...], number: int) -> Gate:
    """Holds the engine up in one chunk of a prompt."""
    return Gate(steps, "before", lambda *chunk: chunk == (prompt, number))


def _running(llm: KVShare, *prompts: str, max_tokens: int = 400) -> tuple[list[Inbox], Gate]:
    """Requests that are being answered, held up in a decode step of all of them."""
    runner = inside(llm).runner
    first = Gate(runner, "prefill")
    gate = Gate(runner, "decode", lambda slots, *_: len(set(slots)) == len(prompts))
    inboxes = [Inbox(llm, prompt, params(max_tokens), _OFF) for prompt in prompts]
    first.open()
    gate.wait()
    return inboxes, gate


@pytest.fixture
def chunked(open_llm: OpenLLM) -> KVShare:
    return open_llm(max_num_seqs=3, prefill_chunk=_CHUNK, prefill_beside=_SMALL)


@pytest.fixture
def long(chunked: KVShare) -> tuple[int, ...]:
    ids = tuple(chunked.tokenize(_DONOR))
    assert len(ids) > 4 * _CHUNK
    return ids


def test_a_decode_step_is_made_between_any_two_chunks(
    chunked: KVShare, long: tuple[int, ...]
) -> None:
    steps = Steps(chunked)
    running, gate = _running(chunked, *_PROMPTS[1:3])
    inbox = Inbox(chunked, _DONOR, params(1))
    behind = Gate(inside(chunked).runner, "decode", lambda *_: inbox.done)
    gate.open()
    inbox.result()
    assert max(steps.chunks(long)) == steps.chunks(long)[0] == _SMALL
    assert sum(steps.chunks(long)) == len(long)
    for one, other in pairwise(steps.places(long)):
        assert steps.log[one + 1 : other] == [2]
    for other_inbox in running:
        assert not other_inbox.done
        chunked.cancel(other_inbox.request_id)
    behind.open()


def test_a_chunk_that_fails_beside_answers_is_computed_alone(
    chunked: KVShare, long: tuple[int, ...]
) -> None:
    want = chunked.generate(_DONOR, params(8), _OFF).token_ids
    steps = Steps(chunked)
    inside(chunked).runner.step = Mock(side_effect=RuntimeError("out of memory, or so"))
    [running], gate = _running(chunked, _PROMPTS[1])
    inbox = Inbox(chunked, _DONOR, params(8), _OFF)
    gate.open()
    assert inbox.result().token_ids == want
    assert max(steps.chunks(long)) == steps.chunks(long)[0] == _SMALL
    assert inside(chunked).runner.step.called
    chunked.cancel(running.request_id)


def test_a_prompt_alone_is_computed_in_whole_chunks(
    chunked: KVShare, long: tuple[int, ...]
) -> None:
    steps = Steps(chunked)
    chunked.generate(_DONOR, params(2), _OFF)
    assert set(steps.chunks(long)[:-1]) == {_CHUNK}
    assert sum(steps.chunks(long)) == len(long)


def test_answers_are_the_same_with_a_long_prompt_between(
    chunked: KVShare, open_llm: OpenLLM, long: tuple[int, ...]
) -> None:
    at_once = open_llm(max_num_seqs=1, prefill_chunk=512)
    want = [at_once.generate(p, params(90), _OFF).token_ids for p in (*_PROMPTS[1:3], _DONOR)]
    steps = Steps(chunked)
    running, gate = _running(chunked, *_PROMPTS[1:3], max_tokens=90)
    running.append(Inbox(chunked, _DONOR, params(90)))
    gate.open()
    assert [inbox.result().token_ids for inbox in running] == want
    assert len(steps.chunks(long)) > len(long) // _CHUNK


def test_a_request_cancelled_between_chunks_frees_its_slot(
    chunked: KVShare, long: tuple[int, ...], alone: list[RequestOutput]
) -> None:
    steps = Steps(chunked)
    gate = held(steps, long, 3)
    inbox = Inbox(chunked, _DONOR, params())
    gate.wait()
    assert chunked.stats()["queue"] == {"waiting": 0, "running": 1}
    chunked.cancel(inbox.request_id)
    gate.open()
    output = inbox.result()
    assert (output.finish_reason, output.token_ids, output.metrics.ttft) == ("abort", (), 0)
    assert len(steps.chunks(long)) == 3
    engine = inside(chunked).engine
    assert engine._waiting._served == {"": 3 * _CHUNK}, "what was computed is charged"
    idle(chunked)
    assert sorted(engine._free) == [0, 1, 2]
    assert chunked.flush() and chunked.stats()["donors"]["nodes"] == 0
    answers = [Inbox(chunked, prompt, params()) for prompt in _PROMPTS[:3]]
    assert [a.result().token_ids for a in answers] == [a.token_ids for a in alone[:3]]


def test_an_error_in_a_chunk_fails_its_request_alone(
    chunked: KVShare, long: tuple[int, ...], alone: list[RequestOutput]
) -> None:
    steps = Steps(chunked)

    def fail(prompt: tuple[int, ...], number: int) -> None:
        if prompt == long and number >= 3:  # beside the answer, and alone
            raise RuntimeError("out of memory, or so")

    steps.before = fail
    [running], gate = _running(chunked, _PROMPTS[0], max_tokens=12)
    inbox = Inbox(chunked, _DONOR, params())
    gate.open()
    with pytest.raises(RuntimeError, match="out of memory"):
        inbox.result()
    steps.before = lambda prompt, number: None
    assert running.result().token_ids == alone[0].token_ids
    idle(chunked)
    assert chunked.flush()
    assert sorted(inside(chunked).engine._free) == [0, 1, 2]
    assert chunked.healthy
    whole = chunked.generate(_DONOR, params())
    assert whole.token_ids == chunked.generate(_DONOR, params(), _OFF).token_ids


def test_closing_does_not_wait_for_a_long_prompt(chunked: KVShare, long: tuple[int, ...]) -> None:
    steps = Steps(chunked)
    gate = held(steps, long, 2)
    inbox = Inbox(chunked, _DONOR, params())
    gate.wait()
    closing = threading.Thread(target=chunked.close)
    closing.start()
    while not inside(chunked).engine._closing:
        threading.Event().wait(0.002)
    gate.open()
    closing.join(PATIENCE_S)
    assert not closing.is_alive()
    with pytest.raises(EngineClosedError):
        inbox.result()
    assert len(steps.chunks(long)) == 2


def test_short_prompts_pass_a_long_one_which_goes_on_between_them(
    open_llm: OpenLLM, alone: list[RequestOutput]
) -> None:
    llm = open_llm(max_num_seqs=4, prefill_chunk=32, prefill_beside=8)
    long, steps = tuple(llm.tokenize(_DONOR)), Steps(llm)
    shorts = [i for i, output in enumerate(alone) if len(output.prompt_token_ids) <= 32][:4]
    gate = held(steps, long, 1)
    first = Inbox(llm, _DONOR, params(1), _OFF)
    gate.wait()
    passing = [Inbox(llm, _PROMPTS[i], params(2), _OFF) for i in shorts]
    also_long = Inbox(llm, _TARGET, params(1), _OFF)
    gate.open()
    for i, inbox in zip(shorts, passing, strict=True):
        assert inbox.result().token_ids == alone[i].token_ids[:2]
    first.result()
    chunks = steps.places(long)
    turns = [steps.places(tuple(alone[i].prompt_token_ids)) for i in shorts]
    assert len(shorts) >= 2
    for turn, following in pairwise(turns):  # one short prompt at a time, in the order they came
        assert turn[-1] < following[0]
        assert any(turn[-1] < chunk < following[0] for chunk in chunks)
    assert turns[-1][-1] < chunks[-1]
    assert chunks[-1] < steps.places(tuple(also_long.result().prompt_token_ids))[0]


def test_who_can_reuse_a_long_prompt_waits_for_it(open_llm: OpenLLM) -> None:
    tokenize = open_llm(max_num_seqs=1).tokenize
    donor, target = tuple(tokenize(_TARGET)), tokenize(_DONOR)
    assert len(target) < len(donor)
    llm = open_llm(max_num_seqs=4, prefill_chunk=len(target), prefill_beside=len(target) // 4)
    [running], answering = _running(llm, _PROMPTS[3])
    steps = Steps(llm)
    gate = held(steps, donor, 1)
    first = Inbox(llm, _TARGET, params(2))
    answering.open()
    gate.wait()
    alike, other = (Inbox(llm, prompt, params(2)) for prompt in (_DONOR, _PROMPTS[4]))
    alone = Inbox(llm, _DONOR.replace("value 3?", "value 4?"), params(2), _OFF)
    gate.open()
    first.result()
    assert alike.result().provenance.reused > 0
    for passing in (other, alone):
        assert steps.places(tuple(passing.result().prompt_token_ids))[0] < steps.places(donor)[-1]
    llm.cancel(running.request_id)


# -- the numbers ----------------------------------------------------------------------------


def _in_chunks(prefill: Prefill, most: int) -> Iterator[PrefillResult | None]:
    result = None
    while result is None:
        result = prefill.advance(most)
        yield result


@pytest.mark.parametrize("most", [1, 3, 8])
def test_a_plan_in_chunks_gives_what_it_gives_at_once(server: Server, most: int) -> None:
    ids = _ids(80, 1)
    server.serve(ids)
    target = _edited(ids, 9, 10, 30, 31, 32, 33, 34, 55, 70)
    want = server.prefill(target)
    assert len(want.plan.compute) == 10 and want.plan.approximate.any()
    kv = [tensor[:, :, :80].clone() for tensor in server.runner.slot_kv(1)]
    for tensor in server.runner.slot_kv(1):
        tensor.fill_(float("nan"))
    *partial, got = _in_chunks(server.prefiller.begin(1, text_stream(target), NS), most)
    assert partial == [None] * ((10 - 1) // most)
    assert got is not None and got.attention is not None and want.attention is not None
    assert got.plan.runs == want.plan.runs
    assert torch.allclose(got.logits, want.logits, atol=ATOL)
    assert np.allclose(got.attention, want.attention, atol=ATOL)
    for tensor, whole in zip(server.runner.slot_kv(1), kv, strict=True):
        assert torch.allclose(tensor[:, :, :80], whole, atol=ATOL)
    assert got.compute > 0
