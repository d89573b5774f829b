"""What fails in the engine fails alone, and an engine that dies tells everybody."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvshare_mm import EngineClosedError, RequestOutput, StreamChunk

from .asking import _PROMPTS, Gate, Inbox, OpenLLM, idle, outcomes, params


def test_a_prefill_that_raises_fails_alone(open_llm: OpenLLM, alone: list[RequestOutput]) -> None:
    llm = open_llm(max_num_seqs=2)
    prefill = llm._parts.runner.prefill
    bad = len(alone[3].prompt_token_ids)

    def prefill_or_raise(slot: int, token_ids: Any, *rest: Any) -> torch.Tensor:
        if len(token_ids) == bad:
            raise RuntimeError("out of memory, or so")
        return prefill(slot, token_ids, *rest)

    llm._parts.runner.prefill = prefill_or_raise  # type: ignore[method-assign]
    inboxes = [Inbox(llm, p, params()) for p in _PROMPTS]
    for i, inbox in enumerate(inboxes):
        if i == 3:
            with pytest.raises(RuntimeError, match="out of memory"):
                inbox.result()
        else:
            assert inbox.result().token_ids == alone[i].token_ids
    for _ in range(3):  # more than there are slots: none may be lost
        with pytest.raises(RuntimeError, match="out of memory"):
            llm.generate(_PROMPTS[3], params())
    assert outcomes(llm)["failed"] == 4
    assert llm.generate(_PROMPTS[0], params()).token_ids == alone[0].token_ids


def test_logits_that_are_no_numbers_fail_their_request_alone(open_llm: OpenLLM) -> None:
    llm = open_llm(max_num_seqs=1)
    decode = llm._parts.runner.decode

    def broken(*args: Any) -> torch.Tensor:
        return torch.full_like(decode(*args), float("nan"))

    llm._parts.runner.decode = broken  # type: ignore[method-assign]
    with pytest.raises(RuntimeError):
        llm.generate(_PROMPTS[0], params(temperature=1.0))
    llm._parts.runner.decode = decode  # type: ignore[method-assign]
    assert len(llm.generate(_PROMPTS[0], params()).token_ids) == 12
    assert outcomes(llm)["failed"] == 1


def test_a_sink_that_raises_ends_its_request_only(
    open_llm: OpenLLM, alone: list[RequestOutput]
) -> None:
    llm = open_llm(max_num_seqs=2)

    def broken(chunk: StreamChunk | Exception) -> None:
        raise ConnectionError("the client is gone")

    llm._parts.engine.submit(llm._prompt(_PROMPTS[0], params(400), None), broken)
    assert llm.generate(_PROMPTS[1], params()).token_ids == alone[1].token_ids
    assert idle(llm)
    assert outcomes(llm)["finished_abort"] == 1


def test_nobody_waits_for_an_engine_that_died(open_llm: OpenLLM) -> None:
    llm = open_llm(max_num_seqs=1)

    def broken(*args: Any) -> torch.Tensor:
        raise RuntimeError("the device is lost")

    llm._parts.runner.decode = broken  # type: ignore[method-assign]
    gate = Gate(llm._parts.runner, "decode")
    inboxes = [Inbox(llm, p, params()) for p in _PROMPTS[:3]]
    gate.open()
    for inbox in inboxes:
        with pytest.raises(EngineClosedError, match="the device is lost"):
            inbox.result()
    with pytest.raises(EngineClosedError):
        llm.generate(_PROMPTS[0])
    assert llm.stats()["queue"] == {"waiting": 0, "running": 0}


def test_even_a_request_between_queue_and_slot_hears_of_the_engines_death(
    open_llm: OpenLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = open_llm(max_num_seqs=1)

    def broken(*args: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(llm._parts.engine, "_count", broken)
    with pytest.raises(EngineClosedError, match="a bug"):
        llm.generate(_PROMPTS[0])
