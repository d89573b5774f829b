"""How callers wait for their answers: all at once, one chunk after the other, or both async."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncGenerator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import aclosing
from typing import Protocol

from kvshare_mm.outputs import RequestOutput, StreamChunk
from kvshare_mm.request import RequestSpec, Sink


class Engine(Protocol):
    """What runs requests: the native engine, or vLLM's."""

    def submit(self, spec: RequestSpec, sink: Sink) -> str:
        """Begin; `sink` gets chunks or an error from any thread. Returns the request's id."""

    def cancel(self, request_id: str) -> None:
        """End a request at its next token; nothing happens to one that is over."""


def answers(engine: Engine, specs: Sequence[RequestSpec]) -> list[RequestOutput]:
    """The answers to all of `specs`, or the first error; nothing is left running then."""
    submitted: list[tuple[str, Future[RequestOutput]]] = []
    try:
        for spec in specs:
            submitted.append(_submit(engine, spec))
        return [future.result() for _, future in submitted]
    except BaseException:
        # Nobody will see their answers.
        for request_id, _ in submitted:
            engine.cancel(request_id)
        raise


def _submit(engine: Engine, spec: RequestSpec) -> tuple[str, Future[RequestOutput]]:
    future: Future[RequestOutput] = Future()

    def sink(chunk: StreamChunk | Exception) -> None:
        if isinstance(chunk, Exception):
            future.set_exception(chunk)
        elif chunk.output is not None:
            future.set_result(chunk.output)

    return engine.submit(spec, sink), future


def chunks(engine: Engine, spec: RequestSpec) -> Iterator[StreamChunk]:
    """Chunks as they come, the last with the output; leaving early cancels the request."""
    arrived: queue.SimpleQueue[StreamChunk | Exception] = queue.SimpleQueue()
    request_id = engine.submit(spec, arrived.put)
    try:
        while True:
            chunk = arrived.get()
            if isinstance(chunk, Exception):
                raise chunk
            yield chunk
            if chunk.output is not None:
                return
    finally:
        engine.cancel(request_id)


async def achunks(engine: Engine, spec: RequestSpec) -> AsyncGenerator[StreamChunk]:
    """`chunks` for an event loop."""
    loop = asyncio.get_running_loop()
    arrived: asyncio.Queue[StreamChunk | Exception] = asyncio.Queue()

    def sink(chunk: StreamChunk | Exception) -> None:
        # The loop may be closed by the time a cancelled request ends.
        if not loop.is_closed():
            loop.call_soon_threadsafe(arrived.put_nowait, chunk)

    request_id = engine.submit(spec, sink)
    try:
        while True:
            chunk = await arrived.get()
            if isinstance(chunk, Exception):
                raise chunk
            yield chunk
            if chunk.output is not None:
                return
    finally:
        engine.cancel(request_id)


async def answer(engine: Engine, spec: RequestSpec) -> RequestOutput:
    """The answer to one request; cancelling the task cancels the request."""
    async with aclosing(achunks(engine, spec)) as arriving:
        async for chunk in arriving:
            if chunk.output is not None:
                return chunk.output
    raise RuntimeError("the engine ended a request without an output")
