"""Large JSON bodies, parsed where they hold up nobody."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json

from kvshare_mm.apps.server.errors import ApiError
from kvshare_mm.apps.server.lines import Line

LARGE = 256 << 10
"""Bytes, or characters, that are too many for the thread that answers everybody."""

# Nobody else gets a turn while JSON is parsed: ten million empty lists take ten seconds, and
# gigabytes; ten million escapes a fifth of a second.
_MOST = (("values", b",[{", 1 << 19), ("escapes", b"\\", 1 << 21))
_PIECE = 1 << 20


def json_route(line: Line) -> type[APIRoute]:
    """A class of routes whose large bodies are parsed in a line."""

    class JsonRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def handler(request: Request) -> Response:
                parsed = _Request(request.scope, request.receive)
                if self.body_field is not None:
                    await parsed.parse(line)
                return await handle(parsed)

            return handler

    return JsonRoute


class _Request(Request):
    _wrong: json.JSONDecodeError | None = None

    async def parse(self, line: Line) -> None:
        """Raises ApiError: not now. What is wrong with a body, `json` raises."""
        body = await self.body()
        if len(body) <= LARGE or "json" not in self.headers.get("content-type", "json"):
            return
        try:
            self._json = await line.run(self.state.caller.tenant, parsed, body)
        except ValueError as error:
            self._wrong = json.JSONDecodeError(str(error), "", 0)

    async def json(self) -> Any:
        if self._wrong is not None:
            raise self._wrong
        return await super().json()


def parsed(body: bytes) -> Any:
    """A body's JSON. Raises ValueError: it is no JSON; ApiError 413: it holds too much."""
    content = np.frombuffer(body, np.uint8)
    for name, marks, most in _MOST:
        found = 0
        for at in range(0, len(content), _PIECE):
            piece = content[at : at + _PIECE]
            found += sum(int(np.count_nonzero(piece == mark)) for mark in marks)
            if found > most:
                raise ApiError(413, f"the body holds more than {most} {name}")
    return from_json(body)  # ten times as fast as `json` where strings are long
