"""The bounded queue: what it cannot take is refused, and nothing else suffers."""

from __future__ import annotations

import asyncio

import pytest

from kvshare_mm import QueueFullError, RequestOptions, RequestOutput, StreamChunk

from .asking import _PROMPTS, Gate, Inbox, OpenLLM, idle, inside, outcomes, params


def test_a_full_queue_refuses_and_leaves_the_others_alone(
    open_llm: OpenLLM, alone: list[RequestOutput]
) -> None:
    llm = open_llm(max_num_seqs=1, max_queue=2)
    gate = Gate(inside(llm).runner, "decode")
    inboxes = [Inbox(llm, _PROMPTS[0], params())]
    gate.wait()
    inboxes += [Inbox(llm, p, params()) for p in _PROMPTS[1:3]]
    assert llm.stats()["queue"] == {"waiting": 2, "running": 1}
    with pytest.raises(QueueFullError, match="2 requests are waiting"):
        llm.generate(_PROMPTS[3], params())
    with pytest.raises(QueueFullError):
        next(llm.stream(_PROMPTS[3], params()))
    with pytest.raises(QueueFullError):
        asyncio.run(llm.agenerate(_PROMPTS[3], params()))
    assert outcomes(llm)["queue_full"] == 3
    gate.open()
    for inbox, whole in zip(inboxes, alone[:3], strict=True):
        assert inbox.result().token_ids == whole.token_ids
    assert len(llm.generate(_PROMPTS[3], params()).token_ids) == 12


def test_a_list_that_the_queue_cannot_take_leaves_nothing_running(open_llm: OpenLLM) -> None:
    llm = open_llm(max_num_seqs=1, max_queue=2)
    gate = Gate(inside(llm).runner, "decode")
    with pytest.raises(QueueFullError):
        llm.generate(_PROMPTS, params(400))
    gate.open()
    idle(llm)
    assert "finished_length" not in outcomes(llm)
    assert outcomes(llm)["finished_abort"] >= 2


def test_a_tenant_with_many_requests_does_not_hold_up_one_with_few(open_llm: OpenLLM) -> None:
    llm = open_llm(max_num_seqs=1, max_queue=30)
    gate = Gate(inside(llm).runner, "decode")
    done: list[str] = []

    def ask(tenant: str) -> None:
        def sink(chunk: StreamChunk | Exception) -> None:
            if isinstance(chunk, StreamChunk) and chunk.output is not None:
                done.append(tenant)

        options = RequestOptions(tenant=tenant, reuse="off", store=False)
        inside(llm).engine.submit(llm.read(_PROMPTS[0], params(3), options), sink)

    ask("large")
    gate.wait()
    for _ in range(25):
        ask("large")
    for _ in range(4):
        ask("small")
    with pytest.raises(QueueFullError):
        for _ in range(2):
            ask("large")
    ask("other")  # who has less than a share of a full queue gets in
    gate.open()
    idle(llm)
    assert len(done) >= 31
    assert done[:10].count("small") == 4 and done[:4].count("other") == 1, done
