"""Bodies of requests: whole, so that another replica can be asked, and bounded over all."""

from __future__ import annotations

from collections.abc import AsyncIterator

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from kvshare_mm.apps.server.errors import ApiError


class Room:
    """Bytes of bodies that may be held at a time, of all requests."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self.used = 0

    def take(self, num_bytes: int) -> None:
        """Raises ApiError 503: there is no room."""
        if self.used + num_bytes > self._max_bytes:
            raise ApiError(503, "too many large requests at a time", code="busy", retry_after=1)
        self.used += num_bytes

    def give_back(self, num_bytes: int) -> None:
        self.used -= num_bytes


class Body:
    """One body; `release` it as soon as nobody else will be sent it.

    Attributes:
        sent: whether all of it was written to who was asked last.
    """

    def __init__(self, room: Room) -> None:
        self._room = room
        self.content = b""
        self.sent = False
        self._size = 0

    async def read(self, receive: Receive) -> None:
        """Raises ApiError 503: there is no room; ClientDisconnect: the client has gone."""
        pieces, more = [], True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            piece = message.get("body", b"")
            self._room.take(len(piece))
            self._size += len(piece)
            pieces.append(piece)
            more = message.get("more_body", False)
        self.content = b"".join(pieces)

    async def pieces(self) -> AsyncIterator[bytes]:
        """The content; who iterates holds it no longer than it takes to be sent."""
        yield self.content
        self.sent = True

    def release(self) -> None:
        self._room.give_back(self._size)
        self._size, self.content = 0, b""
