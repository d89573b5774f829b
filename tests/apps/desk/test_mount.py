"""The desk as a page of the server, and alone."""

from __future__ import annotations

import asyncio

import httpx2

from .conftest import application, talk


def test_an_open_page_lets_the_server_end() -> None:
    app, let_go = application()

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

    talk(application()[0], use)


def test_alone_there_is_nothing_but_the_desk() -> None:
    async def use(client: httpx2.AsyncClient) -> None:
        assert "KVShare desk" in (await client.get("/")).text
        for path in ("/v1/models", "/metrics", "/health", "/openapi.json", "/docs"):
            assert (await client.get(path)).status_code == 404

    talk(application(api=False)[0], use)
