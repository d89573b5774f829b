"""The ASGI application of a router."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpcore2
from prometheus_client import generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from kvshare_mm.apps.router import models
from kvshare_mm.apps.router.bodies import Room
from kvshare_mm.apps.router.fleet import Fleet
from kvshare_mm.apps.router.memory import Memory
from kvshare_mm.apps.router.metrics import RouterMetrics
from kvshare_mm.apps.router.proxy import Proxy
from kvshare_mm.apps.router.replicas import check
from kvshare_mm.apps.server.errors import ApiError, as_api_error
from kvshare_mm.apps.server.gate import Gate
from kvshare_mm.apps.server.keys import Caller, KeyRing
from kvshare_mm.apps.server.limits import Meters
from kvshare_mm.apps.server.lines import Line
from kvshare_mm.apps.server.options import ServerOptions
from kvshare_mm.metrics import CONTENT_TYPE

# Below the time after which servers close an idle connection: vLLM's after 5 s.
_IDLE_S = 4.0
MOST_IDLE = 256
_MOST_READING = 32
# A machine that is gone without a word is noticed after 25 s, not when the answer is overdue.
_ALIVE = [
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    *(
        (socket.IPPROTO_TCP, getattr(socket, name), value)
        for name, value in (
            ("TCP_KEEPIDLE", 10),
            ("TCP_KEEPINTVL", 5),
            ("TCP_KEEPCNT", 3),
            ("TCP_USER_TIMEOUT", 25_000),  # ms; nothing is probed while what was sent is not taken
        )
        if hasattr(socket, name)
    ),
]


class _Keys(KeyRing):
    """Whose key it is the replicas say, and what it may do."""

    def caller(self, key: str | None) -> Caller:
        return Caller(admin=True)


def create_app(
    fleet: Fleet,
    options: ServerOptions,
    max_requests: int = 100_000,
    max_held_bytes: int = 512 << 20,
) -> tuple[ASGIApp, RouterMetrics]:
    """The application, and what it counts.

    Args:
        fleet: where requests go; nobody can name others.
        options: of the server; of a replica's answer, the seconds between two pieces of it.
        max_requests: most earlier requests known.
        max_held_bytes: of all requests' bodies at a time.
    """
    replicas = fleet.replicas
    pool = httpcore2.AsyncConnectionPool(
        max_connections=None,  # as many as clients have
        max_keepalive_connections=MOST_IDLE,
        keepalive_expiry=_IDLE_S,
        socket_options=_ALIVE,
    )
    memory = Memory(max_requests)
    metrics = RouterMetrics(replicas, memory)
    line = Line("parsing", 1, _MOST_READING)
    room = Room(max_held_bytes)

    @asynccontextmanager
    async def life(_: Starlette) -> AsyncIterator[None]:
        async with pool:
            await fleet.resolve()
            await asyncio.gather(*(check(replica, pool) for replica in replicas))
            watching = asyncio.create_task(fleet.watch(pool))
            try:
                yield
            finally:
                watching.cancel()
                line.close()

    async def health(_: Request) -> Response:
        answering = sum(replica.healthy for replica in replicas)
        if not answering:
            raise ApiError(503, "no replica answers", code="no_replica", retry_after=2)
        return JSONResponse({"status": "ok", "replicas": len(replicas), "answering": answering})

    async def told(_: Request) -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE)

    async def listed(request: Request) -> Response:
        return await models.merged(request, replicas, pool)

    async def wrong(_: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):  # the gate's
            error = ApiError(error.status_code, str(error.detail))
        return as_api_error(error).response()

    proxy = Proxy(replicas, pool, memory, metrics, room, line, options.request_timeout_s)
    app = Starlette(
        routes=[
            Route("/health", health),
            Route("/metrics", told),
            Route("/v1/models", listed),
            Route("/{path:path}", proxy),
        ],
        exception_handlers={kind: wrong for kind in (ApiError, HTTPException, Exception)},
        lifespan=life,
    )
    return Gate(app, options, _Keys(None), Meters(), metrics.registry), metrics
