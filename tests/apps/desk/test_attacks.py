"""What was tried against the desk, over a real socket: files, addresses, events, pages."""

from __future__ import annotations

import asyncio
import http.server
import os
import re
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio
import pytest

from kvshare_mm.apps.desk import mount as mounting

from .conftest import MARK, PNG, Site, ask, upload

SECRET = "what only this machine may know"


def test_no_file_of_the_machine_is_read(site: Callable[..., Site], tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text(SECRET)
    secret.chmod(0o600)
    link = tmp_path / "link.png"
    link.symlink_to(secret)
    copies = Path(tempfile.gettempdir()) / "gradio"
    before = set(copies.rglob("*"))
    client = site().visitor()
    mine = upload(client, PNG).json()[0]
    marks: list[Any] = [MARK, {}, None]
    for number, (path, mark) in enumerate(
        (path, mark)
        for path in (secret, link, "/etc/passwd", "/proc/self/environ", f"{mine}/../{secret}")
        for mark in marks
    ):
        photo = {"path": str(path), "url": str(path), "meta": mark}
        status, told = ask(client, photo, f"page{number}")
        assert status == 400, told
        assert SECRET not in told and tempfile.gettempdir() not in told
        assert SECRET not in client.get(f"/ui/gradio_api/file={path}").text
    assert {file for file in copies.rglob("*") if file.is_file()} <= before


def test_a_page_that_is_mounted_checks_paths_as_one_that_is_launched(tmp_path: Path) -> None:
    """Gradio alone, without what stands before it."""
    secret = tmp_path / "secret.txt"
    secret.write_text(SECRET)
    with gradio.Blocks() as page:
        box, text = gradio.File(), gradio.Textbox()
        box.change(lambda path: Path(path).read_text(), box, text)
    mounting.as_launched(page)
    (number,) = page.fns
    body = [{"path": str(secret), "meta": MARK}]

    async def process() -> Any:
        from gradio.context import LocalContext

        LocalContext.blocks.set(page)
        return await page.process_api(number, body, state=None)

    with pytest.raises(gradio.exceptions.InvalidPathError, match="not uploaded by a user"):
        asyncio.run(process())


def test_the_desk_counts_as_launched(site: Callable[..., Site]) -> None:
    app: Any = next(r.app for r in site().app.routes if getattr(r, "path", "") == "/ui")
    inner = getattr(app, "_app", app)
    assert inner.get_blocks().has_launched and inner.get_blocks().is_running


def test_no_address_is_fetched(site: Callable[..., Site]) -> None:
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(PNG)

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/photo.png"
    client = site().visitor()
    for page, photo in (
        ("a", {"path": address, "meta": MARK}),
        ("b", {"path": address, "url": address, "meta": MARK}),
        ("c", {"path": "photo.png", "url": address, "meta": MARK}),
        ("d", address),
    ):
        ask(client, photo, page)
    for way in ("file=", "file/", "proxy="):
        assert client.get(f"/ui/gradio_api/{way}{address}").status_code == 404
    server.shutdown()
    server.server_close()
    assert asked == []


def test_nothing_names_a_path_of_the_server(site: Callable[..., Site]) -> None:
    client = site().visitor()
    sent = upload(client, PNG)
    _, told = ask(client, {"path": sent.json()[0], "meta": MARK})
    texts = [sent.text, told, ask(client, {"path": "nowhere", "meta": MARK})[1]]
    for path in ("", "config", "theme.css", "manifest.json", "gradio_api/info", "nowhere",
                 "gradio_api/app_id", "gradio_api/startup-events", "gradio_api/file=nowhere",
                 "assets/nowhere.js", "assets/..%2f..%2f..%2froutes.py", "static/%2e%2e/x",
                 "config?deep_link=../x", "?page=nowhere"):  # fmt: skip
        texts.append(client.get(f"/ui/{path}").text)
    package = str(Path(gradio.__file__).parent)
    for text in texts:
        for path in (tempfile.gettempdir(), os.getcwd(), str(Path.home()), package, "Traceback"):
            assert path not in text, text[:300]


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{}", b"[]", b"null", b'{"data": {}}', b"\xff", b"[" * 60_000, b"1" * 60_000,
        b'{"data": [], "fn_index": 1e9, "session_hash": "page"}',
        b'{"data": [], "fn_index": 999, "session_hash": "page"}',
        b'{"data": [], "fn_index": -1, "session_hash": "page"}',
        b'{"data": [1, 2], "fn_index": 0, "session_hash": "page"}',
        b'{"data": [NaN], "fn_index": 0, "session_hash": "page"}',
        b'{"data": ["\\ud800"], "fn_index": 0, "session_hash": "page"}',
        b'{"data": [{"path": ["x"]}], "fn_index": 0, "session_hash": "page"}',
        b'{"data": [{"__type__": "update"}], "fn_index": 0, "session_hash": "page"}',
        b'{"data": [], "fn_index": 0, "session_hash": "../../x"}',
        b'{"data": [], "fn_index": 0, "session_hash": null}',
    ],
)  # fmt: skip
def test_what_no_page_sends_is_refused(site: Callable[..., Site], body: bytes) -> None:
    client = site().visitor()
    reply = client.post("/ui/gradio_api/queue/join", content=body)
    assert reply.status_code == 400, reply.text
    assert tempfile.gettempdir() not in reply.text


