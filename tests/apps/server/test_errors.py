"""Every error has OpenAI's shape, the right status and the name of what was wrong."""

from __future__ import annotations

import json
import socket
import threading
from concurrent.futures import Executor, wait
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import httpx2
import pytest
import torch

from kvshare_mm import KVShare
from kvshare_mm.errors import ModelLoadError

from ...helpers import until
from .conftest import Running, Start, held, start

_CHAT = "/v1/chat/completions"
_JSON = {"content-type": "application/json"}
_USER = [{"role": "user", "content": "The quick brown fox"}]


def check(reply: httpx2.Response, status: int, param: str | None = None) -> dict[str, Any]:
    assert reply.status_code == status, reply.text
    error: dict[str, Any] = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and error["type"]
    assert error["param"] == param
    assert reply.headers["x-request-id"]
    return error


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"content": "hello"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": ""}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]},
         "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": [{"type": "file", "file": {}}]}]},
         "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": "half \ud800"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "long " * 600}]}, "prompt"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]},
         "messages[0].tool_calls[0].function"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"seed": 2**64}, "seed"),
        ({"stop": [""]}, "stop"),
        ({"logprobs": True, "top_logprobs": 21}, "logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {}}, "response_format"),
        ({"response_format": {"type": "grammar"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": "x"}}},
         "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}},
         "response_format"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"frequency_penalty": 2.1}, "frequency_penalty"),
        ({"presence_penalty": -2.1}, "presence_penalty"),
        ({"presence_penalty": "some"}, "presence_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"five": 1}}, "logit_bias"),
        ({"logit_bias": {"-5": 1}}, "logit_bias"),
        ({"logit_bias": {"999999": 1}}, "logit_bias"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
        ({"logit_bias": [5]}, "logit_bias"),
        ({"cache_salt": ""}, "cache_salt"),
        ({"cache_salt": "a/b"}, "cache_salt"),
        ({"cache_salt": "x" * 129}, "cache_salt"),
        ({"kvshare": {"reuse": "all"}}, "kvshare.reuse"),
        ({"kvshare": {"sharing": "off"}}, "kvshare"),
        ({"kvshare": {"repair": "magic"}}, "repair"),
        ({"kvshare": {"max_divergence": -1}}, "max_divergence"),
        ({"stream": "yes"}, "stream"),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else None,
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_field_is_named(
    shared: Running, body: dict[str, Any], param: str, stream: bool
) -> None:
    whole = {"messages": _USER, "max_tokens": 1, "stream": stream, **body}
    if body == {}:
        del whole["messages"]
    # Not `json=`, which refuses what is not a number.
    check(shared.ask("POST", _CHAT, content=json.dumps(whole), headers=_JSON), 400, param)


def test_fields_that_ask_for_nothing_are_taken(shared: Running) -> None:
    reply = shared.chat(
        "hello", frequency_penalty=0, presence_penalty=0.0, tools=[], logit_bias={},
        response_format={"type": "text"}, user="me", unheard_of=1, repetition_penalty=1.0,
    )  # fmt: skip
    assert reply.status_code == 200, reply.text


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {}, "prompt"),
        ("/v1/completions", {"prompt": ""}, "prompt"),
        ("/v1/completions", {"prompt": []}, "prompt"),
        ("/v1/completions", {"prompt": [999_999]}, "prompt"),
        ("/v1/completions", {"prompt": [-1]}, "prompt"),
        ("/v1/completions", {"prompt": [[]]}, "prompt"),
        ("/v1/completions", {"prompt": "x", "echo": True}, "echo"),
        ("/v1/completions", {"prompt": "x", "logprobs": 21}, "logprobs"),
        ("/v1/completions", {"prompt": ["x"] * 65}, "n"),
        ("/tokenize", {}, "prompt"),
        ("/detokenize", {"tokens": [10**9]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
    ],
)
def test_other_routes_name_the_field_too(
    shared: Running, path: str, body: dict[str, Any], param: str
) -> None:
    reply = shared.ask("POST", path, json=body)
    assert reply.status_code == 400, reply.text
    assert str(reply.json()["error"]["param"]).startswith(param)


def test_what_is_not_here_is_404(shared: Running) -> None:
    assert check(shared.chat("x", model="other"), 404, "model")["code"] == "model_not_found"
    check(shared.ask("GET", "/v1/models/other"), 404, "model")
    check(shared.ask("GET", "/v1/nothing"), 404)
    check(shared.ask("GET", "/v1/chat/completions"), 405)


def test_a_large_body_is_413(serve: Start) -> None:
    running = serve(max_body_bytes=2000)
    check(running.chat("x" * 3000), 413)

    def pieces() -> Any:
        for _ in range(30):
            yield b" " * 100

    # Its length is not said.
    check(running.ask("POST", _CHAT, content=pieces(), headers=_JSON), 413)
    assert running.chat("short").status_code == 200


def test_a_body_that_does_not_come_is_408(serve: Start) -> None:
    running = serve(body_timeout_s=0.2)
    host, port = running.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"content-length: 100\r\n\r\n{"
        )
        assert connection.recv(100).startswith(b"HTTP/1.1 408")


def test_an_answer_that_takes_too_long_is_408(serve: Start) -> None:
    running = serve(request_timeout_s=0.05)
    long = {"max_tokens": 400, "ignore_eos": True}
    with held(running):
        check(running.chat("The quick", **long), 408)
    until(lambda: running.idle)
    with held(running):
        events = running.chat("The quick", stream=True, **long).text.split("\n\n")
    assert json.loads(events[-3].removeprefix("data: "))["error"]["type"] == "timeout_error"
    assert events[-2] == "data: [DONE]"
    until(lambda: running.idle)


def test_a_full_queue_is_429(serve: Start, beside: Executor) -> None:
    running = serve({"max_num_seqs": 1, "max_queue": 1})
    waiting = []
    with held(running):
        while len(waiting) < 2:
            waiting.append(beside.submit(running.chat, "The quick", ignore_eos=True))
            queue = {"waiting": len(waiting) - 1, "running": 1}
            until(lambda queue=queue: running.llm.stats()["queue"] == queue)
        for stream in (False, True):
            reply = running.chat("one more", stream=stream)
            error = check(reply, 429)
            assert error["code"] == "queue_full"
            assert int(reply.headers["retry-after"]) >= 1
    wait(waiting)
    assert running.chat("one more").status_code == 200


def test_while_the_model_loads_it_is_503(tiny_folder: Path) -> None:
    go = threading.Event()

    def load() -> KVShare:
        go.wait(60)
        return KVShare(str(tiny_folder), embedder=None)

    running = start(load)
    try:
        for reply in (
            running.ask("GET", "/health"),
            running.chat("x"),
            running.ask("GET", "/v1/models"),
        ):
            assert check(reply, 503)["code"] == "loading"
            assert int(reply.headers["retry-after"]) >= 1
        assert running.ask("GET", "/metrics").status_code == 200
        assert running.ask("GET", "/version").status_code == 200
        go.set()
        running.wait_ready()
        assert running.chat("x").status_code == 200
    finally:
        go.set()
        running.stop()


def test_a_model_that_cannot_be_loaded_is_said(caplog: pytest.LogCaptureFixture) -> None:
    def load() -> KVShare:
        raise ModelLoadError("there is no such model")

    running = start(load)
    until(lambda: "there is no such model" in caplog.text)
    assert running.service.failure is not None
    running.stop()


def test_a_bug_is_500_and_says_nothing_of_itself(
    serve: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = serve()
    monkeypatch.setattr(running.llm, "astream", Mock(side_effect=RuntimeError("secret detail")))
    assert "secret" not in check(running.chat("x"), 500)["message"]


def test_a_model_that_puts_out_no_numbers_is_500_and_says_so(
    serve: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = serve()
    runner = running.llm._parts.runner
    for name in ("decode", "prefill"):  # behind the first token, and instead of it
        real = getattr(runner, name)
        monkeypatch.setattr(
            runner, name, lambda *a, real=real: torch.full_like(real(*a), torch.nan)
        )
        for fields in ({}, {"temperature": 1, "ignore_eos": True}):
            told = [check(running.chat("x", **fields), 500)]
            streamed = running.chat("x", stream=True, **fields)
            if name == "decode":
                told.append(json.loads(streamed.text.split("data: ")[-2])["error"])
            else:
                told.append(check(streamed, 500))
            for error in told:
                assert "not a number" in error["message"]
                assert (error["type"], error["code"]) == ("internal_error", "model_output")
    running.llm.flush()
    assert running.llm.stats()["donors"]["nodes"] == 0


def test_after_the_engine_closed_it_is_503(serve: Start) -> None:
    running = serve()
    running.llm.close()
    check(running.chat("x"), 503)
    check(running.chat("x", stream=True), 503)
