"""HTTP over one connection, with deadlines for what a client owes."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from kvshare_mm.apps.server.errors import ApiError
from kvshare_mm.apps.server.options import ServerOptions

# A client that takes this much in each period of the write timeout is slow, but reads.
_LEAST_READ = 16 << 10


class DeadlineProtocol(H11Protocol):
    """uvicorn's protocol, which by itself waits for headers, rests of bodies and readers for ever.

    A connection ends when a request's headers, or the rest of a body behind its answer, are not
    complete within `header_timeout_s`, or when the client takes next to nothing of what was
    written for `write_timeout_s`. Bodies that are read have their deadline in the gate.
    """

    header_timeout_s = 10.0
    write_timeout_s = 30.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._owed: asyncio.TimerHandle | None = None
        self._reading: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # Whatever the kernel does not take at once is waited for: it would stay in our memory.
        transport.set_write_buffer_limits(high=1, low=0)
        self._expect()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._expect()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY:
            self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        _cancel(self._owed)
        _cancel(self._reading)
        super().connection_lost(exc)
        self._unset_keepalive_if_required()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        _cancel(self._reading)
        super().resume_writing()

    def _expect(self) -> None:
        """Start the deadline if the client owes something, and end it if not.

        Bytes that come meanwhile do not prolong it.
        """
        answered = self.cycle is not None and self.cycle.response_complete
        owes = self.conn.their_state is h11.IDLE or (
            self.conn.their_state is h11.SEND_BODY and answered
        )
        if not owes:
            _cancel(self._owed)
            self._owed = None
        elif self._owed is None:
            self._owed = self.loop.call_later(self.header_timeout_s, self.transport.abort)

    def _watch_reader(self) -> None:
        left = self.transport.get_write_buffer_size()
        self._reading = self.loop.call_later(self.write_timeout_s, self._check_reader, left)

    def _check_reader(self, before: int) -> None:
        if before - self.transport.get_write_buffer_size() < _LEAST_READ:
            self.transport.abort()
        else:
            self._watch_reader()

    def _should_upgrade(self) -> bool:
        return False  # no WebSockets here, and no word about their libraries


def protocol(options: ServerOptions) -> type[DeadlineProtocol]:
    """The protocol with a server's deadlines."""

    class Protocol(DeadlineProtocol):
        header_timeout_s = options.header_timeout_s
        write_timeout_s = options.write_timeout_s

    return Protocol


def farewell() -> bytes:
    """What a client is told whose connection is refused."""
    error = ApiError(503, "too many connections", code="too_many_connections")
    body = json.dumps(error.body).encode()
    head = (
        "HTTP/1.1 503 Service Unavailable",
        "content-type: application/json",
        f"content-length: {len(body)}",
        "retry-after: 5",
        "connection: close",
    )
    return "".join(f"{line}\r\n" for line in head).encode() + b"\r\n" + body


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