def test_values_of_other_kinds_are_answered(site: Callable[..., Site]) -> None:
    client = site().visitor()
    for number, photo in enumerate((True, 7, 1.5, "x", "/etc/passwd", "http://127.0.0.1/")):
        status, told = ask(client, photo, f"page{number}")
        assert status == 200 and "desk-problem" in told


def test_the_page_runs_nothing_from_elsewhere(site: Callable[..., Site]) -> None:
    running = site()
    page = running.visitor().get("/ui/").text.replace(running.url, "")
    scripts = re.findall(r"""<(?:script|link)[^>]*?\s(?:src|href)=["']([^"']+)""", page)
    assert scripts and not [s for s in scripts if re.match(r"(?:https?:)?//", s)]


def test_only_what_the_page_needs_is_answered(site: Callable[..., Site]) -> None:
    running = site()
    client = running.visitor()
    app: Any = next(r.app for r in running.app.routes if getattr(r, "path", "") == "/ui")
    routes = [r for r in getattr(app, "_app", app).routes if hasattr(r, "methods")]
    assert len(routes) > 60
    answered = set()
    for route in routes:
        path = route.path.replace("{path:path}", "x").replace("{path_or_url:path}", "x")
        path = path.replace("{url_path:path}", "x").replace("{component_id}", "1")
        for method in route.methods - {"HEAD"}:
            with client.stream(method, f"/ui{path}") as reply:
                if reply.status_code != 404:
                    answered.add(f"{method} {route.path}")
    assert answered <= {
        "GET /", "GET /config", "GET /login", "POST /login", "GET /theme.css",
        "GET /manifest.json", "GET /gradio_api/theme.css", "GET /gradio_api/app_id",
        "GET /gradio_api/info", "GET /gradio_api/startup-events", "POST /gradio_api/queue/join",
        "POST /gradio_api/upload", "GET /gradio_api/upload_progress",
    }  # fmt: skip


def test_a_file_is_never_a_page(site: Callable[..., Site]) -> None:
    client = site().visitor()
    script = b"<script>alert(1)</script>"
    for kind in ("text/html", "image/svg+xml", "image/png; x=\N{SNOWMAN}"):
        token = upload(client, script, kind).json()[0]
        reply = client.get(f"/ui/gradio_api/file={token}")
        assert reply.headers["content-security-policy"].startswith("sandbox")
        assert reply.headers["x-content-type-options"] == "nosniff"
        if "png" not in kind:
            assert reply.headers["content-type"] == "application/octet-stream"
            assert reply.headers["content-disposition"] == "attachment"


def test_gradio_never_handles_a_file() -> None:
    from kvshare_mm.apps.desk import parts

    assert not Path(parts.__file__).with_suffix(".pyi").exists()
    for part, kind in ((parts.Photo, gradio.Image), (parts.Voice, gradio.Audio)):
        made = part(type="filepath", render=False)
        assert isinstance(made, kind) and made.get_block_name() == kind.__name__.lower()
        assert made.preprocess("token") == made.postprocess("token") == "token"
        # An update makes a component anew, of its class.
        assert type(made)(**made.constructor_args).data_model is None
