"""What fails in the engine fails alone, and an engine that dies tells everybody."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import pytest
import torch

from kvshare_mm import (
    EngineClosedError,
    ModelOutputError,
    RequestOptions,
    RequestOutput,
)
from kvshare_mm.native.detokenizer import Detokenizer

from .asking import (
    _DONOR,
    _PROMPTS,
    Gate,
    Inbox,
    OpenLLM,
    idle,
    inside,
    outcomes,
    params,
)


def test_a_prefill_that_raises_fails_alone(open_llm: OpenLLM, alone: list[RequestOutput]) -> None:
    llm = open_llm(max_num_seqs=2)
    prefill = inside(llm).runner.prefill
    bad = len(alone[3].prompt_token_ids)

    def prefill_or_raise(slot: int, token_ids: Any, *rest: Any) -> torch.Tensor:
        if len(token_ids) == bad:
            raise RuntimeError("out of memory, or so")
        return prefill(slot, token_ids, *rest)

    inside(llm).runner.prefill = prefill_or_raise
    inside(llm).runner.packs = Mock(return_value=False)
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


def test_a_sink_that_raises_ends_its_request_only(
    open_llm: OpenLLM, alone: list[RequestOutput]
) -> None:
    llm = open_llm(max_num_seqs=2)

    broken = Mock(side_effect=ConnectionError("the client is gone"))
    inside(llm).engine.submit(llm.read(_PROMPTS[0], params(400), None), broken)
    assert llm.generate(_PROMPTS[1], params()).token_ids == alone[1].token_ids
    idle(llm)
    assert outcomes(llm)["finished_abort"] == 1


class Broken:
    """A method that fails as often as it is told to, or for the slots it is told."""

    def __init__(self, part: Any, name: str, times: int = 0, slots: set[int] | None = None) -> None:
        self.times = times
        self._slots = slots
        self._real = getattr(part, name)
        setattr(part, name, self)

    def __call__(self, slots: Any, *args: Any, **kwargs: Any) -> Any:
        concerned = {slots} if isinstance(slots, int) else set(slots)
        if self.times > 0 and (self._slots is None or concerned & self._slots):
            self.times -= 1
            raise RuntimeError("out of memory, or so")
        return self._real(slots, *args, **kwargs)


def test_a_decode_that_fails_once_fails_nobody(
    open_llm: OpenLLM, alone: list[RequestOutput]
) -> None:
    llm = open_llm(max_num_seqs=3)
    broken = Broken(inside(llm).runner, "decode", times=1)
    for inbox, want in zip([Inbox(llm, p, params()) for p in _PROMPTS[:3]], alone, strict=False):
        assert inbox.result().token_ids == want.token_ids
    assert broken.times == 0
    assert llm.healthy
    assert outcomes(llm).get("failed", 0) == 0


def test_who_makes_decoding_fail_fails_alone(open_llm: OpenLLM, alone: list[RequestOutput]) -> None:
    llm = open_llm(max_num_seqs=3)
    engine = inside(llm).engine
    gate = Gate(inside(llm).runner, "decode")
    inboxes = [Inbox(llm, p, params()) for p in _PROMPTS[:3]]
    gate.wait()
    culprit = next(r for r in engine._active if r.prefill is not None)
    Broken(inside(llm).runner, "decode", times=2, slots={culprit.slot})
    gate.open()
    outputs = []
    for inbox in inboxes:
        if inbox.request_id == culprit.request_id:
            with pytest.raises(RuntimeError, match="out of memory"):
                inbox.result()
        else:
            outputs.append(inbox.result())
    assert [o.token_ids for o in outputs] == [
        want.token_ids
        for inbox, want in zip(inboxes, alone, strict=False)
        if inbox.request_id != culprit.request_id
    ]
    assert outcomes(llm)["failed"] == 1
    assert llm.healthy
    for prompt, want in zip(_PROMPTS, alone, strict=True):
        assert llm.generate(prompt, params()).token_ids == want.token_ids


def test_an_engine_whose_model_fails_for_all_is_unhealthy_until_it_works_again(
    open_llm: OpenLLM, alone: list[RequestOutput]
) -> None:
    llm = open_llm(max_num_seqs=2)
    broken = Broken(inside(llm).runner, "decode", times=10**6)
    for i in range(3):
        assert llm.healthy
        with pytest.raises(RuntimeError, match="out of memory"):
            llm.generate(_PROMPTS[i], params())
    assert not llm.healthy
    broken.times = 0
    assert llm.generate(_PROMPTS[0], params()).token_ids == alone[0].token_ids
    assert llm.healthy


def test_what_one_prompt_alone_makes_fail_is_no_illness(open_llm: OpenLLM) -> None:
    llm = open_llm(max_num_seqs=2)
    prefill = inside(llm).runner.prefill

    def picky(slot: int, token_ids: Any, *rest: Any) -> torch.Tensor:
        if len(token_ids) > 1:
            raise RuntimeError("too long for me")
        return prefill(slot, token_ids, *rest)

    inside(llm).runner.prefill = picky
    for _ in range(5):
        with pytest.raises(RuntimeError, match="too long"):
            llm.generate(_PROMPTS[0], params())
    assert llm.healthy


@pytest.mark.parametrize("part", ["_take", "_charge"])  # in its slot; between queue and slot
def test_nobody_waits_for_an_engine_that_died(
    open_llm: OpenLLM, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    llm = open_llm(max_num_seqs=1)
    monkeypatch.setattr(inside(llm).engine, part, Mock(side_effect=RuntimeError("a bug")))
    gate = Gate(inside(llm).runner, "prefill")
    inboxes = [Inbox(llm, p, params()) for p in _PROMPTS[:3]]
    gate.open()
    for inbox in inboxes:
        with pytest.raises(EngineClosedError, match="a bug"):
            inbox.result()
    with pytest.raises(EngineClosedError):
        llm.generate(_PROMPTS[0])
    assert not llm.healthy
    assert llm.stats()["queue"] == {"waiting": 0, "running": 0}


def test_an_output_that_cannot_be_made_is_an_error_of_its_request_alone(
    open_llm: OpenLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = open_llm(max_num_seqs=1)

    with monkeypatch.context() as patch:
        patch.setattr(Detokenizer, "finish", Mock(side_effect=ValueError("a bug")))
        for options in (RequestOptions(), RequestOptions(store=False)):
            with pytest.raises(ValueError, match="a bug"):
                llm.generate(_PROMPTS[0], params(), options)
    assert len(llm.generate(_PROMPTS[0], params()).token_ids) == 12
    assert llm.healthy
    idle(llm)


def test_what_fails_behind_its_first_token_fails_alone_and_leaves_no_donor(
    open_llm: OpenLLM,
) -> None:
    llm = open_llm()
    runner = inside(llm).runner
    decode = runner.decode
    runner.decode = lambda *a: torch.full_like(decode(*a), torch.nan)
    with pytest.raises(ModelOutputError, match="not a number"):
        llm.generate(_DONOR, params(4))
    assert llm.flush()
    assert llm.stats()["donors"]["nodes"] == 0
    runner.decode = decode
    assert len(llm.generate(_DONOR, params(4)).token_ids) == 4
    assert outcomes(llm)["failed"] == 1
