"""Clients that say half of it, read nothing, or come in crowds; and the end of a server."""

from __future__ import annotations

import asyncio
import json
import logging
import resource
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest
from prometheus_client import CollectorRegistry
from starlette.types import ASGIApp, Receive, Scope, Send

from kvshare_mm.apps.server import connections, gate, run
from kvshare_mm.apps.server.gate import Gate
from kvshare_mm.apps.server.keys import KeyRing
from kvshare_mm.apps.server.limits import Meters
from kvshare_mm.apps.server.options import ServerOptions

from ...helpers import until

_CERTIFICATE = Path(__file__).with_name("certificate.pem")
_HALF = b"GET /x HTTP/1.1\r\nHost: localhost\r\nX-Half: "
_WHOLE = b"GET /x HTTP/1.1\r\nHost: localhost\r\n\r\n"
_SHORT = {"header_timeout_s": 0.3, "idle_timeout_s": 0.3, "write_timeout_s": 0.3}


def saying(content: bytes, *more: tuple[bytes, bytes]) -> ASGIApp:
    """An application that reads no body, and answers with this."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        head = [(b"content-length", b"%d" % len(content)), *more]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        await send({"type": "http.response.body", "body": content})

    return app


hello = saying(b"hello")


@dataclass
class Serving:
    """A server of one small application."""

    port: int
    server: run.Server
    registry: CollectorRegistry
    thread: threading.Thread
    sockets: list[socket.socket] = field(default_factory=list)

    def connect(self, said: bytes = b"", source: str = "127.0.0.1") -> socket.socket:
        with self._paused() if said else nullcontext():
            made = socket.create_connection(
                ("127.0.0.1", self.port), timeout=30, source_address=(source, 0)
            )
            self.sockets.append(made)
            made.sendall(said)
        return made

    @contextmanager
    def _paused(self) -> Iterator[None]:
        """No connection is accepted, and no deadline of one begins, before the block is over."""
        paused, go_on = threading.Event(), threading.Event()

        def wait() -> None:
            paused.set()
            go_on.wait(60)

        self.server.servers[0].get_loop().call_soon_threadsafe(wait)
        assert paused.wait(60)
        try:
            yield
        finally:
            go_on.set()

    def num_open(self) -> float | None:
        return self.registry.get_sample_value("kvshare:connections")

    def stop(self) -> None:
        for each in self.sockets:
            each.close()
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()


Serve = Callable[..., Serving]


@pytest.fixture
def serve() -> Iterator[Serve]:
    started: list[Serving] = []

    def make(app: ASGIApp = hello, gated: bool = False, **options: Any) -> Serving:
        registry = CollectorRegistry()
        chosen = ServerOptions("tiny", **{"shutdown_timeout_s": 5.0, **options})
        if gated:
            app = Gate(app, chosen, KeyRing(None), Meters(), registry)

        async def with_life(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "lifespan":
                for step in ("startup", "shutdown"):
                    await receive()
                    await send({"type": f"lifespan.{step}.complete"})
            else:
                await app(scope, receive, send)

        server = run.Server(with_life, chosen, registry)
        listening = run.bind("127.0.0.1", 0)
        port = listening.getsockname()[1]
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        until(lambda: server.started)
        started.append(Serving(port, server, registry, thread))
        return started[-1]

    yield make
    for each in started:
        each.stop()


def drip(client: socket.socket) -> bool:
    """Send one more byte; whether the connection still stands."""
    try:
        client.sendall(b"x")
        client.setblocking(False)
        return bool(client.recv(1 << 16))
    except (BlockingIOError, ssl.SSLWantReadError):
        return True
    except OSError:
        return False
    finally:
        client.setblocking(True)


def answered(client: socket.socket) -> bool:
    """Whether the application's whole answer comes."""
    said = b""
    while b"hello" not in said and (more := client.recv(1 << 16)):
        said += more
    return b"hello" in said


def dripped_to_its_end(*clients: socket.socket) -> None:
    def ended() -> bool:
        time.sleep(0.02)
        return not any([drip(client) for client in clients])

    until(ended)


def test_half_sent_headers_end(serve: Serve) -> None:
    serving = serve(**_SHORT)
    dripped_to_its_end(*(serving.connect(_HALF) for _ in range(40)))
    until(lambda: serving.num_open() == 0)


@pytest.mark.parametrize(
    ("first", "more"),
    [(_WHOLE, _HALF), (b"POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n", b"")],
    ids=["headers of a second request", "a body that nobody reads"],
)
def test_what_is_half_sent_behind_an_answer_ends(serve: Serve, first: bytes, more: bytes) -> None:
    client = serve(**{**_SHORT, "idle_timeout_s": 30}).connect(first)
    assert answered(client)
    client.sendall(more)
    dripped_to_its_end(client)


def test_clients_that_say_nothing_and_idle_connections_end(serve: Serve) -> None:
    serving = serve(**_SHORT)
    assert serving.connect().recv(1) == b""
    client = serving.connect(_WHOLE)
    assert answered(client)
    assert client.recv(1) == b""


