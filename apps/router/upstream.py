"""One request at one replica: its answer is passed on as it comes, byte for byte."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

import httpcore2
from starlette.types import Send

from kvshare_mm.apps.router.bodies import Body
from kvshare_mm.apps.router.headers import Headers, to_client
from kvshare_mm.apps.router.replicas import Flight, Replica
from kvshare_mm.apps.server.errors import ApiError

CONNECT_S = 2.0
_WRITE_S = 30.0
# A client waits so long for the head of an answer that has none of its body; then a replica that
# is lost is lost to it too.
_HEAD_AFTER_S = 5.0
_MOST_HELD = 64 << 10
_ERRORS = (
    httpcore2.NetworkError,
    httpcore2.ProtocolError,
    httpcore2.TimeoutException,
    ssl.SSLError,  # while an answer is read
)


class LostError(Exception):
    """A replica went away.

    Attributes:
        absent: whether there was no connection to it.
        reached: whether it had the whole request.
        slow: whether it was too slow to take it.
        begun: whether some of its answer was passed on.
    """

    def __init__(self, why: Exception, reached: bool, begun: bool) -> None:
        super().__init__(str(why) or type(why).__name__)
        self.absent = isinstance(why, httpcore2.ConnectError | httpcore2.ConnectTimeout)
        self.reached = reached
        self.slow = isinstance(why, httpcore2.WriteTimeout)
        self.begun = begun


class Client:
    """Where an answer goes.

    Args:
        send: to it.

    Attributes:
        headed: whether it has the head of a stream: what it gets can only be another stream.
    """

    def __init__(self, send: Send) -> None:
        self.send = send
        self.headed = False


@dataclass(frozen=True, slots=True)
class Asked:
    """A request as a replica gets it; `target` is its path and query."""

    method: str
    target: str
    headers: Headers
    body: Body


@dataclass(frozen=True, slots=True)
class Whole:
    """An answer that was read to its end."""

    status: int
    headers: Headers
    body: bytes

    @property
    def is_final(self) -> bool:
        """Whether no other replica should be asked: a key that used up what it may is refused,
        others would answer only because they do not know it."""
        if self.status == 429:
            return bool(self._code == "rate_limit_exceeded")
        return not any(name == b"retry-after" for name, _ in self.headers)

    @property
    def is_leaving(self) -> bool:
        """Whether it comes of a server that starts or stops, and not of one that has no room."""
        return self._code in {"loading", "stopping"}

    @property
    def _code(self) -> Any:
        try:
            return json.loads(self.body)["error"]["code"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return None

    async def send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status, "headers": self.headers})
        await send({"type": "http.response.body", "body": self.body})


async def read_whole(
    pool: httpcore2.AsyncConnectionPool, replica: Replica, asked: Asked, most: int, timeout_s: float
) -> Whole:
    """A replica's answer of at most so many bytes. Raises LostError, ApiError."""
    try:
        async with _asked(pool, replica, asked, timeout_s) as reply:
            return await _whole(reply, replica, most)
    except _ERRORS as error:
        raise _lost(error, asked, False) from error


async def pass_on(
    pool: httpcore2.AsyncConnectionPool,
    replica: Replica,
    asked: Asked,
    flight: Flight,
    client: Client,
    timeout_s: float,
) -> Whole | None:
    """Ask a replica and pass its answer on.

    Args:
        flight: told when the answer begins.
        client: gets the answer; of a stream perhaps the head alone, before the replica is lost.
        timeout_s: between two pieces of the answer, and until the first.

    Returns:
        Of a replica that has no room, what it said, and nothing was passed on; else None.

    Raises:
        LostError: the replica went away.
        ApiError: it took too long, or the request cannot be sent.
    """
    begun = answered = False
    start = time.perf_counter()
    try:
        async with _asked(pool, replica, asked, timeout_s) as reply:
            stream = reply.status == 200 and _is_stream(reply)
            if reply.status in {429, 503} or (client.headed and not stream):
                refusal = await _whole(reply, replica, _MOST_HELD)
                if reply.status >= 500 and refusal.is_final:
                    replica.answered(reply.status)
                return refusal
            chunks = reply.aiter_stream().__aiter__()
            first = asyncio.ensure_future(_next(chunks))
            try:
                await asyncio.wait({first}, timeout=_HEAD_AFTER_S)
                if first.done():
                    first.result()  # while another replica can still be asked
                begun = first.done() or not stream
                if not client.headed:
                    client.headed = True
                    headers = to_client(reply.headers, replica.number)
                    await client.send(
                        {"type": "http.response.start", "status": reply.status, "headers": headers}
                    )
                chunk = await first
                begun = answered = True
                replica.answered(reply.status)
                asked.body.release()
            finally:
                first.cancel()
                await asyncio.gather(first, return_exceptions=True)
            if reply.status == 200:
                flight.first(time.perf_counter() - start, not stream)
            while chunk:
                await client.send({"type": "http.response.body", "body": chunk, "more_body": True})
                chunk = await _next(chunks)
            await client.send({"type": "http.response.body", "body": b"", "more_body": False})
            return None
    except _ERRORS as error:
        begun = begun or (client.headed and _is_late(error, asked))
        if not answered and not isinstance(error, httpcore2.LocalProtocolError):
            replica.answered(504 if _is_late(error, asked) else 502)
        raise _lost(error, asked, begun) from error


def _asked(
    pool: httpcore2.AsyncConnectionPool, replica: Replica, asked: Asked, timeout_s: float
) -> AbstractAsyncContextManager[httpcore2.Response]:
    asked.body.sent = False
    timeouts = {"connect": CONNECT_S, "write": _WRITE_S, "read": timeout_s}
    ours = (
        (b"host", replica.netloc.encode()),
        (b"content-length", str(len(asked.body.content)).encode()),
    )
    return pool.stream(
        asked.method,
        replica.url(asked.target),
        headers=[*ours, *asked.headers],
        content=asked.body.pieces(),
        extensions={"timeout": timeouts},
    )


async def _whole(reply: httpcore2.Response, replica: Replica, most: int) -> Whole:
    body = b""
    async for chunk in reply.aiter_stream():
        body += chunk
        if len(body) > most:
            raise LostError(ValueError(f"its answer is longer than {most} bytes"), True, False)
    return Whole(reply.status, to_client(reply.headers, replica.number), body)


async def _next(chunks: AsyncIterator[bytes]) -> bytes:
    """The next piece that has something in it; nothing: that was all."""
    async for chunk in chunks:
        if chunk:
            return chunk
    return b""


def _is_stream(reply: httpcore2.Response) -> bool:
    return any(
        name.lower() == b"content-type" and value.startswith(b"text/event-stream")
        for name, value in reply.headers
    )


def _lost(error: Exception, asked: Asked, begun: bool) -> Exception:
    if isinstance(error, httpcore2.LocalProtocolError):
        return ApiError(400, f"the request cannot be passed on: {error}")
    if _is_late(error, asked) and not begun:
        return ApiError(504, "the replica took longer than this router waits", code="timeout")
    return LostError(error, asked.body.sent, begun)


def _is_late(error: Exception, asked: Asked) -> bool:
    """Whether a replica has a request and says nothing."""
    timeouts = httpcore2.ReadTimeout | httpcore2.WriteTimeout
    return isinstance(error, timeouts) and asked.body.sent
