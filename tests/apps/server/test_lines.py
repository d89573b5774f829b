"""Work beside the loop: what is large goes there, and each tenant gets its share of it."""

from __future__ import annotations

import asyncio
import json
import threading
from concurrent.futures import Executor, wait
from pathlib import Path
from typing import Any

import pytest

from kvshare_mm.apps.server import gate
from kvshare_mm.apps.server.errors import ApiError
from kvshare_mm.apps.server.json_bodies import LARGE
from kvshare_mm.apps.server.keys import add_key
from kvshare_mm.apps.server.lines import Line
from kvshare_mm.errors import EngineClosedError

from ...helpers import until
from ...modalities import hostile
from .conftest import ADMIN, Running, Start, image_part
from .test_preparing import blocked

_JSON = {"Content-Type": "application/json"}
_LONG = "a" * LARGE


def asked(line: Line, *tenants: str) -> list[str]:
    """Who is served in which order, all having asked while the first is served."""
    order: list[str] = []

    async def scene() -> None:
        go, begun = threading.Event(), threading.Event()

        def first() -> None:
            begun.set()
            go.wait(60)
            order.append(tenants[0])

        jobs = [asyncio.create_task(line.run(tenants[0], first))]
        await asyncio.to_thread(begun.wait, 60)
        jobs += [asyncio.create_task(line.run(who, order.append, who)) for who in tenants[1:]]
        await asyncio.sleep(0)
        go.set()
        await asyncio.gather(*jobs)

    asyncio.run(scene())
    return order


def test_what_one_tenant_has_waiting_does_not_hold_up_another() -> None:
    line = Line("things", 1, 10)
    assert asked(line, "a", "a", "a", "a", "b") == ["a", "b", "a", "a", "a"]
    until(lambda: line.unfinished == 0)  # a result is told before the line knows
    line.close()


def test_one_tenant_is_served_in_order() -> None:
    line = Line("things", 1, 10)
    order: list[int] = []

    async def scene() -> None:
        await asyncio.gather(*(line.run("a", order.append, i) for i in range(8)))

    asyncio.run(scene())
    assert order == list(range(8))
    line.close()


