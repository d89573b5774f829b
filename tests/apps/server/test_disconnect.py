"""A client that goes away frees its slot at once."""

from __future__ import annotations

import json
import logging
import threading
from concurrent.futures import Executor

import pytest

from ...helpers import until
from .conftest import Running, Start, held
from .test_preparing import send

_CHAT = "/v1/chat/completions"
_LONG = {
    "messages": [{"role": "user", "content": "The quick brown fox"}],
    "max_tokens": 400,
    "ignore_eos": True,
    "temperature": 0,
}


def noticed(running: Running) -> bool:
    """Whether it was noticed that the client has gone; its requests are cancelled by then."""
    return running.metric(f'kvshare:http_requests_total{{route="{_CHAT}",status="499"') == 1


def aborted(running: Running) -> int:
    told: dict[str, int] = running.llm.stats()["requests"]
    return told.get("finished_abort", 0)


def test_within_a_decode_step_of_a_stream(serve: Start, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    running = serve({"max_num_seqs": 1})
    # From here on each step waits for the test, so that steps can be counted.
    runner = running.llm._parts.runner
    step, decode = threading.Semaphore(5), runner.decode
    steps = 0

    def counted(*arguments: object) -> object:
        nonlocal steps
        assert step.acquire(timeout=30)
        steps += 1
        return decode(*arguments)  # type: ignore[arg-type]

    runner.decode = counted  # type: ignore[method-assign, assignment]
    with running.stream(**_LONG) as reply:
        lines = (line for line in reply.iter_lines() if line.startswith("data: "))
        while not json.loads(next(lines)[6:])["choices"][0]["delta"].get("content"):
            pass
        until(lambda: steps == 5)
    until(lambda: " 499 " in caplog.text)
    step.release()  # the step that is under way when the client goes
    until(lambda: running.idle)
    step.release()
    assert steps <= 6
    until(lambda: aborted(running) == 1)  # it is counted just after its slot is free
    step.release(1000)
    assert running.chat("next").status_code == 200


def test_of_a_whole_answer(serve: Start) -> None:
    running = serve({"max_num_seqs": 1})
    with held(running):
        with send(running, _CHAT, _LONG):
            until(lambda: running.llm.stats()["queue"]["running"] == 1)
        until(lambda: noticed(running))
    until(lambda: aborted(running) == 1)
    until(lambda: running.idle)
    assert running.llm.stats()["requests"].get("generation_tokens", 0) < 400


@pytest.mark.parametrize("stream", [False, True])
def test_of_a_request_that_waits(serve: Start, beside: Executor, stream: bool) -> None:
    running = serve({"max_num_seqs": 1})
    with held(running):
        first = beside.submit(running.ask, "POST", _CHAT, json=_LONG)
        until(lambda: running.llm.stats()["queue"]["running"] == 1)
        with send(running, _CHAT, {**_LONG, "stream": stream}):
            until(lambda: running.llm.stats()["queue"]["waiting"] == 1)
        until(lambda: noticed(running))
    until(lambda: running.llm.stats()["queue"]["waiting"] == 0)
    first.result()
    until(lambda: running.idle)
    seen = running.llm.stats()["requests"]
    assert seen["requests"] == 1  # the second one was never started
    assert seen["finished_abort"] == 1


def test_of_one_request_with_several_answers(serve: Start) -> None:
    running = serve({"max_num_seqs": 2})
    with held(running):
        with running.stream(**_LONG, n=4) as reply:
            next(reply.iter_lines())
        until(lambda: noticed(running))
    until(lambda: running.idle)
    until(lambda: aborted(running) == 4)
