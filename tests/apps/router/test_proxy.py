"""What a client sees of a router, and what replicas see of a client."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest

from kvshare_mm.apps.router.headers import is_passed_on, to_client, to_replica
from kvshare_mm.apps.server.hosts import allowed_hosts

from ...helpers import in_threads, until
from .conftest import REPORT, Route, Upstreams, refusing, sent_to

# -- where requests go -------------------------------------------------------------------------


def test_alike_requests_go_where_the_first_went(upstreams: Upstreams, route: Route) -> None:
    behind = upstreams(4)
    routed = route([u.url for u in behind])
    went = [routed.chat(REPORT.format(i)).headers["x-kvshare-replica"] for i in range(6)]
    assert len(set(went)) == 1 and sorted(sent_to(behind)) == [0, 0, 0, 6]
    label = f'kvshare_router_requests_total{{reason="donor",replica="{went[0]}"}}'
    assert routed.metric(label) == 5
    assert routed.metric("kvshare_router_decision_seconds_count") == 6
    assert routed.metric(f'kvshare_router_in_flight{{replica="{went[0]}"}}') == 0
    assert routed.metric("kvshare_router_requests_known ") == 6


def test_tenants_do_not_lead_each_other(upstreams: Upstreams, route: Route) -> None:
    behind = upstreams(8)
    routed = route([u.url for u in behind])
    went = {routed.chat("the same " * 20, key=f"key-{i}").headers["x-kvshare-replica"]
            for i in range(24)}  # fmt: skip
    assert len(went) > 1


def test_large_bodies_are_read_too(upstreams: Upstreams, route: Route) -> None:
    behind = upstreams(4)
    routed = route([u.url for u in behind])
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 200_000}}
    for question in ("What is it?", "Is it damaged?", "How old is it?"):
        part = {"type": "text", "text": question}
        body = {"messages": [{"role": "user", "content": [image, part]}]}
        assert routed.ask("POST", "/v1/chat/completions", json=body).status_code == 200
    assert sorted(sent_to(behind)) == [0, 0, 0, 3]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"messages": 3}', b"[" * 70_000])
def test_what_cannot_be_read_is_passed_on(
    upstreams: Upstreams, route: Route, content: bytes
) -> None:
    [one] = upstreams(1)
    reply = route([one.url]).ask("POST", "/v1/chat/completions", content=content)
    assert reply.status_code == 200 and one.asked[0]["body"] == content


# -- what is passed on -------------------------------------------------------------------------


def test_all_of_it_is_passed_on_unchanged(upstreams: Upstreams, route: Route) -> None:
    [one] = upstreams(1)
    one.headers = [(b"x-more", b"1"), (b"x-more", b"2"), (b"content-type", b"text/x"),
                   (b"content-length", b"13"), (b"connection", b"x-h"), (b"x-h", b"1")]  # fmt: skip
    routed = route([one.url])
    body = b'{ "messages" : [ {"role":"user","content":"hi"} ] }'
    reply = routed.ask(
        "POST", "/v1/chat/completions?a=%2F&b", content=body,
        headers={"Authorization": "Bearer k", "X-Request-Id": "mine", "Cookie": "c=1",
                 "X-Forwarded-For": "1.2.3.4", "TE": "trailers", "Connection": "x-a", "X-A": "1"},
    )  # fmt: skip
    [seen] = one.asked
    assert (seen["path"], seen["query_string"], seen["body"]) == (
        "/v1/chat/completions", b"a=%2F&b", body,
    )  # fmt: skip
    got = dict(seen["headers"])
    assert got[b"authorization"] == b"Bearer k" and got[b"cookie"] == b"c=1"
    assert got[b"x-request-id"] == b"mine" == reply.headers["x-request-id"].encode()
    assert got[b"host"] == urlsplit(one.url).netloc.encode()
    assert not {b"x-forwarded-for", b"te", b"x-a", b"transfer-encoding"} & set(got)
    assert reply.headers.get_list("x-more") == ["1", "2"] and "x-h" not in reply.headers
    assert reply.content == b'{"answer": 1}' and reply.headers["x-kvshare-replica"] == "1"
    assert len(reply.headers.get_list("date")) == 1


def test_a_stream_comes_byte_for_byte_as_it_is_made(upstreams: Upstreams, route: Route) -> None:
    [one] = upstreams(1)
    pieces = [b"data: {}\r\n\r\n", b": a comment\n\nda", b"ta: \xff\n\n", b"data: [DONE]\n\n"]
    go = threading.Semaphore(1)

    async def answer(upstream: Any, scope: Any, send: Any, receive: Any) -> None:
        head = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        for piece in pieces:
            await asyncio.to_thread(go.acquire)
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    one.answer = answer
    routed = route([one.url])
    with httpx2.stream("POST", f"{routed.url}/v1/chat/completions", json={}, timeout=30) as reply:
        got = []
        for chunk in reply.iter_raw():  # each piece is there before the next one is made
            got.append(chunk)
            go.release()
    assert b"".join(got) == b"".join(pieces) and len(got) == len(pieces)


@pytest.mark.parametrize(
    ("path", "passed"),
    [
        ("/v1/completions", True), ("/v1/models/org/name:1", True), ("/tokenize", True),
        ("/v1/cache", False), ("/v1/cache/donors", False), ("/v1/load_lora_adapter", False),
        ("/v1/../v1/cache", False), ("/v1/x/..", False), ("/v1//cache", False), ("/v1/", False),
        ("/v1/a b", False), ("/v1/a\r\nx: y", False), ("/v1/a?b", False), ("/metrics/x", False),
        ("//v1/x", False), ("/v1", False), ("/v1/ä", False), ("http://x/v1/y", False),
    ],
)  # fmt: skip
def test_paths(path: str, passed: bool) -> None:
    assert is_passed_on(path) == passed


def test_no_other_path_reaches_a_replica(upstreams: Upstreams, route: Route) -> None:
    [one] = upstreams(1)
    routed = route([one.url])
    for path, status in (
        ("/v1/cache", 403), ("/v1/%63ache/donors", 403), ("/v1/x/%2e%2e/cache", 404),
        ("/v1/a%0d%0ab", 404), ("/v1/a%3fb", 404), ("/docs", 404), ("/", 404),
    ):  # fmt: skip
        reply = routed.ask("GET", path, headers={"Authorization": "Bearer any"})
        assert (path, reply.status_code) == (path, status)
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
    assert routed.ask("PUT", "/v1/files").status_code == 405
    assert one.asked == []


@pytest.mark.parametrize(
    ("head", "body", "seen"),
    [
        (b"Content-Length: 4\r\nTransfer-Encoding: chunked", b"2\r\nhi\r\n0\r\n\r\n", b"hi"),
        (b"Content-Length: 2\r\nContent-Length: 3", b"hi!", None),
        (b"Transfer-Encoding: gzip, chunked", b"2\r\nhi\r\n0\r\n\r\n", None),
        (b"Content-Length : 2", b"hi", None),
        (b"Content-Length: 2\r\nX: a\rTransfer-Encoding: chunked", b"hi", None),
        (b"Content-Length: 2\r\nX: a\x00b", b"hi", None),
        (b"Content-Length: 2", b"hiGET /v1/cache HTTP/1.1\r\nHost: a\r\n\r\n", b"hi"),
    ],
)
def test_nothing_is_smuggled(
    upstreams: Upstreams, route: Route, head: bytes, body: bytes, seen: bytes | None
) -> None:
    [one] = upstreams(1)
    address = urlsplit(route([one.url]).url)
    with socket.create_connection((str(address.hostname), address.port or 0), 30) as client:
        client.sendall(b"POST /v1/files HTTP/1.1\r\nHost: a\r\n" + head + b"\r\n\r\n" + body)
        status = client.recv(1 << 16).split()[1]
    assert status == (b"400" if seen is None else b"200")
    assert [each["body"] for each in one.asked] == ([] if seen is None else [seen])
    for each in one.asked:
        lengths = [v for n, v in each["headers"] if n in {b"content-length", b"transfer-encoding"}]
        assert lengths == [str(len(each["body"])).encode()]


def test_heads() -> None:
    given = [(b"Connection", b"close, X-One"), (b"X-One", b"1"), (b"Host", b"h"), (b"A", b"b")]
    assert to_replica(given, "id") == [(b"a", b"b"), (b"x-request-id", b"id")]
    assert to_client([*given, (b"Date", b"d")], 3)[-1] == (b"x-kvshare-replica", b"3")


def test_a_replica_comes_and_goes_and_keeps_its_requests(
    upstreams: Upstreams, route: Route
) -> None:
    behind = upstreams(2)
    routed = route([u.url for u in behind])
    number = int(routed.chat(REPORT.format(1)).headers["x-kvshare-replica"]) - 1
    behind[number].health = 503
    until(lambda: not routed.replicas[number].healthy)
    assert routed.metric(f'kvshare_router_up{{replica="{number + 1}"}}') == 0
    assert routed.chat("something else entirely").headers["x-kvshare-replica"] != str(number + 1)
    assert routed.ask("GET", "/health").json()["answering"] == 1
    behind[number].health = 200
    until(lambda: routed.replicas[number].healthy)
    for replica in routed.replicas:
        replica._seconds = None  # how fast each was on this machine decides nothing here
    assert routed.chat(REPORT.format(2)).headers["x-kvshare-replica"] == str(number + 1)


@pytest.mark.parametrize("begun", [False, True])
def test_a_client_that_goes_ends_its_request(
    upstreams: Upstreams, route: Route, begun: bool
) -> None:
    [one] = upstreams(1)
    gone = threading.Event()

    async def answer(upstream: Any, scope: Any, send: Any, receive: Any) -> None:
        if begun:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
        while (await receive())["type"] != "http.disconnect":
            pass
        gone.set()

    one.answer = answer
    routed = route([one.url])
    address = urlsplit(routed.url)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n"
    with socket.create_connection((str(address.hostname), address.port or 0), 30) as client:
        client.sendall(head + b"{}")
        until(lambda: bool(one.asked))
        said = b""
        while begun and b"data: 1" not in said:
            said += client.recv(1 << 16)
    until(gone.is_set)
    until(lambda: routed.replicas[0].in_flight == 0)
    gone_ones = 'kvshare:http_requests_total{route="/v1/chat/completions",status="499"'
    until(lambda: routed.metric(gone_ones) == 1)


# -- models, bounds, names ---------------------------------------------------------------------


def test_models_of_all(upstreams: Upstreams, route: Route) -> None:
    behind = upstreams(3)
    for upstream, names in zip(behind, (["a"], ["a", "b"], []), strict=True):
        listed = json.dumps({"object": "list", "data": [{"id": name} for name in names]})
        upstream.answer = refusing(200, listed.encode())
    behind[2].answer = refusing(401, b'{"error": {}}', (b"www-authenticate", b"Bearer"))
    routed = route([u.url for u in behind])
    reply = routed.ask("GET", "/v1/models", headers={"Authorization": "Bearer k"})
    assert [model["id"] for model in reply.json()["data"]] in (["a", "b"], ["b", "a"])
    assert all(dict(u.asked[0]["headers"])[b"authorization"] == b"Bearer k" for u in behind)
    for upstream in behind:
        upstream.answer = behind[2].answer
    reply = routed.ask("GET", "/v1/models")
    assert reply.status_code == 401 and reply.headers["www-authenticate"] == "Bearer"


def test_bodies_are_bounded_one_by_one_and_in_all(upstreams: Upstreams, route: Route) -> None:
    [one] = upstreams(1)
    routed = route([one.url], max_body_bytes=3000, max_held_bytes=4000)
    assert routed.ask("POST", "/v1/files", content=b"x" * 3001).status_code == 413
    assert routed.ask("POST", "/v1/files", content=iter([b"x" * 2000] * 2)).status_code == 413
    go = threading.Event()

    async def waiting(upstream: Any, scope: Any, send: Any, receive: Any) -> None:
        await asyncio.to_thread(go.wait, 30)
        await refusing(200, b"")(upstream, scope, send, receive)

    one.answer = waiting
    statuses: list[int] = []

    def ask(_: int) -> None:
        statuses.append(routed.ask("POST", "/v1/files", content=b"x" * 2500).status_code)
        go.set()  # the one that was refused is the first to come back

    in_threads(ask, [0, 1])
    assert sorted(statuses) == [200, 503]
    assert routed.ask("POST", "/v1/files", content=b"x" * 2500).status_code == 200


def test_models_while_no_check_succeeds(upstreams: Upstreams, route: Route) -> None:
    [one] = upstreams(1)
    one.health = 503
    one.answer = refusing(200, b'{"object": "list", "data": [{"id": "a"}]}')
    routed = route([one.url])
    assert [model["id"] for model in routed.ask("GET", "/v1/models").json()["data"]] == ["a"]


def test_only_the_routers_own_names_are_answered(upstreams: Upstreams, route: Route) -> None:
    [one] = upstreams(1)
    routed = route([one.url], allowed_hosts=allowed_hosts((), "127.0.0.1", False))
    assert routed.ask("GET", "/v1/models", headers={"Host": "evil.example"}).status_code == 421
    assert routed.ask("GET", "/v1/files").status_code == 200
