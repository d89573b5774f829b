"""What stands before Gradio: a list of what the desk's page needs, and nothing else gets through.

Gradio has some ninety routes: that read files by path, fetch URLs, run any function, stream what
others asked for. The page needs a dozen. Files never reach Gradio: uploads are kept here, and an
event names them by the token that its own session was given.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

from pydantic import ValidationError
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvshare_mm.apps.desk.attempts import Attempts
from kvshare_mm.apps.desk.bodies import PAGE, Event, File, chunks, once, read
from kvshare_mm.apps.desk.limits import DeskLimits
from kvshare_mm.apps.desk.login import login_page
from kvshare_mm.apps.desk.uploads import Uploads
from kvshare_mm.apps.desk.visitors import Visitor, Visitors
from kvshare_mm.apps.server.errors import ApiError
from kvshare_mm.apps.server.keys import KeyRing

API = "/gradio_api"
FILE = f"{API}/file="

_MAX_FORM = 4 << 10
_MAX_EVENT = 64 << 10
_FORM_OVERHEAD = 64 << 10
_ASSETS = "/assets"
_ASSET = re.compile(r"/(?:assets|static)(?:/[A-Za-z0-9_@-][A-Za-z0-9._@-]*)+")
# Gradio's own: they tell nothing of any session.
_PLAIN = frozenset(
    {"/config", "/theme.css", f"{API}/theme.css", "/manifest.json", f"{API}/app_id",
     f"{API}/info", f"{API}/startup-events"}
)  # fmt: skip
# Nothing of a client reaches Gradio that it does not need: no cookie, no key, no name of a proxy.
_HEADERS = frozenset(
    {b"host", b"accept", b"accept-encoding", b"accept-language", b"content-type", b"user-agent",
     b"if-none-match", b"if-modified-since"}
)  # fmt: skip
_SHOWN = re.compile(r"(?:image/(?:png|jpeg|webp|gif|bmp)|audio/[a-z0-9.+-]{1,40})")
_SAFE = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"same-origin"),
)
_HIDDEN = {"Content-Security-Policy": "sandbox; default-src 'none'", "Cache-Control": "private"}


class Door:
    """ASGI application before Gradio's.

    Args:
        app: Gradio's.
        path: where it is mounted.
        clicks: how many values each of the page's functions takes, by its number.
        keys: who may log in.
        visitors: sessions.
        uploads: their files.
        limits: of the desk.
    """

    def __init__(
        self,
        app: ASGIApp,
        path: str,
        clicks: Mapping[int, int],
        keys: KeyRing,
        visitors: Visitors,
        uploads: Uploads,
        limits: DeskLimits,
    ) -> None:
        self._app = app
        self._path = path
        self._clicks = clicks
        self._keys = keys
        self._visitors = visitors
        self._uploads = uploads
        self._limits = limits
        self._attempts = Attempts(limits)
        # A cookie is sent to all ports of a host: another server's must not take this one's place.
        self._cookie = f"kvshare-desk-{secrets.token_hex(4)}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await send({"type": "websocket.close"})
            return
        path = scope["path"].removeprefix(self._path) or "/"
        request = Request(scope, receive)
        route, answer = self._route(scope["method"], path)
        scope.setdefault("state", {})["route"] = f"{self._path}{route}"

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                given = {name.lower() for name, _ in message.setdefault("headers", [])}
                fixed = _SAFE if route == _ASSETS else (*_SAFE, (b"cache-control", b"no-store"))
                message["headers"] += [(n, v) for n, v in fixed if n not in given]
            await send(message)

        self._check_origin(request)
        await answer(request, path, sending)

    def _route(self, method: str, path: str) -> tuple[str, Callable[..., Awaitable[None]]]:
        """A name for the metrics, and what answers."""
        reads = method in {"GET", "HEAD"}
        match method, path:
            case "GET", "/login":
                return path, self._login_page
            case "POST", "/login":
                return path, self._login
            case "POST", "/logout":
                return path, self._logout
            case (("GET" | "HEAD"), "/"):
                return path, self._page
            case "POST", "/gradio_api/queue/join":
                return path, self._join
            case "GET", "/gradio_api/queue/data":
                return path, self._events
            case "POST", "/gradio_api/upload":
                return path, self._upload
            case "GET", "/gradio_api/upload_progress":
                return path, self._progress
        if reads and path in _PLAIN:
            return path, self._plain
        if reads and _ASSET.fullmatch(path):
            return _ASSETS, self._plain
        if method == "GET" and path.startswith(f"{API}/heartbeat/"):
            return f"{API}/heartbeat", self._heartbeat
        if reads and path.startswith(FILE):
            return FILE, self._file
        return "/other", self._nothing

    # -- sessions ---------------------------------------------------------------------------

    def _check_origin(self, request: Request) -> None:
        """Another site's page must not act with a visitor's cookie."""
        if request.method in {"GET", "HEAD"}:
            return
        origin, site = request.headers.get("origin"), request.headers.get("sec-fetch-site")
        foreign = origin is not None and urlsplit(origin).netloc != request.headers.get("host")
        if foreign or site not in {None, "same-origin", "none"}:
            raise ApiError(403, "only the desk's own page may send this")

    def _visitor(self, request: Request) -> Visitor:
        """Whose request this is. Raises ApiError 401: nobody's."""
        visitor = self._visitors.of_cookie(request.cookies.get(self._cookie))
        if visitor is None:
            raise ApiError(401, "your session at the desk has ended: load the page again")
        request.scope["state"]["caller"] = visitor.caller
        return visitor

    def _set_cookie(self, response: Response, request: Request, cookie: str) -> None:
        response.set_cookie(
            self._cookie,
            cookie,
            path=self._path,
            httponly=True,
            samesite="lax",
            secure=request.url.scheme == "https",
        )

    async def _login_page(self, request: Request, _: str, send: Send) -> None:
        if not self._keys.required:
            await RedirectResponse("./", 303)(request.scope, request.receive, send)
            return
        await login_page()(request.scope, request.receive, send)

    async def _login(self, request: Request, _: str, send: Send) -> None:
        address = request.client.host if request.client else ""
        wait = self._attempts.begin(address)
        if wait:
            response: Response = login_page(429, "Too many attempts; please wait.")
            response.headers["Retry-After"] = str(int(wait) + 1)
            await response(request.scope, request.receive, send)
            return
        form = parse_qs((await read(request, _MAX_FORM)).decode("utf-8", "replace"))
        tenant, key = (form.get(name, [""])[0].strip() for name in ("username", "password"))
        caller = self._keys.caller(key) if self._keys.required else None
        named = "" if caller is None else caller.tenant
        # The same answer, whatever was wrong.
        if caller is None or not hmac.compare_digest(named.encode(), (tenant or named).encode()):
            response = login_page(401, "Tenant and key do not belong together.")
            await response(request.scope, request.receive, send)
            return
        self._attempts.succeeded(address)
        before = request.cookies.get(self._cookie)
        if before is not None:
            self._visitors.leave(before)
        response = RedirectResponse("./", 303)
        self._set_cookie(response, request, self._visitors.enter(caller, key))
        request.scope["state"]["caller"] = caller
        await response(request.scope, request.receive, send)

    async def _logout(self, request: Request, _: str, send: Send) -> None:
        cookie = request.cookies.get(self._cookie)
        if cookie is not None:
            self._visitors.leave(cookie)
        response = RedirectResponse("login", 303)
        response.delete_cookie(self._cookie, path=self._path, httponly=True, samesite="lax")
        await response(request.scope, request.receive, send)

    # -- the page ---------------------------------------------------------------------------

    async def _page(self, request: Request, path: str, send: Send) -> None:
        visitor = self._visitors.of_cookie(request.cookies.get(self._cookie))
        if visitor is not None:
            request.scope["state"]["caller"] = visitor.caller
            await self._pass(request, send)
            return
        caller = self._keys.caller(None)
        if caller is None:
            await RedirectResponse("login", 303)(request.scope, request.receive, send)
            return
        blank = Response()
        self._set_cookie(blank, request, self._visitors.enter(caller, None))
        cookie = blank.headers["set-cookie"].encode("latin-1")

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"].append((b"set-cookie", cookie))
            await send(message)

        await self._pass(request, sending)

    async def _plain(self, request: Request, path: str, send: Send) -> None:
        self._visitor(request)
        await self._pass(request, send)

    async def _nothing(self, request: Request, path: str, send: Send) -> None:
        raise ApiError(404, "there is no such page of the desk")

    async def _join(self, request: Request, path: str, send: Send) -> None:
        visitor = self._visitor(request)
        try:
            event = Event.model_validate_json(await read(request, _MAX_EVENT))
        except ValidationError as error:
            place = ".".join(str(part) for part in error.errors()[0]["loc"][:1]) or "the body"
            raise ApiError(400, f"{place} is not what the desk's page sends") from error
        if self._clicks.get(event.fn_index) != len(event.data):
            raise ApiError(400, "fn_index and data are not what the desk's page sends")
        page = _own(visitor, event.session_hash)
        self._visitors.claim(visitor, page)
        data = list(self._tokens(visitor, event.data))
        body = {**event.model_dump(), "session_hash": page, "data": data}
        await self._pass(request, send, body=json.dumps(body).encode())

    def _tokens(self, visitor: Visitor, data: Iterable[Any]) -> Iterable[Any]:
        """An event's values, with the tokens of its files."""
        for value in data:
            if isinstance(value, File):
                if self._uploads.get(visitor.name, value.path) is None:
                    raise ApiError(400, "this file was not uploaded here, or too long ago")
                yield value.path
            else:
                yield value

    # -- event streams ----------------------------------------------------------------------

    async def _events(self, request: Request, path: str, send: Send) -> None:
        visitor = self._visitor(request)
        page = _own(visitor, request.query_params.get("session_hash", ""))
        if page not in visitor.pages:
            raise ApiError(404, "there is no such page")
        async with self._visitors.streaming(visitor):
            await self._pass(request, send, query={"session_hash": page})

    async def _heartbeat(self, request: Request, path: str, send: Send) -> None:
        visitor = self._visitor(request)
        page = path.rpartition("/")[2]
        if not PAGE.fullmatch(page):
            raise ApiError(404, "there is no such page")
        page = _own(visitor, page)
        self._visitors.claim(visitor, page)
        async with self._visitors.streaming(visitor):
            await self._pass(request, send, path=f"{API}/heartbeat/{page}")

    async def _progress(self, request: Request, path: str, send: Send) -> None:
        """An upload is answered once it is here: there is nothing to tell before."""
        self._visitor(request)
        done = Response('data: {"msg": "done"}\n\n', media_type="text/event-stream")
        await done(request.scope, request.receive, send)

    # -- files ------------------------------------------------------------------------------

    async def _upload(self, request: Request, path: str, send: Send) -> None:
        visitor = self._visitor(request)
        length = request.headers.get("content-length", "")
        if length.isdecimal() and int(length) > self._limits.upload_bytes + _FORM_OVERHEAD:
            raise self._too_large()
        limits = self._limits
        crowded = not self._visitors.has_room(visitor, lambda v: v.uploading, limits.uploading)
        if crowded or visitor.uploading >= limits.own_uploading:
            raise ApiError(429, "too many files are being uploaded", retry_after=5)
        visitor.uploading += 1
        try:
            tokens = await self._received(request, visitor)
        finally:
            visitor.uploading -= 1
        await JSONResponse(tokens)(request.scope, request.receive, send)

    async def _received(self, request: Request, visitor: Visitor) -> list[str]:
        most = self._limits.upload_bytes + _FORM_OVERHEAD

        kind, _, _ = request.headers.get("content-type", "").partition(";")
        if kind.strip().lower() != "multipart/form-data":
            raise ApiError(400, "files are uploaded as multipart/form-data")
        try:
            form = await MultiPartParser(
                request.headers, chunks(request, most), max_files=1, max_fields=4
            ).parse()
        except (MultiPartException, KeyError) as error:
            raise ApiError(400, "the upload is malformed, or has more than one file") from error
        try:
            files = [file for file in form.getlist("files") if not isinstance(file, str)]
            tokens = []
            for file in files:
                content = await file.read()
                try:
                    kind = (file.content_type or "").partition(";")[0].strip().lower()
                    tenant = visitor.caller.tenant
                    tokens.append(self._uploads.keep(visitor.name, content, kind, tenant))
                except ValueError as error:
                    raise self._too_large() from error
            return tokens
        finally:
            await form.close()

    async def _file(self, request: Request, path: str, send: Send) -> None:
        visitor = self._visitor(request)
        upload = self._uploads.get(visitor.name, path.removeprefix(FILE))
        if upload is None:
            raise ApiError(404, "there is no such file")
        headers = dict(_HIDDEN)
        shown = _SHOWN.fullmatch(upload.kind) is not None
        if not shown:
            headers["Content-Disposition"] = "attachment"
        kind = upload.kind if shown else "application/octet-stream"
        response = Response(upload.content, 200, headers, kind)
        await response(request.scope, request.receive, send)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the file has more than {self._limits.upload_bytes} bytes")

    # -- through the door -------------------------------------------------------------------

    async def _pass(
        self,
        request: Request,
        send: Send,
        query: dict[str, str] | None = None,
        body: bytes | None = None,
        path: str | None = None,
    ) -> None:
        """Let Gradio answer, knowing nothing that it need not know."""
        headers = [(name, value) for name, value in request.scope["headers"] if name in _HEADERS]
        receive = request.receive
        if body is not None:
            headers = [(name, value) for name, value in headers if name != b"content-type"]
            headers.append((b"content-type", b"application/json"))
            headers.append((b"content-length", str(len(body)).encode()))
            receive = once(body, receive)
        scope = {
            **request.scope,
            "headers": headers,
            "query_string": urlencode(query or {}).encode(),
            "state": {},
        }
        if path is not None:
            scope["path"] = f"{self._path}{path}"
            scope["raw_path"] = scope["path"].encode()
        await self._app(scope, receive, send)


def _own(visitor: Visitor, page: str) -> str:
    """Gradio keeps what a page holds by the name that its browser chose, which stands in URLs and
    logs. Under this one nobody else can ask for it, also when the session is over."""
    return hashlib.blake2b(f"{visitor.name} {page}".encode(), digest_size=16).hexdigest()
