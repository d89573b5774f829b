"""A router on a real socket, before servers that answer as a test wants it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx2
import pytest
import uvicorn

from kvshare_mm.apps.router import replicas as replicas_module
from kvshare_mm.apps.router import upstream as upstream_module
from kvshare_mm.apps.router.app import create_app
from kvshare_mm.apps.router.fleet import fleet_of
from kvshare_mm.apps.router.replicas import Replica
from kvshare_mm.apps.server import run
from kvshare_mm.apps.server.options import ServerOptions

from ...helpers import until


@pytest.fixture(autouse=True)
def slow_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that a busy machine holds up for seconds is still one that answers."""
    monkeypatch.setattr(replicas_module, "_CHECK_TIMEOUT_S", 30.0)
    monkeypatch.setattr(upstream_module, "CONNECT_S", 30.0)


Answer = Callable[["Upstream", dict[str, Any], Callable[..., Awaitable[Any]], Any], Awaitable[None]]


async def plain(
    upstream: Upstream, scope: dict[str, Any], send: Callable[..., Awaitable[Any]], receive: Any
) -> None:
    """A short answer at once."""
    await send({"type": "http.response.start", "status": 200, "headers": upstream.headers})
    await send({"type": "http.response.body", "body": b'{"answer": 1}'})


def refusing(status: int, body: bytes, *headers: tuple[bytes, bytes]) -> Answer:
    async def answer(_: Any, scope: dict[str, Any], send: Any, receive: Any) -> None:
        await send({"type": "http.response.start", "status": status, "headers": [*headers]})
        await send({"type": "http.response.body", "body": body})

    return answer


@dataclass
class Upstream:
    """A server that keeps what it was asked; `answer` is how it answers."""

    answer: Answer = plain
    headers: list[tuple[bytes, bytes]] = field(
        default_factory=lambda: [(b"content-type", b"application/json")]
    )
    asked: list[dict[str, Any]] = field(default_factory=list)
    url: str = ""
    health: int = 200

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["path"] == "/health":
            await refusing(self.health, b"")(self, scope, send, receive)
            return
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        self.asked.append({**scope, "body": body})
        await self.answer(self, scope, send, receive)


@dataclass
class Routed:
    """A router and what is behind it."""

    url: str
    replicas: list[Replica]

    def ask(self, method: str, path: str, **options: Any) -> httpx2.Response:
        return httpx2.request(method, self.url + path, timeout=30, **options)

    def chat(self, text: str, key: str = "", **fields: Any) -> httpx2.Response:
        body = {"messages": [{"role": "user", "content": text}], **fields}
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return self.ask("POST", "/v1/chat/completions", json=body, headers=headers)

    def metric(self, line: str) -> float:
        for found in self.ask("GET", "/metrics").text.splitlines():
            if found.startswith(line):
                return float(found.rsplit(" ", 1)[1])
        return 0.0


def dropping(reads: bool = True) -> tuple[str, list[int], Callable[[], None]]:
    """A server that is healthy, and closes every other connection once it has read something, or
    reads no more of it."""
    listening = socket.create_server(("127.0.0.1", 0))
    dropped: list[int] = []
    held: list[socket.socket] = []

    def serve() -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            read = connection.recv(65536)
            if read.startswith(b"GET /health"):
                head = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
                connection.sendall(head)
            else:
                dropped.append(len(read))
                if not reads:
                    held.append(connection)
                    continue
            connection.close()

    def end() -> None:
        for each in (listening, *held):
            each.close()

    threading.Thread(target=serve, daemon=True).start()
    return f"http://127.0.0.1:{listening.getsockname()[1]}", dropped, end


def run_app(server: uvicorn.Server, listening: socket.socket) -> Callable[[], None]:
    """Serve in a thread; what is returned ends it."""
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    until(lambda: server.started or not thread.is_alive())

    def stop() -> None:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()

    return stop


REPORT = "Patient 48210, haemoglobin 148 g/L, sodium 141 mmol/L, seen on the second floor, {}."


def sent_to(upstreams: list[Upstream]) -> list[int]:
    return [len(u.asked) for u in upstreams]


Upstreams = Callable[[int], list[Upstream]]
Route = Callable[..., Routed]


@pytest.fixture
def upstreams() -> Iterator[Upstreams]:
    ends = []

    def make(count: int) -> list[Upstream]:
        made = [Upstream() for _ in range(count)]
        for upstream in made:
            listening = run.bind("127.0.0.1", 0)
            upstream.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
            config = uvicorn.Config(
                upstream,
                log_config=None,
                lifespan="off",
                timeout_graceful_shutdown=1,
                timeout_keep_alive=30,  # as our servers
            )
            ends.append(run_app(uvicorn.Server(config), listening))
        return made

    yield make
    for end in ends:
        end()


@pytest.fixture
def route() -> Iterator[Route]:
    """Starts routers; options of the server by name."""
    ends = []

    def make(urls: list[str], max_held_bytes: int = 512 << 20, **options: Any) -> Routed:
        fleet = fleet_of(",".join(urls))
        chosen = ServerOptions(**{"model_name": "", "shutdown_timeout_s": 2, **options})
        app, metrics = create_app(fleet, chosen, max_held_bytes=max_held_bytes)
        listening = run.bind("127.0.0.1", 0)
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        ends.append(run_app(run.Server(app, chosen, metrics.registry), listening))
        return Routed(url, fleet.replicas)

    yield make
    for end in ends:
        end()
