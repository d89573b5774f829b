"""What every request passes first: an id, a key, limits on its body; and the line in the log.

Plain ASGI, because Starlette's middleware classes hide from an endpoint that its client has gone.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from contextlib import suppress
from typing import Any
from urllib.parse import quote

from prometheus_client import CollectorRegistry, Counter
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvshare_mm.apps.server.errors import ApiError
from kvshare_mm.apps.server.hosts import HostCheck
from kvshare_mm.apps.server.json_bodies import LARGE
from kvshare_mm.apps.server.keys import Caller, KeyRing
from kvshare_mm.apps.server.limits import Meter, Meters
from kvshare_mm.apps.server.logs import request_id
from kvshare_mm.apps.server.options import ServerOptions
from kvshare_mm.apps.server.replies import PROMPT_TOKENS

logger = logging.getLogger(__name__)

_OPEN = frozenset(
    {"/health", "/ping", "/version", "/metrics", "/openapi.json", "/docs", "/favicon.ico"}
)
_PRIVATE = frozenset({"/metrics", "/openapi.json", "/docs"})
# Starlette takes a path that ends in a line feed for the one without.
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_CLIENT_GONE = 499
_TURN_S = 0.001
# For the rest of a body that nobody will read: who stops waits a second for what came meanwhile.
_REST_S = 0.5
# In the state of every request that arrives once the server is told to stop.
STOPPING = "stopping"


class Gate:
    """ASGI middleware.

    Args:
        app: what lies behind.
        options: limits.
        keys: who may come in.
        meters: what keys with limits have used.
        registry: where requests are counted.
        ui_path: pages below it have a login of their own; None: there are none.
    """

    def __init__(
        self,
        app: ASGIApp,
        options: ServerOptions,
        keys: KeyRing,
        meters: Meters,
        registry: CollectorRegistry,
        ui_path: str | None = None,
    ) -> None:
        self._app = app
        self._options = options
        self._keys = keys
        self._meters = meters
        self._ui_path = ui_path
        self._turns = _Turns()
        self._hosts = HostCheck(options.allowed_hosts)
        self._requests = Counter(
            "kvshare:http_requests",
            "Requests by route and status; 499: the client went away.",
            ["route", "status"],
            registry=registry,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        headers = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in scope["headers"]}
        refusal = self._refusal(scope, headers)
        asked = headers.get("x-request-id", "")
        this_id = asked if _REQUEST_ID.fullmatch(asked) else uuid.uuid4().hex
        token = request_id.set(this_id)
        state: dict[str, Any] = scope.setdefault("state", {})
        state["request_id"] = this_id
        status = 0
        meter: Meter | None = None

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                more = {"x-request-id": this_id, **(meter.headers if meter else {})}
                if state.get(STOPPING):
                    more["connection"] = "close"
                message.setdefault("headers", []).extend(
                    (name.encode(), value.encode()) for name, value in more.items()
                )
            await send(message)

        body = _Body(receive, self._options, self._turns)
        try:
            error = refusal or self._admit(scope, headers, state) or body.check(headers)
            if error is None:
                meter = self._meters.of(state["caller"].key, state["caller"].limits)
                error = _begun(meter)
            if error is not None:
                if state.get(STOPPING) and "expect" not in headers:
                    await body.pass_over()
                await error.response()(scope, receive, sending)
                return
            try:
                await self._app(scope, body.receive, sending)
            finally:
                if meter is not None:
                    meter.end()
        finally:
            if state.get("client_gone"):
                status = _CLIENT_GONE
            self._tell(scope, status or 500, started, state.get("caller"))
            request_id.reset(token)

    def _refusal(self, scope: Scope, headers: dict[str, str]) -> ApiError | None:
        """Why nobody is answered now, or not by this name."""
        if scope.get("state", {}).get(STOPPING):
            return ApiError(503, "the server is shutting down", code="stopping", retry_after=5)
        if _CONTROL.search(scope["path"]):
            return ApiError(404, "there is nothing here")
        return self._hosts.error(headers.get("host"))

    def _admit(
        self, scope: Scope, headers: dict[str, str], state: dict[str, Any]
    ) -> ApiError | None:
        path = scope["path"]
        private = self._options.private_pages and path in _PRIVATE
        # The pages below ui_path ask for a key themselves.
        if self._is_ui(path) or (path in _OPEN and not private):
            state["caller"] = Caller()
            return None
        kind, _, key = headers.get("authorization", "").partition(" ")
        caller = self._keys.caller(key.strip() if kind.lower() == "bearer" else None)
        if caller is None:
            said = "is wrong" if key else "is missing: send Authorization: Bearer KEY"
            return ApiError(401, f"the API key {said}", code="invalid_api_key")
        if (path == "/v1/cache" or path.startswith("/v1/cache/")) and not caller.admin:
            return ApiError(403, "administrating the cache needs an admin key")
        if private and not caller.admin:
            return ApiError(403, f"{path} needs an admin key here")
        state["caller"] = caller
        return None

    def _is_ui(self, path: str) -> bool:
        ui = self._ui_path
        return ui is not None and (path == ui or path.startswith(f"{ui}/"))

    def _tell(self, scope: Scope, status: int, started: float, caller: Caller | None) -> None:
        # Pages with a login of their own say which of theirs it was.
        route = scope["state"].get("route") or getattr(scope.get("route"), "path", None) or "other"
        self._requests.labels(route, str(status)).inc()
        seconds = time.perf_counter() - started
        # While a model is loading, it is asked every second whether it is ready.
        quiet = route in {"/health", "/ping", "/metrics"} and (status < 400 or status == 503)
        origin: dict[str, int] = scope["state"].get(PROMPT_TOKENS, {})
        said = ", ".join(f"{count} {kind}" for kind, count in origin.items())
        logger.log(
            logging.DEBUG if quiet else logging.INFO,
            "%s %s %d in %.3f s%s",
            scope["method"][:20],
            quote(scope["path"], "/:", errors="backslashreplace")[:200],
            status,
            seconds,
            f"; prompt tokens: {said}" if said else "",
            extra={
                "fields": {
                    "status": status,
                    "seconds": round(seconds, 6),
                    "route": route,
                    **({"tenant": caller.tenant} if caller and caller.tenant else {}),
                    **origin,
                }
            },
        )


def _begun(meter: Meter | None) -> ApiError | None:
    """Begin a request of a key with limits, or say why not now."""
    try:
        if meter is not None:
            meter.begin()
    except ApiError as error:
        return error
    return None


class _Turns:
    """Large bodies are read piece by piece, with time for others between the pieces of all."""

    def __init__(self) -> None:
        self._next = 0.0

    async def wait(self) -> None:
        now = time.monotonic()
        self._next = max(now, self._next) + _TURN_S
        await asyncio.sleep(self._next - now)


class _Body:
    """Counts a body while it is read, and does not wait for it forever."""

    def __init__(self, receive: Receive, options: ServerOptions, turns: _Turns) -> None:
        self._receive = receive
        self._turns = turns
        self._options = options
        self._size = 0
        self._done = False
        self._deadline = time.monotonic() + options.body_timeout_s

    def check(self, headers: dict[str, str]) -> ApiError | None:
        """Refuses a body by what is said of it."""
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > self._options.max_body_bytes:
            return ApiError(413, self._too_large)
        return None

    async def pass_over(self) -> None:
        """Read what is left: a connection that is closed before is reset, and the answer lost."""
        self._deadline = min(self._deadline, time.monotonic() + _REST_S)
        with suppress(HTTPException):
            while not self._done and (await self.receive())["type"] == "http.request":
                pass

    async def receive(self) -> Message:
        if self._done:
            return await self._receive()  # only that the client went away
        try:
            async with asyncio.timeout(max(0.0, self._deadline - time.monotonic())):
                message = await self._receive()
        except TimeoutError as error:
            # FastAPI turns everything else that happens to a body into status 400.
            raise HTTPException(
                408, f"the body did not arrive within {self._options.body_timeout_s:g} s"
            ) from error
        self._size += len(message.get("body", b""))
        self._done = not message.get("more_body", False)
        if self._size > self._options.max_body_bytes:
            raise HTTPException(413, self._too_large)
        if self._size > LARGE and not self._done:
            await self._turns.wait()
        return message

    @property
    def _too_large(self) -> str:
        return f"the body has more than {self._options.max_body_bytes} bytes"
