"""Closing an engine: what is in flight ends, and nobody waits for it in vain."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from kvshare_mm import EngineClosedError

from ..helpers import until
from .asking import _DONOR, _PROMPTS, PATIENCE_S, Gate, Inbox, OpenLLM, inside, params


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