def test_a_long_request_does_not(serve: Serve) -> None:
    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(1.0)
        await hello(scope, receive, send)

    client = serve(slow, **_SHORT).connect(_WHOLE)
    assert answered(client)


def test_requests_sent_together_are_answered_in_turn(serve: Serve) -> None:
    client = serve(**_SHORT).connect(_WHOLE * 3 + _HALF)
    said = b""
    while more := client.recv(1 << 16):
        said += more
    assert said.count(b"hello") == 3


def test_a_client_that_reads_nothing_ends(serve: Serve) -> None:
    held: list[int] = []
    gone = threading.Event()

    async def endless(scope: Scope, receive: Receive, send: Send) -> None:
        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            gone.set()

        watching = asyncio.create_task(watch())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while not gone.is_set():
            held.append(sum(c.transport.get_write_buffer_size() for c in _connections(serving)))
            await send({"type": "http.response.body", "body": b"x" * 100_000, "more_body": True})
        await watching

    serving = serve(endless, write_timeout_s=0.3)
    serving.connect(_WHOLE)
    until(gone.is_set)
    until(lambda: serving.num_open() == 0)
    assert max(held) <= 200_000  # not what the application had to say


def test_a_short_answer_that_is_not_read_ends(serve: Serve) -> None:
    """Closing a connection waits for what was written to it."""
    begun = threading.Event()
    answer = saying(bytes(16 << 20), (b"connection", b"close"))

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        begun.set()
        await answer(scope, receive, send)

    serving = serve(app, write_timeout_s=0.3)
    serving.connect(_WHOLE)
    assert begun.wait(30)
    until(lambda: serving.num_open() == 0)


def test_a_client_that_reads_slowly_gets_all(serve: Serve) -> None:
    size = 20 << 20
    client = serve(saying(bytes(size)), **{**_SHORT, "write_timeout_s": 3.0}).connect(_WHOLE)
    got = 0
    while got < size:
        time.sleep(0.2)  # longer than the timeout in all
        more = len(client.recv(1 << 20, socket.MSG_WAITALL))
        assert more
        got += more


def test_a_crowd_of_one_client_leaves_room_for_others(serve: Serve) -> None:
    serving = serve(max_connections=5, max_connections_per_client=3)
    first = [serving.connect() for _ in range(3)]
    until(lambda: serving.num_open() == 3)
    refused = serving.connect().recv(1 << 16, socket.MSG_WAITALL)
    assert refused.startswith(b"HTTP/1.1 503 ") and b"retry-after: 5\r\n" in refused
    assert json.loads(refused.partition(b"\r\n\r\n")[2])["error"]["code"] == "too_many_connections"
    for _ in range(2):
        other = serving.connect(_WHOLE, "127.0.0.2")
        assert answered(other)
    assert serving.connect(source="127.0.0.3").recv(12) == b"HTTP/1.1 503"
    assert serving.num_open() == 5
    first[0].close()
    until(lambda: serving.num_open() == 4)
    assert answered(serving.connect(_WHOLE, "127.0.0.3"))
    for bound in ("client", "all"):
        name = "kvshare:connections_refused_total"
        assert serving.registry.get_sample_value(name, {"bound": bound}) == 1


def test_a_thousand_refusals_are_a_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    counted = connections.Connections(1, 1, CollectorRegistry(), lambda: now)
    assert counted.admit("a")
    assert not any(counted.admit("b") for _ in range(1000))
    now = 61.0
    assert not counted.admit("b")
    ours = (record for record in caplog.records if record.name == connections.__name__)
    first, second = (record.getMessage() for record in ours)
    assert "--max-connections 1" in first and "(999 more" in second
    counted.release("a")
    assert counted.num_open == 0 and counted.admit("b")


def test_no_more_files_is_a_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async def fail() -> None:
        loop = asyncio.get_running_loop()
        connections.quiet_about_files(loop)
        error = OSError(24, "Too many open files")
        said = "socket.accept() out of system resource"
        for _ in range(1000):
            loop.call_exception_handler({"message": said, "exception": error})
        loop.call_exception_handler({"message": "something else"})

    asyncio.run(fail())
    assert [record.name for record in caplog.records] == [connections.__name__, "asyncio"]
    assert "Too many open files" in caplog.records[0].getMessage()


@pytest.mark.parametrize(
    ("limits", "fitting", "raised"),
    [
        ((256, 4096), 1000, (1160, 4096)),
        ((256, resource.RLIM_INFINITY), 1000, (1160, resource.RLIM_INFINITY)),
        ((4096, 4096), 1000, None),
        ((400, 400), 240, None),
        ((50, 100), 16, (100, 100)),
    ],
)
def test_connections_fit_into_the_files_of_the_process(
    monkeypatch: pytest.MonkeyPatch,
    limits: tuple[int, int],
    fitting: int,
    raised: tuple[int, int] | None,
) -> None:
    changed: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda _, to: changed.append(to))
    assert connections.room_for(1000) == fitting
    assert changed == ([] if raised is None else [raised])


