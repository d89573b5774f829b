"""Callers who leave, and an engine that closes: requests end, slots are free again."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from kvshare_mm import EngineClosedError, KVShare, RequestOutput

from ..helpers import until
from .asking import (
    _DONOR,
    _PROMPTS,
    PATIENCE_S,
    Gate,
    Inbox,
    OpenLLM,
    idle,
    inside,
    outcomes,
    params,
)

# -- callers who leave: their requests end, and their slots are free again -------------------------


def _leave(llm: KVShare, gate: Gate) -> None:
    stream = llm.stream(_PROMPTS[0], params(400))
    next(stream)
    gate.wait()
    stream.close()  # type: ignore[attr-defined]


def _leave_async(llm: KVShare, gate: Gate) -> None:
    async def leave() -> None:
        stream = llm.astream(_PROMPTS[0], params(400))
        await anext(stream)
        await stream.aclose()

    asyncio.run(leave())


def _cancel_a_task(llm: KVShare, gate: Gate) -> None:
    async def cancelled() -> None:
        messages = [{"role": "user", "content": "Hello"}]
        task = asyncio.create_task(llm.achat(messages, params(400)))
        while not gate.entered.is_set():
            await asyncio.sleep(0.002)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())


@pytest.mark.parametrize("leave", [_leave, _leave_async, _cancel_a_task])
def test_who_leaves_frees_the_slot(
    open_llm: OpenLLM, alone: list[RequestOutput], leave: Callable[[KVShare, Gate], None]
) -> None:
    llm = open_llm(max_num_seqs=1)
    gate = Gate(inside(llm).runner, "decode")
    leave(llm, gate)
    gate.open()
    idle(llm)
    assert outcomes(llm)["finished_abort"] == 1
    assert outcomes(llm)["generation_tokens"] <= 2
    assert llm.generate(_PROMPTS[1], params()).token_ids == alone[1].token_ids


def test_a_request_cancelled_while_it_waits_is_never_computed(
    open_llm: OpenLLM, alone: list[RequestOutput]
) -> None:
    llm = open_llm(max_num_seqs=1)
    gate = Gate(inside(llm).runner, "decode")
    running = Inbox(llm, _PROMPTS[0], params())
    gate.wait()
    waiting = Inbox(llm, _PROMPTS[1], params())
    last = Inbox(llm, _PROMPTS[2], params())
    llm.cancel(waiting.request_id)
    gate.open()
    aborted = waiting.result()
    assert aborted.finish_reason == "abort"
    assert aborted.text == ""
    assert aborted.token_ids == ()
    assert aborted.provenance.spans == ()
    assert aborted.metrics.ttft == 0
    assert 0 <= aborted.metrics.queue <= aborted.metrics.total
    assert running.result().token_ids == alone[0].token_ids
    assert last.result().token_ids == alone[2].token_ids
    assert outcomes(llm)["requests"] == 2


def test_a_cancelled_request_keeps_the_text_it_has(open_llm: OpenLLM) -> None:
    llm = open_llm(max_num_seqs=1)
    gate = Gate(inside(llm).runner, "decode")
    inbox = Inbox(llm, _PROMPTS[0], params(400))
    gate.wait()
    llm.cancel(inbox.request_id)
    gate.open()
    output = inbox.result()
    assert output.finish_reason == "abort"
    assert 1 <= len(output.token_ids) <= 2
    assert "".join(c.text for c in inbox.chunks) == output.text


def test_cancelling_what_is_unknown_or_done_is_no_error(llm: KVShare) -> None:
    llm.cancel("nobody")
    llm.cancel(llm.generate(_PROMPTS[4], params(2)).request_id)
    assert len(llm.generate(_PROMPTS[4], params(2)).token_ids) == 2


# -- closing an engine: what is in flight ends, and nobody waits for it in vain --------------------


def test_close_ends_what_is_in_flight_and_refuses_what_comes_later(open_llm: OpenLLM) -> None:
    llm = open_llm(max_num_seqs=1)
    gate = Gate(inside(llm).runner, "decode")
    running = Inbox(llm, _PROMPTS[0], params(400))
    gate.wait()
    waiting = Inbox(llm, _PROMPTS[1], params())
    with ThreadPoolExecutor(2) as threads:
        called = threads.submit(llm.generate, _PROMPTS[3], params(400))
        until(lambda: llm.stats()["queue"]["waiting"] == 2)
        closing = threads.submit(llm.close)
        until(lambda: inside(llm).engine._closing)
        with pytest.raises(EngineClosedError):
            llm.generate(_PROMPTS[2])
        gate.open()
        for ended in (running.result, waiting.result, lambda: called.result(PATIENCE_S)):
            with pytest.raises(EngineClosedError, match="closed"):
                ended()
        closing.result(PATIENCE_S)
    with pytest.raises(EngineClosedError):
        llm.generate(_PROMPTS[2])
    with pytest.raises(EngineClosedError):
        next(llm.stream(_PROMPTS[2]))
    with pytest.raises(EngineClosedError):
        asyncio.run(llm.achat([{"role": "user", "content": "Hello"}]))
    llm.close()


def test_close_saves_what_is_finished(open_llm: OpenLLM) -> None:
    llm = open_llm()
    gate = Gate(inside(llm).donors, "save")
    llm.generate(_DONOR, params(2))
    gate.wait()
    closing = threading.Thread(target=llm.close)
    closing.start()
    gate.open()
    closing.join(PATIENCE_S)
    assert llm.stats()["donors"]["nodes"] == 1
