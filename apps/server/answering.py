"""One HTTP request, one or more answers: submitted together, merged, given up together."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from kvshare_mm.outputs import StreamChunk

# A request that waits longer for its first token gets its headers, so that no proxy gives it up.
_HEADERS_AFTER_S = 5.0

Chunks = AsyncGenerator[StreamChunk]
Event = tuple[int, StreamChunk]


class Answers:
    """Chunks of several running requests as they come.

    Args:
        streams: `KVShare.astream` of each.
        made: told of each chunk when it comes, even if nobody takes it yet.
    """

    def __init__(self, streams: Sequence[Chunks], made: Callable[[int, StreamChunk], None]) -> None:
        self._made = made
        self._events: asyncio.Queue[Event | Exception] = asyncio.Queue()
        self._running = len(streams)
        self._early: list[Event] = []
        self._tasks = [asyncio.create_task(self._pump(i, s)) for i, s in enumerate(streams)]

    async def started(self) -> None:
        """Wait for the first chunk, a few seconds at most.

        What is wrong from the start (a full queue) is raised here, while a status can be sent.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(_HEADERS_AFTER_S):
                self._early.append(await self._next())

    async def __aiter__(self) -> AsyncIterator[Event]:
        while self._running or self._early or not self._events.empty():
            index, chunk = self._early.pop() if self._early else await self._next()
            if chunk.output is not None:
                self._running -= 1
            yield index, chunk

    async def close(self) -> None:
        """Cancel what still runs."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _next(self) -> Event:
        event = await self._events.get()
        if isinstance(event, Exception):
            raise event
        return event

    async def _pump(self, index: int, stream: Chunks) -> None:
        try:
            async with aclosing(stream) as chunks:
                async for chunk in chunks:
                    self._made(index, chunk)
                    self._events.put_nowait((index, chunk))
        except Exception as error:
            self._events.put_nowait(error)


@asynccontextmanager
async def answers(
    streams: Sequence[Chunks], made: Callable[[int, StreamChunk], None]
) -> AsyncIterator[Answers]:
    """`Answers` that end with the block."""
    running = Answers(streams, made)
    try:
        yield running
    finally:
        await running.close()


async def unless_gone(receive: Receive, scope: Scope, work: Awaitable[Any]) -> Any:
    """The result of `work`; cancelled, and None, once the client has gone."""
    working = asyncio.ensure_future(work)
    gone = asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            scope["state"]["client_gone"] = True
            return None
        return working.result()
    finally:
        for task in (gone, working):
            task.cancel()
        await asyncio.gather(gone, working, return_exceptions=True)


def server_sent(data: dict[str, Any], name: str | None = None) -> str:
    """One event, as it is sent."""
    return (f"event: {name}\n" if name else "") + f"data: {json.dumps(data)}\n\n"


class EventStream(Response):
    """Server-sent events, given up as soon as the client has gone.

    Args:
        events: makes the events, as `server_sent` does.
        close: called in the end, whatever happened.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], close: Callable[[], Awaitable[None]]) -> None:
        self.status_code = 200
        self.background = None
        self.body = b""
        self._events = events
        self._close = close
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def sending() -> None:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for event in self._events:
                body = event.encode()
                await send({"type": "http.response.body", "body": body, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        try:
            with suppress(OSError):  # the client went while it was written to
                await unless_gone(receive, scope, sending())
        finally:
            await self._close()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