@pytest.mark.parametrize(("allowed", "fitting"), [(4096, 1000), (1024, 304)])
def test_some_connections_take_two_files(
    monkeypatch: pytest.MonkeyPatch, allowed: int, fitting: int
) -> None:
    """A router's: the client's, and one to a replica."""
    changed: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, allowed))
    monkeypatch.setattr(resource, "setrlimit", lambda _, to: changed.append(to))
    assert connections.room_for(1000, files_each=2, others=256) == fitting
    assert changed == [(min(allowed, 2 * 1000 + 160 + 256), allowed)]


def test_who_sends_a_large_body_is_told_too(
    serve: Serve, beside: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection that was closed before all of it is read would be reset, the answer lost."""
    monkeypatch.setattr(gate, "_REST_S", 30.0)  # on a machine that is busy
    app, begun, go_on = with_a_long_one()
    serving = serve(app, gated=True, shutdown_timeout_s=30.0)
    url = f"http://127.0.0.1:{serving.port}"
    headers = {"Authorization": "Bearer x"}

    async def sent() -> list[int]:
        limits = httpx2.Limits(keepalive_expiry=60)
        async with (
            httpx2.AsyncClient(base_url=url, headers=headers, timeout=30, limits=limits) as one,
            httpx2.AsyncClient(base_url=url, headers=headers, timeout=30, limits=limits) as other,
        ):
            for client in (one, other):
                assert (await client.get("/x")).status_code == 200
            beside.submit(httpx2.get, f"{url}/long", headers=headers, timeout=30)
            assert await asyncio.to_thread(begun.wait, 30)
            serving.server.should_exit = True
            await asyncio.to_thread(until, lambda: not serving.server.servers[0].is_serving())
            replies = [await c.post("/x", content=b"x" * 8_000_000) for c in (one, other)]
            return [reply.status_code for reply in replies]

    try:
        assert asyncio.run(sent()) == [503, 503]
    finally:
        go_on.set()


@pytest.mark.parametrize(
    ("address", "client"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
    ],
)
def test_a_client_is_an_address_or_a_network_of_ipv6(address: str, client: str) -> None:
    assert connections.client_of(address) == client


def with_a_long_one() -> tuple[ASGIApp, threading.Event, threading.Event]:
    """An application whose /long has begun with the one event, and ends with the other."""
    begun, go_on = threading.Event(), threading.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/long":
            begun.set()
            await asyncio.to_thread(go_on.wait, 30)
        await hello(scope, receive, send)

    return app, begun, go_on


def test_requests_after_the_end_has_begun_are_told_to_come_back(
    serve: Serve, beside: Executor
) -> None:
    app, begun, go_on = with_a_long_one()
    serving = serve(app, gated=True, shutdown_timeout_s=30.0)
    url = f"http://127.0.0.1:{serving.port}"
    headers = {"Authorization": "Bearer x"}
    kept_open = httpx2.Limits(keepalive_expiry=60)
    with httpx2.Client(base_url=url, headers=headers, timeout=30, limits=kept_open) as kept:
        assert kept.get("/x").status_code == 200
        silent = serving.connect()
        long = beside.submit(httpx2.get, f"{url}/long", timeout=30)
        assert begun.wait(30)
        serving.server.should_exit = True
        until(lambda: not serving.server.servers[0].is_serving())
        refused = kept.get("/x")
    assert refused.status_code == 503
    assert refused.headers["retry-after"] == "5" and refused.headers["connection"] == "close"
    assert refused.json()["error"]["code"] == "stopping"
    with pytest.raises(ConnectionError):
        serving.connect()
    go_on.set()
    assert long.result(30).text == "hello"
    assert silent.recv(1) == b""
    serving.thread.join(30)
    assert not serving.thread.is_alive()


def test_https(serve: Serve) -> None:
    serving = serve(ssl_certfile=_CERTIFICATE, max_connections_per_client=2)
    trusted = ssl.create_default_context(cafile=str(_CERTIFICATE))
    reply = httpx2.get(f"https://localhost:{serving.port}/x", verify=trusted, timeout=30)
    assert reply.text == "hello"
    until(lambda: serving.num_open() == 0)
    plain = [serving.connect() for _ in range(2)]  # before the handshake they count, too
    until(lambda: serving.num_open() == 2)
    assert serving.connect().recv(1) == b""  # nothing that is not TLS
    for each in plain:
        each.close()
    until(lambda: serving.num_open() == 0)
    short = serve(ssl_certfile=_CERTIFICATE, **_SHORT)
    raw = socket.create_connection(("127.0.0.1", short.port), timeout=30)
    with closing(trusted.wrap_socket(raw, server_hostname="localhost")) as client:
        client.sendall(_HALF)
        dripped_to_its_end(client)


def test_websockets_are_not_spoken(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    asked = _WHOLE[:-2] + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    assert b"200 OK" in serve().connect(asked).recv(1 << 16)
    assert "WebSocket" not in caplog.text


def _connections(serving: Serving) -> list[Any]:
    return list(serving.server.server_state.connections)
