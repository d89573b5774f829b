"""What a client sees when something goes wrong between a router and its replicas."""

from __future__ import annotations

import json
import socket
import ssl
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

import pytest

from kvshare_mm.apps.router import upstream as upstream_module
from kvshare_mm.apps.router.replicas import Replica

from ...helpers import until
from .conftest import Route, Upstreams, dropping, plain, refusing


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
    monkeypatch.setattr(upstream_module, "_WRITE_S", 0.5)
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
