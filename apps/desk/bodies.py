"""What the page sends, and how it is read."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive

from kvshare_mm.apps.server.errors import ApiError

PAGE = re.compile(r"[A-Za-z0-9_-]{1,64}")

Scalar = None | bool | int | float | Annotated[str, Field(max_length=4000)]


class File(BaseModel):
    """What the page says of a file; only its token counts."""

    path: Annotated[str, Field(max_length=200)]


class Event(BaseModel):
    """What the page sends when something is clicked."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    data: Annotated[list[Scalar | File], Field(max_length=32)]
    fn_index: int
    session_hash: Annotated[str, Field(pattern=rf"^{PAGE.pattern}$")]
    trigger_id: int | None = None


def once(body: bytes, receive: Receive) -> Receive:
    left: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receiving() -> Message:
        return left.pop() if left else await receive()

    return receiving


async def chunks(request: Request, most: int) -> AsyncGenerator[bytes]:
    """The body as it comes. Raises ApiError 413: it is larger; 400: it is not complete."""
    size = 0
    try:
        async for chunk in request.stream():
            size += len(chunk)
            if size > most:
                raise ApiError(413, f"the body has more than {most} bytes")
            yield chunk
    except ClientDisconnect as error:
        raise ApiError(400, "the body ended too early") from error


async def read(request: Request, most: int) -> bytes:
    return b"".join([chunk async for chunk in chunks(request, most)])