def test_where_one_tenant_fills_the_line_another_still_gets_in() -> None:
    async def scene() -> None:
        line = Line("things", 1, 2)
        go = threading.Event()
        crowd = [asyncio.create_task(line.run("a", go.wait, 60)) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(ApiError, match="3 requests wait for things"):
            await line.run("a", go.wait, 60)
        other = asyncio.create_task(line.run("b", go.wait, 60))
        await asyncio.sleep(0)
        assert line.unfinished == 4
        go.set()
        assert all(await asyncio.gather(*crowd, other))
        line.close()

    asyncio.run(scene())


def test_a_closed_line_leaves_nobody_waiting() -> None:
    async def scene() -> None:
        line = Line("things", 1, 2)
        go, begun = threading.Event(), threading.Event()

        def work() -> bool:
            begun.set()
            return go.wait(60)

        first, second = (asyncio.create_task(line.run("a", work)) for _ in range(2))
        await asyncio.to_thread(begun.wait, 60)
        line.close()
        with pytest.raises(asyncio.CancelledError):
            await second
        with pytest.raises(EngineClosedError):
            await line.run("a", go.wait, 60)
        go.set()
        assert await first

    asyncio.run(scene())


def test_errors_of_a_job_are_its_askers() -> None:
    line = Line("things", 1, 2)
    with pytest.raises(ZeroDivisionError):
        asyncio.run(line.run("a", lambda: 1 // 0))
    assert asyncio.run(line.run("a", lambda: 1)) == 1
    until(lambda: line.unfinished == 0)  # a result is told before the line knows
    line.close()


def test_pictures_of_one_tenant_do_not_hold_up_those_of_another(
    serve: Start, media_folder: Any, tmp_path: Path, beside: Executor
) -> None:
    file = tmp_path / "keys"
    keys = {tenant: add_key(file, tenant) for tenant in ("crowd", "other")}
    engine = {"model": str(media_folder("qwen2_5_vl")), "media_workers": 0}
    running = serve(engine, keys_file=file, scope="tenant", admin_key=None, media_threads=1)
    order: list[str] = []
    go, read = threading.Event(), running.llm.read

    def slow(prompt: Any, params: Any, options: Any, **tools: Any) -> Any:
        order.append(options.tenant)
        assert go.wait(60)
        return read(prompt, params, options, **tools)

    running.llm.read = slow  # type: ignore[method-assign]
    asked = []
    for i, tenant in enumerate(("crowd", "crowd", "crowd", "crowd", "other")):
        part = image_part(hostile.png(width=64 + i, height=64))
        messages = [{"role": "user", "content": [part]}]
        asked.append(beside.submit(running.chat, "", keys[tenant], messages=messages))
        until(lambda: running.service.lines.media.unfinished == len(asked))
    go.set()
    wait(asked, 60)
    assert order == ["crowd", "other", "crowd", "crowd", "crowd"]


def test_large_bodies_are_parsed_beside_the_loop(serve: Start, beside: Executor) -> None:
    running = serve()
    with blocked(running.service.lines.parsing, 1):
        large = beside.submit(running.ask, "POST", "/tokenize", json={"prompt": _LONG})
        until(lambda: running.service.lines.parsing.unfinished == 2)
        assert running.chat("hello").status_code == 200
        assert not large.done()
    assert large.result(60).status_code == 400  # more than the context holds


def test_a_large_medium_is_decoded_beside_the_loop(serve: Start) -> None:
    running = serve()
    body = {"messages": [{"role": "user", "content": [None]}]}
    url = "data:image/png;base64," + "A" * (LARGE - 400)
    done: list[str] = []
    parsing, fetch = running.service.lines.parsing, running.service.fetcher.fetch

    def fetched(url: str) -> bytes:
        done.append(threading.current_thread().name)
        return fetch(url)

    running.service.fetcher.fetch = fetched  # type: ignore[method-assign]
    for padding, count in (("", 0), ("A" * 800, 1)):
        body["messages"][0]["content"] = [
            {"type": "image_url", "image_url": {"url": url + padding}}
        ]
        assert running.ask("POST", "/v1/chat/completions", json=body).status_code == 400
        assert len(done) == count
    assert "parsing" in done[0]
    until(lambda: parsing.unfinished == 0)  # the reply may be out before the line knows


def test_between_the_pieces_of_large_bodies_others_have_time(
    serve: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = serve()
    turns: list[int] = []

    async def wait(_: object) -> None:
        turns.append(1)

    monkeypatch.setattr(gate._Turns, "wait", wait)
    assert running.ask("POST", "/tokenize", json={"prompt": "a" * 1_000}).status_code == 200
    assert not turns
    assert running.ask("POST", "/tokenize", json={"prompt": "a" * (8 << 20)}).status_code == 400
    assert len(turns) > 5


@pytest.mark.parametrize(
    ("content", "status", "words"),
    [
        (json.dumps({"prompt": _LONG})[:-1], 400, "no JSON"),
        (json.dumps([_LONG]), 400, "object"),
        ('{"prompt": "\\ud800' + _LONG + '"}', 400, "no JSON"),
        (json.dumps({"prompt": "x", "model": _LONG}), 404, "no model"),
        (json.dumps({"prompt": "\n" * (3 << 20)}), 413, "escapes"),
        (json.dumps({"prompt": [0] * 1_000_000}), 413, "values"),
        ("[" * 1_000_000, 413, "values"),
        ("[" * LARGE + "]" * LARGE, 400, "no JSON"),
    ],
)
def test_large_bodies_that_are_wrong(
    shared: Running, content: str, status: int, words: str
) -> None:
    reply = shared.ask("POST", "/v1/completions", ADMIN, content=content, headers=_JSON)
    assert reply.status_code == status, reply.text
    assert words in reply.json()["error"]["message"]


def test_a_large_body_is_read_as_a_small_one(shared: Running) -> None:
    body = {"prompt": "quick", "top_p": 1e0, "seed": 5.0, "user": "ä\u4e00\U0001f600"}
    small = shared.ask("POST", "/v1/completions", json={**body, "temperature": 0})
    large = shared.ask("POST", "/v1/completions", json={**body, "temperature": 0, "x": _LONG})
    assert small.status_code == large.status_code == 200
    assert small.json()["choices"] == large.json()["choices"]
