"""A server with the desk, on a real socket."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import uvicorn
from fastapi import FastAPI

from kvshare_mm import KVShare
from kvshare_mm.apps.desk import mount as mounting
from kvshare_mm.apps.server.app import create_app
from kvshare_mm.apps.server.keys import add_key
from kvshare_mm.apps.server.options import ServerOptions
from kvshare_mm.apps.server.service import Service

from ...helpers import until

MARK = {"_type": "gradio.FileData"}
PNG = b"\x89PNG\r\n\x1a\n"


def application(api: bool = True, **options: Any) -> tuple[FastAPI, Callable[[], None]]:
    """A server that shows the desk, and what lets it end; to open the page no model is needed."""

    def never() -> KVShare:
        raise RuntimeError("there is no model here")

    service = Service(never, ServerOptions("tiny", **options))
    app = create_app(service, ui_path="/ui", api=api)
    return app, mounting.mount(app, service, "/ui")


def talk(app: FastAPI, use: Callable[[httpx2.AsyncClient], Any], scheme: str = "http") -> Any:
    """What `use` makes of a client of the application, without a socket."""

    async def run() -> Any:
        transport = httpx2.ASGITransport(app=app)
        async with httpx2.AsyncClient(
            transport=transport, base_url=f"{scheme}://desk", follow_redirects=True
        ) as client:
            return await use(client)

    return asyncio.run(run())


class Site:
    """A server with the desk, in a thread."""

    def __init__(self, keys: Path | None = None) -> None:
        self.app, self.let_go = application(keys_file=keys)
        config = uvicorn.Config(self.app, host="127.0.0.1", port=0, log_config=None)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        until(lambda: self.server.started)
        port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.clients: list[httpx2.Client] = []

    def visitor(self, tenant: str = "", key: str = "") -> httpx2.Client:
        """A client that has loaded the page, after logging in if it has a key."""
        client = self.stranger()
        if key:
            client.post("/ui/login", data={"username": tenant, "password": key})
        assert client.get("/ui/").status_code == 200
        return client

    def stranger(self) -> httpx2.Client:
        client = httpx2.Client(base_url=self.url, timeout=30)
        self.clients.append(client)
        return client

    def stop(self) -> None:
        if not self.thread.is_alive():
            return
        for client in self.clients:
            client.close()
        loop = self.server.servers[0].get_loop()
        loop.call_soon_threadsafe(self.let_go)
        self.server.should_exit = True
        self.thread.join(60)
        assert not self.thread.is_alive()


@pytest.fixture
def site() -> Iterator[Callable[..., Site]]:
    started: list[Site] = []

    def make(*arguments: Any, **options: Any) -> Site:
        started.append(Site(*arguments, **options))
        return started[-1]

    yield make
    for each in started:
        each.stop()


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, str, str]:
    """A file with the keys of two tenants, and these."""
    file = tmp_path / "keys.jsonl"
    return file, add_key(file, "shop-a"), add_key(file, "shop-b")


def ask(client: httpx2.Client, photo: Any, page: str = "page") -> tuple[int, str]:
    """Ask about a photo; what the page is sent, all of it."""
    config = client.get("/ui/config").json()
    number = next(d["id"] for d in config["dependencies"] if len(d["inputs"]) == 7)
    event = {
        "data": [None, "KVShare", "Anna", "1", "Is it damaged?", photo, None],
        "fn_index": number,
        "session_hash": page,
    }
    joined = client.post("/ui/gradio_api/queue/join", json=event)
    if joined.status_code != 200:
        return joined.status_code, joined.text
    told = ""
    data = {"session_hash": page}
    with client.stream("GET", "/ui/gradio_api/queue/data", params=data) as stream:
        for line in stream.iter_lines():
            told += line
            if "process_completed" in line:
                break
    return 200, told


def upload(client: httpx2.Client, content: bytes, kind: str = "image/png") -> httpx2.Response:
    return client.post("/ui/gradio_api/upload", files={"files": ("photo.png", content, kind)})
