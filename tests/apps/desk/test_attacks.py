"""What was tried against the desk, over a real socket: files, URLs, sessions, logins, memory."""

from __future__ import annotations

import asyncio
import http.server
import json
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio
import httpx2
import pytest
import uvicorn

from kvshare_mm import KVShare
from kvshare_mm.apps.desk import mount as mounting
from kvshare_mm.apps.desk.door import Door
from kvshare_mm.apps.server.app import create_app
from kvshare_mm.apps.server.keys import Caller, add_key
from kvshare_mm.apps.server.options import ServerOptions
from kvshare_mm.apps.server.service import Service
from kvshare_mm.apps.server.sharing import scope

SECRET = "what only this machine may know"
MARK = {"_type": "gradio.FileData"}
PNG = b"\x89PNG\r\n\x1a\n"


class Site:
    """A server with the desk, in a thread."""

    def __init__(self, keys: Path | None = None, limits: Any = None) -> None:
        def never() -> KVShare:
            raise RuntimeError("there is no model here")

        service = Service(never, ServerOptions("tiny", keys_file=keys))
        self.app = create_app(service, ui_path="/ui")
        more = {} if limits is None else {"limits": limits}
        self.let_go = mounting.mount(self.app, service, "/ui", **more)
        config = uvicorn.Config(self.app, host="127.0.0.1", port=0, log_config=None)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        deadline = time.monotonic() + 60
        while not self.server.started:
            assert time.monotonic() < deadline
            time.sleep(0.01)
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


# -- files and addresses ------------------------------------------------------------------------


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


# -- who may come in ----------------------------------------------------------------------------


def test_nothing_is_answered_before_a_login(
    site: Callable[..., Site], keys: tuple[Path, str, str]
) -> None:
    client = site(keys[0]).stranger()
    assert client.get("/ui/").headers["location"] == "login"
    for path in ("config", "theme.css", "gradio_api/info", "gradio_api/app_id", "assets/index.js",
                 "gradio_api/startup-events", "gradio_api/heartbeat/x", "gradio_api/file=x",
                 "gradio_api/queue/data?session_hash=x", "static/img/logo.svg"):  # fmt: skip
        assert client.get(f"/ui/{path}").status_code == 401, path
    assert upload(client, PNG).status_code == 401
    event = {"data": [], "fn_index": 0, "session_hash": "x"}
    assert client.post("/ui/gradio_api/queue/join", json=event).status_code == 401


def test_a_session_ends_with_its_key(
    site: Callable[..., Site], keys: tuple[Path, str, str]
) -> None:
    file, key, _ = keys
    client = site(file).visitor("shop-a", key)
    token = upload(client, PNG).json()[0]
    assert ask(client, {"path": token, "meta": MARK})[0] == 200
    with client.stream("GET", "/ui/gradio_api/heartbeat/page") as beating:
        beats = beating.iter_bytes()
        assert b"ALIVE" in next(beats)
        lines = [line for line in file.read_text().splitlines() if "shop-a" not in line]
        file.write_text("\n".join(lines) + "\n")
        ended = threading.Event()

        def rest() -> None:
            for _ in beats:
                pass
            ended.set()

        threading.Thread(target=rest, daemon=True).start()
        assert ended.wait(10), "the stream goes on without its key"
    assert client.get("/ui/config").status_code == 401
    assert upload(client, PNG).status_code == 401
    assert client.get(f"/ui/gradio_api/file={token}").status_code == 401
    event = {"data": [None], "fn_index": 0, "session_hash": "page"}
    assert client.post("/ui/gradio_api/queue/join", json=event).status_code == 401


def test_logging_in_is_slowed(site: Callable[..., Site], keys: tuple[Path, str, str]) -> None:
    file, key, other = keys
    client = site(file).stranger()
    replies = [
        client.post("/ui/login", data={"username": tenant, "password": tried})
        for tenant, tried in [("shop-a", "x"), ("shop-x", "x"), ("shop-a", other), ("shop-x", key)]
    ]
    # Nothing tells a tenant that exists from one that does not, nor a key that does.
    assert {(r.status_code, r.text) for r in replies} == {(401, replies[0].text)}
    for number in range(100):
        form = {"username": "shop-a", "password": f"guess {number}"}
        replies.append(client.post("/ui/login", data=form))
    slowed = [r for r in replies if r.status_code == 429]
    assert len(slowed) >= 90
    assert all(int(r.headers["retry-after"]) >= 1 for r in slowed)
    assert not any("set-cookie" in r.headers for r in replies)


