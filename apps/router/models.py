"""`/v1/models` of all replicas: each model once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import httpcore2
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kvshare_mm.apps.router.bodies import Body, Room
from kvshare_mm.apps.router.headers import to_replica
from kvshare_mm.apps.router.replicas import Replica
from kvshare_mm.apps.router.upstream import Asked, LostError, Whole, read_whole
from kvshare_mm.apps.server.errors import ApiError

_MOST_BYTES = 1 << 20
_TIMEOUT_S = 5.0


async def merged(
    request: Request, replicas: Sequence[Replica], pool: httpcore2.AsyncConnectionPool
) -> Response:
    """What every replica that answers serves; who has no key there gets the refusal of one.

    Raises:
        ApiError: 503, no replica answers.
    """
    headers = to_replica(request.scope["headers"], request.state.request_id)
    # What is read must not be packed.
    headers = [(name, value) for name, value in headers if name != b"accept-encoding"]
    asked = Asked("GET", "/v1/models", headers, Body(Room(0)))

    async def one(replica: Replica) -> Whole | None:
        with suppress(LostError, ApiError):
            return await read_whole(pool, replica, asked, _MOST_BYTES, _TIMEOUT_S)
        return None

    # Where no check has succeeded lately, they may answer all the same: so are prompts sent.
    asked_of = [r for r in replicas if r.healthy] or replicas
    told = await asyncio.gather(*(one(r) for r in asked_of))
    replies = [reply for reply in told if reply is not None]
    found: dict[str, Any] = {}
    for reply in replies:
        if reply.status == 200:
            found = {**_models(reply.body), **found}
    if found:
        return JSONResponse({"object": "list", "data": list(found.values())})
    if not replies:
        raise ApiError(503, "no replica answers", code="no_replica", retry_after=2)
    response = Response(replies[0].body, replies[0].status)
    response.raw_headers = replies[0].headers
    return response


def _models(body: bytes) -> dict[str, Any]:
    with suppress(ValueError, KeyError, TypeError, RecursionError):
        return {str(model["id"]): model for model in json.loads(body)["data"]}
    return {}
