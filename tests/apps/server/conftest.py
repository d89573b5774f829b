"""A real server on a real socket, with the tiny model behind it."""

from __future__ import annotations

import base64
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import uvicorn

from kvshare_mm import KVShare
from kvshare_mm.apps.server import run
from kvshare_mm.apps.server.app import create_app
from kvshare_mm.apps.server.options import ServerOptions
from kvshare_mm.apps.server.service import Service

from ...helpers import until

ADMIN = "the-admin"


@dataclass
class Running:
    """A server and ways to ask it."""

    url: str
    service: Service
    server: uvicorn.Server
    thread: threading.Thread
    clients: list[Any] = field(default_factory=list)

    @property
    def llm(self) -> KVShare:
        return self.service.llm

    def client(self, key: str = "none") -> openai.OpenAI:
        made = openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)
        self.clients.append(made)
        return made

    def ask(
        self, method: str, path: str, key: str | None = None, **options: Any
    ) -> httpx2.Response:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        headers |= options.pop("headers", {})
        return httpx2.request(method, self.url + path, headers=headers, timeout=60, **options)

    def chat(self, text: str, key: str | None = None, **fields: Any) -> httpx2.Response:
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": 4, "temperature": 0}
        return self.ask("POST", "/v1/chat/completions", key, json={**body, **fields})

    def stream(
        self, key: str | None = None, **fields: Any
    ) -> AbstractContextManager[httpx2.Response]:
        """A chat whose answer is read piece by piece, or not at all."""
        body = {"messages": [{"role": "user", "content": "The quick brown fox"}], **fields}
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        url = f"{self.url}/v1/chat/completions"
        return httpx2.stream(
            "POST", url, json={**body, "stream": True}, headers=headers, timeout=60
        )

    @property
    def idle(self) -> bool:
        return bool(self.llm.stats()["queue"] == {"waiting": 0, "running": 0})

    def metric(self, line: str) -> float:
        """The value of a line of /metrics that begins so; 0 if there is none."""
        for found in self.ask("GET", "/metrics").text.splitlines():
            if found.startswith(line):
                return float(found.rsplit(" ", 1)[1])
        return 0.0

    def wait_ready(self) -> None:
        until(lambda: self.ask("GET", "/health").status_code == 200, 120)

    def stop(self) -> None:
        for client in self.clients:
            client.close()
        self.server.should_exit = True
        self.thread.join(60)
        assert not self.thread.is_alive()


def image_part(content: bytes) -> dict[str, Any]:
    """A picture, as it is sent in a message."""
    url = "data:image/png;base64," + base64.b64encode(content).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def sound_part(content: bytes) -> dict[str, Any]:
    sound = {"data": base64.b64encode(content).decode(), "format": "wav"}
    return {"type": "input_audio", "input_audio": sound}


Start = Callable[..., Running]


def start(load: Callable[[], KVShare], **options: Any) -> Running:
    """A server in a thread, on a free port."""
    defaults: dict[str, Any] = {"model_name": "tiny", "admin_key": ADMIN, "shutdown_timeout_s": 5}
    service = Service(load, ServerOptions(**{**defaults, **options}))
    listening = run.bind("127.0.0.1", 0)
    server = run.Server(create_app(service), service.options, service.metrics.registry)
    port = listening.getsockname()[1]
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    until(lambda: server.started or not thread.is_alive())
    return Running(f"http://127.0.0.1:{port}", service, server, thread)


@contextmanager
def serving(load: Callable[[], KVShare], **options: Any) -> Iterator[Running]:
    """A server that is ready, as long as the block."""
    running = start(load, **options)
    try:
        running.wait_ready()
        yield running
    finally:
        running.stop()


@pytest.fixture
def serve(tiny_folder: Path) -> Iterator[Start]:
    """Starts servers; engine options go in `engine`."""
    started: list[Running] = []

    def make(engine: dict[str, Any] | None = None, **options: Any) -> Running:
        running = start(
            lambda: KVShare(**{"model": str(tiny_folder), "embedder": None, **(engine or {})}),
            **options,
        )
        started.append(running)
        running.wait_ready()
        return running

    yield make
    for running in started:
        running.stop()


@contextmanager
def held(running: Running) -> Iterator[None]:
    """A server whose engine decodes nothing before the block is over."""
    runner = running.llm._parts.runner
    go, decode = threading.Event(), runner.decode

    def waiting(*arguments: Any) -> Any:
        assert go.wait(60)
        return decode(*arguments)

    runner.decode = waiting  # type: ignore[method-assign]
    try:
        yield
    finally:
        go.set()


@pytest.fixture
def beside() -> Iterator[Executor]:
    """Makes calls that are not waited for."""
    with ThreadPoolExecutor() as pool:
        yield pool


@pytest.fixture(scope="module")
def shared(tiny_folder: Path) -> Iterator[Running]:
    """One server for the tests of a module that leave nothing behind that others would notice."""
    with serving(lambda: KVShare(str(tiny_folder), embedder=None)) as running:
        yield running