def test_the_one_key_of_a_server_needs_no_tenant() -> None:
    service = Service(KVShare, ServerOptions("tiny", api_key="the-one-key"))
    app = create_app(service, ui_path="/ui")
    mounting.mount(app, service, "/ui")

    async def use() -> list[int]:
        transport = httpx2.ASGITransport(app=app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://desk") as client:
            statuses = []
            for key in ("", "another", "the-one-key"):
                await client.post("/ui/login", data={"username": "", "password": key})
                statuses.append((await client.get("/ui/config")).status_code)
            return statuses

    assert asyncio.run(use()) == [401, 401, 200]


def test_cookies_are_for_the_desk_alone_and_end_at_logout(
    site: Callable[..., Site], keys: tuple[Path, str, str]
) -> None:
    file, key, _ = keys
    running = site(file)
    client = running.stranger()
    form = {"username": "shop-a", "password": key}
    cookie = client.post("/ui/login", data=form).headers["set-cookie"].lower()
    for flag in ("httponly", "samesite=lax", "path=/ui"):
        assert flag in cookie
    assert client.get("/ui/config").status_code == 200
    copied = running.stranger()
    copied.cookies.update(client.cookies)
    assert copied.get("/ui/config").status_code == 200
    assert client.post("/ui/logout").status_code == 303
    assert copied.get("/ui/config").status_code == 401


def test_under_tls_the_cookie_is_only_for_tls() -> None:
    service = Service(KVShare, ServerOptions("tiny"))
    app = create_app(service, ui_path="/ui")
    mounting.mount(app, service, "/ui")

    async def use() -> str:
        transport = httpx2.ASGITransport(app=app)
        async with httpx2.AsyncClient(transport=transport, base_url="https://desk") as client:
            return str((await client.get("/ui/")).headers["set-cookie"])

    assert "Secure" in asyncio.run(use())


@pytest.mark.parametrize(
    "headers", [{"Origin": "http://evil.example"}, {"Origin": "null"},
                {"Sec-Fetch-Site": "cross-site"}]
)  # fmt: skip
def test_another_sites_page_cannot_act(
    site: Callable[..., Site], keys: tuple[Path, str, str], headers: dict[str, str]
) -> None:
    file, key, _ = keys
    client = site(file).visitor("shop-a", key)
    event = {"data": [], "fn_index": 0, "session_hash": "x"}
    join = client.post("/ui/gradio_api/queue/join", json=event, headers=headers)
    assert join.status_code == 403
    form = {"username": "shop-a", "password": key}
    assert client.post("/ui/login", data=form, headers=headers).status_code == 403
    assert client.post("/ui/logout", headers=headers).status_code == 403
    got = client.get("/ui/config", headers=headers)
    assert "access-control-allow-origin" not in got.headers


def test_the_address_of_the_page_is_what_the_browser_said(site: Callable[..., Site]) -> None:
    client = site().visitor()
    forged = {"X-Forwarded-Host": "evil.example", "X-Forwarded-Proto": "https"}
    assert "evil.example" not in client.get("/ui/", headers=forged).text


def test_visitors_do_not_reach_each_other(
    site: Callable[..., Site], keys: tuple[Path, str, str]
) -> None:
    file, a, b = keys
    running = site(file)
    first, second = running.visitor("shop-a", a), running.visitor("shop-b", b)
    token = upload(first, PNG).json()[0]
    assert upload(second, PNG).json()[0] != token
    assert first.get(f"/ui/gradio_api/file={token}").content == PNG
    assert second.get(f"/ui/gradio_api/file={token}").status_code == 404
    assert ask(first, {"path": token, "meta": MARK}, "mine")[0] == 200
    assert ask(second, {"path": token, "meta": MARK}, "yours")[0] == 400
    assert second.get("/ui/gradio_api/queue/data?session_hash=mine").status_code == 404
    # A page of the same name is another page: what Gradio keeps of the first is not its.
    assert ask(second, None, "mine")[0] == 200
    [door] = [r.app for r in running.app.routes if isinstance(getattr(r, "app", None), Door)]
    of_first, of_second = (set(v.pages) for v in door._visitors._visitors.values())
    assert of_first and of_second and not of_first & of_second
    assert not {"mine", "yours"} & (of_first | of_second)


def test_no_request_reaches_the_namespaces_of_the_desk() -> None:
    salts = {"x", "desk", json.dumps(["desk", "0"]), '["desk", "0"]', 'desk", "0'}
    for mode in ("tenant", "salt", "global"):
        for tenant in ("", "desk"):
            for salt in salts:
                made = scope(mode, Caller(tenant), salt).cache_salt  # type: ignore[arg-type]
                assert made is not None and json.loads(made)[0] != "desk"


# -- how much -----------------------------------------------------------------------------------


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
    counted = client.get("/metrics").text
    assert 'kvshare:http_requests_total{route="/ui/config",status="200"} 1.0' in counted


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


def test_gradio_never_handles_a_file() -> None:
    from kvshare_mm.apps.desk import parts

    assert not Path(parts.__file__).with_suffix(".pyi").exists()
    for part, kind in ((parts.Photo, gradio.Image), (parts.Voice, gradio.Audio)):
        made = part(type="filepath", render=False)
        assert isinstance(made, kind) and made.get_block_name() == kind.__name__.lower()
        assert made.preprocess("token") == made.postprocess("token") == "token"
        # An update makes a component anew, of its class.
        assert type(made)(**made.constructor_args).data_model is None
