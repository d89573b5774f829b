"""What is done before the engine: bounded, in lines of its own, and given up with its client."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from kvshare_mm.apps.server.errors import ApiError
from kvshare_mm.apps.server.lines import Line

from ...helpers import until
from ...modalities import hostile
from .conftest import ADMIN, Running, Start, held, image_part

_PNG = hostile.png(width=64, height=64)


def picture(content: bytes = _PNG) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "text", "text": "?"}, image_part(content)]}]


def send(running: Running, path: str, body: Any) -> socket.socket:
    """A request whose answer nobody reads yet."""
    content = json.dumps(body).encode()
    host, port = running.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    connection.sendall(
        f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n".encode()
        + content
    )
    return connection


@pytest.fixture
def seeing(serve: Start, media_folder: Callable[[str], Path]) -> Callable[..., Running]:
    def make(workers: int = 1, deadline_s: float = 30.0, **options: Any) -> Running:
        engine = {
            "model": str(media_folder("qwen2_5_vl")),
            "media_workers": workers,
            "media_deadline_s": deadline_s,
        }
        return serve(engine, **options)

    return make


def processes(running: Running) -> list[psutil.Process]:
    """Those that decode, once they take files."""
    pool = running.llm._parts.decoder
    found = []
    for worker in pool._all:  # type: ignore[attr-defined]
        worker.ready()
        found.append(psutil.Process(worker._process.pid))
    return found


def given_a_file(running: Running) -> Callable[[], bool]:
    """Whether the one process that decodes has been given a file since this call."""
    [worker] = running.llm._parts.decoder._all  # type: ignore[attr-defined]
    before = worker.deadline
    return lambda: worker.deadline != before


@contextmanager
def blocked(line: Line, jobs: int) -> Iterator[None]:
    """A line that has so many jobs that do not end before the block."""
    go = threading.Event()
    loop = asyncio.new_event_loop()

    async def block() -> None:
        await asyncio.gather(*(line.run("", go.wait, 60) for _ in range(jobs)))

    thread = threading.Thread(target=loop.run_until_complete, args=(block(),))
    thread.start()
    until(lambda: line.unfinished == jobs)
    try:
        yield
    finally:
        go.set()
        thread.join(60)
        loop.close()


# -- bytes --------------------------------------------------------------------------------------

_LONG = "a" * (20 << 20)
_EMPTY = {"role": "user", "content": ""}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {"prompt": _LONG}, "prompt"),
        ("/tokenize", {"messages": [{"role": "user", "content": _LONG}]}, "messages"),
        ("/v1/completions", {"prompt": _LONG}, "prompt"),
        ("/v1/completions", {"prompt": ["a", _LONG]}, "prompt"),
        ("/v1/completions", {"prompt": [0] * 600}, "prompt"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": _LONG}]}, "messages"),
        ("/v1/cache/lookup", {"prompt": _LONG}, "prompt"),
        ("/v1/cache/lookup", {"messages": [{"role": "user", "content": _LONG}]}, "messages"),
        ("/detokenize", {"tokens": [0] * 500_000}, "tokens"),
    ],
)
def test_a_text_that_cannot_fit_is_not_tokenised(
    shared: Running, path: str, body: Any, param: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tokenised(_: object, text: Any, **options: Any) -> Any:
        assert len(text) < 1_000
        return original(text, **options)

    kind = type(shared.llm.tokenizer)
    original = shared.llm.tokenizer.__call__
    monkeypatch.setattr(kind, "__call__", tokenised)
    reply = shared.ask("POST", path, ADMIN, json=body)
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"prompt": [0] * 5_000_000}, None),
        ("/v1/completions", {"prompt": [[0]] * 2_000_000}, None),
        ("/v1/completions", {"prompt": [[0]] * 100_000}, "prompt"),
        ("/v1/chat/completions", {"messages": [], "x": [[]] * 1_000_000}, None),
        ("/v1/chat/completions", {"messages": [], "x": [{}] * 1_000_000}, None),
        ("/v1/chat/completions", {"messages": [_EMPTY], "stop": ["x"] * 100_000}, "stop"),
        ("/detokenize", {"tokens": [0] * 5_000_000}, None),
        ("/v1/chat/completions", {"messages": [_EMPTY] * 90_000}, "messages"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 90_000}]},
            "messages",
        ),
    ],
)  # fmt: skip
def test_a_body_of_very_many_things_is_refused(
    shared: Running, path: str, body: Any, param: str | None
) -> None:
    reply = shared.ask("POST", path, ADMIN, json=body)
    if param is None:  # so many that the body is not even read
        assert reply.status_code == 413 and "values" in reply.json()["error"]["message"]
    else:
        assert reply.status_code == 400
        assert reply.json()["error"]["param"].split(".")[0] == param


# -- media --------------------------------------------------------------------------------------


def test_hostile_pictures_whose_clients_went_away_hold_nobody_up(
    seeing: Callable[..., Running],
) -> None:
    running = seeing(workers=2)
    bomb = hostile.jpeg_of_scans(2_000, 5_000, 5_000)
    for i in range(4):
        with send(running, "/v1/chat/completions", {"messages": picture(bomb + bytes([i]))}):
            time.sleep(0.2)
    assert running.chat("Who are you?").status_code == 200
    assert running.ask("GET", "/metrics").status_code == 200
    assert running.ask("GET", "/health").status_code == 200
    reply = running.chat("", messages=picture(bomb))
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "messages[0].content[1].image_url"


def test_decoding_ends_with_its_client(seeing: Callable[..., Running]) -> None:
    running = seeing()
    [hung] = processes(running)
    hung.suspend()
    decodes = given_a_file(running)
    with send(running, "/v1/chat/completions", {"messages": picture()}):
        until(decodes)
    until(lambda: not hung.is_running())
    assert running.chat("", messages=picture()).status_code == 200


def test_a_picture_that_takes_too_long_is_refused_by_name(seeing: Callable[..., Running]) -> None:
    running = seeing(deadline_s=1.0)
    [hung] = processes(running)
    hung.suspend()
    reply = running.chat("", messages=picture())
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert error["param"] == "messages[0].content[1].image_url"
    assert "took more than 1 s to decode" in error["message"]
    running.llm._parts.decoder._deadline_s = 60.0  # type: ignore[attr-defined]  # nothing hangs
    assert running.chat("", messages=picture()).status_code == 200
    assert running.llm.stats()["media"]["decoder_killed"] == 1


def test_too_many_media_get_429_and_text_goes_on(seeing: Callable[..., Running]) -> None:
    running = seeing(media_threads=1, max_media_waiting=1)
    [hung] = processes(running)
    hung.suspend()
    decodes = given_a_file(running)
    waiting = [send(running, "/v1/chat/completions", {"messages": picture()}) for _ in range(2)]
    until(lambda: running.service.lines.media.unfinished == 2)
    until(decodes)
    reply = running.chat("", messages=picture())
    assert reply.status_code == 429
    assert reply.json()["error"]["code"] == "queue_full"
    assert int(reply.headers["retry-after"]) >= 1
    assert running.chat("Who are you?").status_code == 200
    for connection in waiting:
        connection.close()
    until(lambda: running.service.lines.media.unfinished == 0)
    assert running.chat("", messages=picture()).status_code == 200


# -- lines --------------------------------------------------------------------------------------


def test_no_line_waits_for_another(serve: Start) -> None:
    running = serve(max_waiting=3)
    lines = running.service.lines
    with blocked(lines.tokens, 5), blocked(lines.media, 2):
        assert running.ask("GET", "/metrics").status_code == 200
        assert running.ask("GET", "/health").status_code == 200
        assert running.ask("GET", "/v1/cache", ADMIN).status_code == 200
        refused = running.chat("hello")
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
    with blocked(lines.admin, 30):
        assert running.ask("GET", "/metrics").status_code == 200
        assert running.chat("hello").status_code == 200


def test_who_leaves_a_line_makes_room() -> None:
    async def scene() -> None:
        line = Line("things", 1, 1)
        go = threading.Event()
        first = asyncio.create_task(line.run("", go.wait, 60))
        second = asyncio.create_task(line.run("", go.wait, 60))
        await asyncio.sleep(0)
        with pytest.raises(ApiError, match="2 requests wait for things"):
            await line.run("", go.wait, 60)
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)
        await asyncio.sleep(0)
        third = asyncio.create_task(line.run("", go.wait, 60))
        await asyncio.sleep(0)
        go.set()
        assert await first and await third
        line.close()

    asyncio.run(scene())


# -- health -------------------------------------------------------------------------------------


def stalled(running: Running) -> bool:
    reply = running.ask("GET", "/health")
    return reply.status_code == 503 and reply.json()["error"]["code"] == "stalled"


@pytest.mark.parametrize("name", ["media", "tokens"])
def test_health_tells_of_requests_that_are_not_prepared(serve: Start, name: str) -> None:
    running = serve(stall_after_s=0.3)
    with blocked(getattr(running.service.lines, name), 1):
        until(lambda: stalled(running))
    until(lambda: running.ask("GET", "/health").status_code == 200)


def test_health_tells_of_an_engine_that_does_not_move(serve: Start, beside: Executor) -> None:
    running = serve(stall_after_s=0.3)
    with held(running):
        asking = beside.submit(running.chat, "hello", ignore_eos=True)
        until(lambda: stalled(running))
    assert asking.result(60).status_code == 200
    until(lambda: running.ask("GET", "/health").status_code == 200)


def test_a_prefill_that_takes_long_is_no_stall(
    monkeypatch: pytest.MonkeyPatch, serve: Start
) -> None:
    running = serve(stall_after_s=60)
    clock, ahead = time.perf_counter, 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + ahead)
    cache = running.llm._parts.runner._cache  # type: ignore[attr-defined]
    update = cache.update
    seen: list[int] = []

    def slow(*arguments: Any, **options: Any) -> Any:
        nonlocal ahead
        ahead += 40  # seconds that a layer takes
        seen.append(running.ask("GET", "/health").status_code)
        return update(*arguments, **options)

    cache.update = slow
    assert running.chat("hello", max_tokens=1).status_code == 200
    assert set(seen) == {200} and len(seen) >= 3
    del cache.update


def test_nothing_to_do_and_a_slow_client_are_no_stall(serve: Start) -> None:
    running = serve(stall_after_s=0.05)
    time.sleep(0.2)
    assert running.ask("GET", "/health").status_code == 200
    with running.stream(max_tokens=3) as reply:
        next(reply.iter_lines())
        until(lambda: running.llm.stats()["queue"]["running"] == 0)
        until(lambda: running.service.stuck_s == 0)  # it is told just after; a stall would grow
        assert running.ask("GET", "/health").status_code == 200
