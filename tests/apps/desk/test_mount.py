"""The desk as a page of the server, and alone."""

from __future__ import annotations

import httpx2

from .conftest import application, talk


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
