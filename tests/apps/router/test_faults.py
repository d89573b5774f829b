"""What a client sees when something goes wrong between a router and its replicas."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import threading
from collections.abc import AsyncIterator
from contextlib import ExitStack, closing
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest
from prometheus_client import CollectorRegistry

from kvshare_mm.apps.router import upstream as upstream_module
from kvshare_mm.apps.router.replicas import Replica
from kvshare_mm.apps.server import run
from kvshare_mm.apps.server.options import ServerOptions

from ...helpers import until
from .conftest import (
    REPORT,
    Route,
    Upstream,
    Upstreams,
    dropping,
    plain,
    refusing,
    run_app,
    sent_to,
)

_FULL = json.dumps({"error": {"code": "queue_full"}}).encode()
_LIMIT = json.dumps({"error": {"code": "rate_limit_exceeded"}}).encode()


def test_a_new_replica_with_the_number_of_one_that_left_is_asked(
    upstreams: Upstreams, route: Route
) -> None:
    leaving, new = upstreams(2)
    routed = route([leaving.url])

    async def left(*given: Any) -> None:
        routed.replicas[:] = [Replica(1, new.url)]
        routed.replicas[0].healthy = True
        await refusing(503, b"", (b"retry-after", b"3"))(*given)

    leaving.answer = left
    assert routed.chat("hi").status_code == 200
    assert len(leaving.asked) == len(new.asked) == 1


def test_what_tls_makes_of_a_broken_answer_is_a_lost_replica(
    upstreams: Upstreams, route: Route, monkeypatch: pytest.MonkeyPatch
) -> None:
    behind = upstreams(2)
    routed = route([u.url for u in behind])
    broken: list[int] = []
    read = upstream_module._next

    async def breaking(chunks: AsyncIterator[bytes]) -> bytes:
        if not broken:
            broken.append(1)
            raise ssl.SSLError("bad record")
        return await read(chunks)

    monkeypatch.setattr(upstream_module, "_next", breaking)
    assert routed.chat("hi").status_code == 200
    assert broken and sum(len(u.asked) for u in behind) == 2
    lost = [routed.metric(f'kvshare_router_lost_total{{begun="false",replica="{n}"') for n in "12"]
    assert sum(lost) == 1


def test_two_that_close_before_they_have_all_of_a_body_are_not_ended_by_it(
    upstreams: Upstreams, route: Route
) -> None:
    [free] = upstreams(1)
    made = [dropping() for _ in range(2)]
    routed = route([*(url for url, _, _ in made), free.url], max_body_bytes=32 << 20)
    for number in range(6):
        for replica in routed.replicas:
            replica.healthy = True  # it was until now
        assert routed.chat(f"{number} {'x' * 24_000_000}").status_code == 200
    assert all(dropped for _, dropped, _ in made)
    for _, _, end in made:
        end()


def test_a_client_that_leaves_takes_nothing_from_another(
    upstreams: Upstreams, route: Route
) -> None:
    """Of two that ask the same at once, the first is who makes it known."""
    [one] = upstreams(1)
    routed = route([one.url])

    async def first_waits(upstream: Any, scope: Any, send: Any, receive: Any) -> None:
        if len(upstream.asked) == 1:
            await receive()  # until its client has gone
        else:
            await plain(upstream, scope, send, receive)

    one.answer = first_waits
    text = "the same question of two people, " * 9
    body = json.dumps({"messages": [{"role": "user", "content": text}]}).encode()
    parts = urlsplit(routed.url)
    with socket.create_connection((parts.hostname, parts.port), 30) as client:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}"
        client.sendall(f"{head}\r\n\r\n".encode() + body)
        until(lambda: len(one.asked) == 1)
        assert routed.chat(text).status_code == 200
    until(lambda: routed.replicas[0].in_flight == 0)
    assert routed.metric("kvshare_router_requests_known") == 1


def test_who_is_told_that_there_is_no_room_is_told_at_once(
    upstreams: Upstreams, route: Route
) -> None:
    """Who does not answer checks may take long to say nothing, or be somebody else by now."""
    full, other = upstreams(2)
    full.answer = refusing(429, b"", (b"retry-after", b"1"))
    other.health = 404
    routed = route([full.url, other.url])
    until(lambda: routed.replicas[0].healthy and not routed.replicas[1].healthy)
    reply = routed.chat("hi")
    assert (reply.status_code, reply.headers["retry-after"]) == (429, "1")
    assert len(other.asked) == 0


def test_a_refusal_is_better_than_that_another_took_too_long(
    upstreams: Upstreams, route: Route
) -> None:
    behind = upstreams(2)

    async def first_refuses(upstream: Any, scope: Any, send: Any, receive: Any) -> None:
        if sum(len(u.asked) for u in behind) == 1:
            await refusing(503, b"", (b"retry-after", b"3"))(upstream, scope, send, receive)
        else:
            await receive()  # until the router has gone

    for upstream in behind:
        upstream.health, upstream.answer = 503, first_refuses
    routed = route([u.url for u in behind], request_timeout_s=1.0)
    until(lambda: not any(r.healthy for r in routed.replicas))
    reply = routed.chat("hi")
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "3")
    assert sum(len(u.asked) for u in behind) == 2


def test_who_takes_no_body_costs_no_request(
    upstreams: Upstreams, route: Route, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upstream_module, "_WRITE_S", 3.0)
    [free] = upstreams(1)
    url, taken, end = dropping(reads=False)
    routed = route([url, free.url], max_body_bytes=32 << 20)
    for number in range(2):
        routed.replicas[0].healthy, routed.replicas[1].healthy = True, False
        assert routed.chat(f"{number} {'x' * 24_000_000}").status_code == 200
    assert taken
    end()


def leaving(code: str) -> Any:
    body = json.dumps({"error": {"code": code}}).encode()
    return refusing(503, body, (b"retry-after", b"5"))


@pytest.mark.parametrize(("code", "status"), [("stopping", 200), ("loading", 200), ("busy", 503)])
def test_who_starts_or_stops_has_not_said_that_there_is_no_room(
    upstreams: Upstreams, route: Route, code: str, status: int
) -> None:
    going, come = upstreams(2)
    going.answer = leaving(code)
    come.health = 503  # not checked yet
    routed = route([going.url, come.url])
    until(lambda: routed.replicas[0].healthy and not routed.replicas[1].healthy)
    assert routed.chat("hi").status_code == status


def test_a_request_that_two_did_not_survive_is_not_said_to_have_found_no_room(
    upstreams: Upstreams, route: Route
) -> None:
    [full] = upstreams(1)
    full.answer = refusing(429, b"", (b"retry-after", b"1"))
    made = [dropping() for _ in range(2)]
    routed = route([full.url, *(url for url, _, _ in made)])
    for number in range(20):  # the one that is full is among those asked, or it is not
        assert routed.chat(f"poison {number}").status_code == 502
        if full.asked:
            break
    assert full.asked
    for _, _, end in made:
        end()


def test_a_body_that_replicas_take_too_slowly_is_not_sent_to_all(
    upstreams: Upstreams, route: Route, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upstream_module, "_WRITE_S", 0.5)
    made = [dropping(reads=False) for _ in range(3)]
    routed = route([url for url, _, _ in made], max_body_bytes=32 << 20)
    reply = routed.chat("x" * 24_000_000)
    assert reply.status_code == 504 and reply.json()["error"]["code"] == "timeout"
    assert sorted(len(taken) for _, taken, _ in made) == [0, 1, 1]
    for _, _, end in made:
        end()


def test_a_replica_that_drops_requests_costs_none(upstreams: Upstreams, route: Route) -> None:
    [one] = upstreams(1)
    url, dropped, end = dropping()
    routed = route([url, one.url])
    replies = [routed.chat(f"{i} " * 9) for i in range(20)]  # nothing alike
    assert {r.status_code for r in replies} == {200} and len(one.asked) == 20
    assert dropped
    assert routed.metric('kvshare_router_requests_total{reason="retry",replica="2"}') == len(
        dropped
    )
    # It has none of them: what was lost there does not lead anybody.
    for i in range(4):
        routed.chat(f"{i} " * 9)
    assert routed.metric('kvshare_router_requests_total{reason="donor",replica="1"}') == 0
    end()


def test_a_request_that_replicas_do_not_survive_is_not_given_to_all(route: Route) -> None:
    made = [dropping() for _ in range(4)]
    routed = route([url for url, _, _ in made])
    reply = routed.chat("poison")
    assert reply.status_code == 502 and reply.json()["error"]["code"] == "lost"
    assert sorted(len(dropped) for _, dropped, _ in made) == [0, 0, 1, 1]
    for _, _, end in made:
        end()


@pytest.mark.parametrize(
    ("first", "others", "status", "asked"),
    [
        (refusing(429, _FULL, (b"retry-after", b"3")), None, 200, 2),
        (refusing(503, b"", (b"retry-after", b"3")), None, 200, 2),
        (refusing(503, b""), None, 503, 1),
        (refusing(429, _LIMIT, (b"retry-after", b"9")), None, 429, 1),
        (refusing(500, b""), None, 500, 1),
        (refusing(400, b""), None, 400, 1),
        (refusing(429, _FULL), refusing(503, b"", (b"retry-after", b"3")), 429, 3),
        (refusing(503, b"", (b"retry-after", b"3")), refusing(429, _FULL), 429, 3),
    ],
)  # fmt: skip
def test_who_has_no_room_is_not_the_last_to_be_asked(
    upstreams: Upstreams, route: Route, first: Any, others: Any, status: int, asked: int
) -> None:
    behind = upstreams(3)
    routed = route([u.url for u in behind])
    number = int(routed.chat(REPORT.format(1)).headers["x-kvshare-replica"]) - 1
    behind[number].answer = first
    for i, other in enumerate(behind):
        if i != number and others is not None:
            other.answer = others
    reply = routed.chat(REPORT.format(2))
    assert (reply.status_code, sum(sent_to(behind))) == (status, 1 + asked)


def test_where_none_is_healthy_requests_are_sent_all_the_same(
    upstreams: Upstreams, route: Route
) -> None:
    behind = upstreams(2)
    routed = route([u.url for u in behind])
    for upstream in behind:
        upstream.health = 503
    until(lambda: not any(r.healthy for r in routed.replicas))
    assert routed.chat("hi").status_code == 200
    assert sum(sent_to(behind)) == 1
    for upstream in behind:
        upstream.answer = refusing(503, b"", (b"retry-after", b"3"))
    assert routed.chat("hi").status_code == 503
    assert sum(sent_to(behind)) == 1 + 2, "each is asked before a client is refused"
    behind[1].answer = plain
    assert [routed.chat(f"hi {i}").status_code for i in range(8)] == [200] * 8


def test_without_replicas_nothing_is_answered(route: Route) -> None:
    with closing(socket.socket()) as unused:  # it has a port, and does not listen
        unused.bind(("127.0.0.1", 0))
        routed = route([f"http://127.0.0.1:{unused.getsockname()[1]}"])
        for path in ("/health", "/v1/models", "/v1/files"):
            reply = routed.ask("GET", path)
            assert reply.status_code == 503 and reply.headers["retry-after"]
            assert reply.json()["error"]["code"] == "no_replica"


def test_an_answer_that_breaks_off_is_not_repeated(upstreams: Upstreams, route: Route) -> None:
    behind = upstreams(2)

    async def breaking(upstream: Any, scope: Any, send: Any, receive: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
        # Without its end: uvicorn closes the connection.

    for upstream in behind:
        upstream.answer = breaking
    routed = route([u.url for u in behind])
    with pytest.raises(httpx2.RemoteProtocolError):
        routed.chat("hi")
    assert sum(sent_to(behind)) == 1
    until(lambda: all(r.in_flight == 0 for r in routed.replicas))


@pytest.mark.parametrize(
    ("other", "got"),
    [
        (b"data: whole\n\n", b"data: whole\n\n"),
        (b"", None),  # it has no room, which a client that has a head cannot be told
    ],
)
def test_a_stream_that_is_lost_before_its_first_byte_is_answered_by_another(
    upstreams: Upstreams, route: Route, monkeypatch: pytest.MonkeyPatch, other: bytes, got: Any
) -> None:
    monkeypatch.setattr(upstream_module, "_HEAD_AFTER_S", 0.05)
    head = [(b"content-type", b"text/event-stream")]
    behind = upstreams(2)
    go = threading.Event()

    async def leaving(upstream: Any, scope: Any, send: Any, receive: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": head})
        await asyncio.to_thread(go.wait)

    async def answering(upstream: Any, scope: Any, send: Any, receive: Any) -> None:
        if len(behind[0].asked) + len(behind[1].asked) == 1:
            await leaving(upstream, scope, send, receive)
        elif other:
            await send({"type": "http.response.start", "status": 200, "headers": head})
            await send({"type": "http.response.body", "body": other})
        else:
            await refusing(503, b"", (b"retry-after", b"3"))(upstream, scope, send, receive)

    for upstream in behind:
        upstream.answer = answering
    routed = route([u.url for u in behind])
    url = f"{routed.url}/v1/chat/completions"
    with httpx2.stream("POST", url, json={}, timeout=30) as reply:
        assert reply.status_code == 200  # the head is there
        until(lambda: all(r.healthy for r in routed.replicas))
        go.set()
        if got is None:
            with pytest.raises(httpx2.RemoteProtocolError):
                reply.read()
        else:
            assert reply.read() == got
    assert sum(sent_to(behind)) == 2
    until(lambda: all(r.in_flight == 0 for r in routed.replicas))


@pytest.mark.parametrize("size", [100, 5_000_000, 24_000_000])
def test_who_is_refused_a_connection_in_the_middle_of_a_body_goes_elsewhere(
    upstreams: Upstreams, route: Route, size: int
) -> None:
    [free] = upstreams(1)
    with ExitStack() as stack:
        full = []
        for _ in range(2):
            options = ServerOptions(
                model_name="", shutdown_timeout_s=1, max_connections_per_client=2
            )
            listening = run.bind("127.0.0.1", 0)
            address = listening.getsockname()
            full.append(f"http://127.0.0.1:{address[1]}")
            server = run.Server(Upstream(), options, CollectorRegistry())
            stack.callback(run_app(server, listening))
            for _ in range(2):  # others of its address hold its connections
                stack.callback(socket.create_connection(address, 30).close)
        routed = route([*full, free.url], max_body_bytes=32 << 20)
        for number in range(8):
            for replica in routed.replicas:
                replica.healthy = True  # it was until now
            assert routed.chat(f"{number} {'x' * size}").status_code == 200
