"""How much visitors of the desk may take."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ...helpers import until
from .conftest import Site, upload


def chunks(app: Any, path: str, count: int, cookie: str = "") -> tuple[int, int]:
    """Send megabytes without saying how many: the status, and how many were taken."""

    start = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n'

    async def run() -> tuple[int, int]:
        taken, status = 0, 0

        async def receive() -> dict[str, Any]:
            nonlocal taken
            taken += 1
            body = (start if taken == 1 else b"") + bytes(1 << 20)
            return {"type": "http.request", "body": body, "more_body": taken < count}

        async def send(message: Any) -> None:
            nonlocal status
            status = message.get("status", status)

        kind = b"multipart/form-data; boundary=x"
        headers = [(b"host", b"desk"), (b"content-type", kind), (b"cookie", cookie.encode())]
        scope = {
            "type": "http", "method": "POST", "path": path, "raw_path": path.encode(),
            "root_path": "", "query_string": b"", "headers": headers, "scheme": "http",
            "http_version": "1.1", "client": ("127.0.0.1", 1), "server": ("desk", 80),
        }  # fmt: skip
        await app(scope, receive, send)
        return status, taken

    return asyncio.run(run())


@pytest.mark.parametrize(
    "path", ["upload", "queue/join", "component_server", "run/predict", "process_recording"]
)
def test_nobodys_body_is_not_read(
    keys: tuple[Path, str, str], path: str, site: Callable[..., Site]
) -> None:
    status, taken = chunks(site(keys[0]).app, f"/ui/gradio_api/{path}", 100)
    assert status in {401, 404} and taken <= 1


def test_bodies_are_bounded(site: Callable[..., Site]) -> None:
    running = site()
    client = running.visitor()
    cookie = "; ".join(f"{name}={value}" for name, value in client.cookies.items())
    for path, most in (("gradio_api/upload", 32), ("gradio_api/queue/join", 1), ("login", 1)):
        status, taken = chunks(running.app, f"/ui/{path}", 100, cookie)
        assert status == 413 and taken <= most + 1
    assert upload(client, bytes(21 << 20)).status_code == 413


def test_what_a_session_uploads_is_bounded(site: Callable[..., Site]) -> None:
    client = site().visitor()
    tokens = [upload(client, bytes([n]) + bytes(19 << 20)).json()[0] for n in range(4)]
    kept = [client.get(f"/ui/gradio_api/file={token}").status_code for token in tokens]
    assert kept == [404, 200, 200, 200]


def test_streams_are_bounded_and_let_the_server_end(site: Callable[..., Site]) -> None:
    running = site()
    client = running.visitor()
    streams, statuses = [], []
    for _ in range(20):
        context = client.stream("GET", "/ui/gradio_api/heartbeat/page")
        reply = context.__enter__()
        statuses.append(reply.status_code)
        streams.append((context, reply))
    assert statuses == [200] * 16 + [429] * 4
    running.stop()  # while they are open
    for context, _ in streams:
        context.__exit__(None, None, None)


def test_requests_have_an_id_and_are_counted(site: Callable[..., Site]) -> None:
    client = site().visitor()
    reply = client.get("/ui/config", headers={"X-Request-Id": "mine"})
    assert reply.headers["x-request-id"] == "mine"
    counted = 'kvshare:http_requests_total{route="/ui/config",status="200"} 1.0'
    until(lambda: counted in client.get("/metrics").text)


def test_endless_paths_are_one_row_of_the_metrics(site: Callable[..., Site]) -> None:
    client = site().visitor()
    for number in range(20):
        client.get(f"/ui/{number}")
        client.get(f"/ui/gradio_api/file={number}")
    rows = [
        line
        for line in client.get("/metrics").text.splitlines()
        if line.startswith('kvshare:http_requests_total{route="/ui')
    ]
    assert len(rows) == 3
