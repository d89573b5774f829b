"""The desk as a page of the server: who may open it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
from fastapi import FastAPI

from kvshare_mm import KVShare
from kvshare_mm.apps.desk.mount import mount
from kvshare_mm.apps.server.app import create_app
from kvshare_mm.apps.server.keys import add_key
from kvshare_mm.apps.server.options import ServerOptions
from kvshare_mm.apps.server.service import Service


def application(keys: Path | None = None) -> FastAPI:
    def never() -> KVShare:
        raise AssertionError("no model is needed to open the page")

    service = Service(never, ServerOptions("tiny", keys_file=keys))
    app = create_app(service, ui_path="/ui")
    mount(app, service, "/ui")
    return app


def talk(app: FastAPI, use: Callable[[httpx2.AsyncClient], Any]) -> Any:
    async def run() -> Any:
        transport = httpx2.ASGITransport(app=app)
        async with httpx2.AsyncClient(
            transport=transport, base_url="http://desk", follow_redirects=True
        ) as client:
            return await use(client)

    return asyncio.run(run())


def test_an_open_page_lets_the_server_end() -> None:
    service = Service(KVShare, ServerOptions("tiny"))
    app = create_app(service, ui_path="/ui")
    let_go = mount(app, service, "/ui")

    async def use(client: httpx2.AsyncClient) -> None:
        await client.get("/ui")
        beating = asyncio.create_task(client.get("/ui/gradio_api/heartbeat/somebody"))
        done, _ = await asyncio.wait({beating}, timeout=0.5)
        assert not done  # it lasts as long as the page is open
        let_go()
        assert "ALIVE" in (await asyncio.wait_for(beating, 60)).text

    talk(app, use)


def test_without_keys_everybody_sees_it() -> None:
    async def use(client: httpx2.AsyncClient) -> None:
        page = await client.get("/ui")
        assert page.status_code == 200 and "KVShare desk" in page.text
        assert (await client.get("/ui/config")).status_code == 200
        assert (await client.get("/favicon.ico")).headers["content-type"] == "image/svg+xml"

    talk(application(), use)


def test_alone_there_is_nothing_but_the_desk() -> None:
    service = Service(KVShare, ServerOptions("tiny"))
    app = create_app(service, ui_path="/ui", api=False)
    mount(app, service, "/ui")

    async def use(client: httpx2.AsyncClient) -> None:
        assert "KVShare desk" in (await client.get("/")).text
        for path in ("/v1/models", "/metrics", "/health", "/openapi.json", "/docs"):
            assert (await client.get(path)).status_code == 404

    talk(app, use)


def test_with_keys_it_asks_for_one(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    key = add_key(file, "shop-a")
    add_key(file, "shop-b")

    async def use(client: httpx2.AsyncClient) -> None:
        assert (await client.get("/ui/config")).status_code == 401
        for tenant, tried in (("shop-a", "wrong"), ("shop-b", key), ("shop-x", key)):
            form = {"username": tenant, "password": tried}
            assert (await client.post("/ui/login", data=form)).status_code == 401
        assert (await client.get("/ui/config")).status_code == 401
        form = {"username": "shop-a", "password": key}
        assert (await client.post("/ui/login", data=form)).status_code == 200
        assert (await client.get("/ui/config")).status_code == 200
        # The page's login opens the page alone.
        assert (await client.get("/v1/models")).status_code == 401

    talk(application(file), use)
