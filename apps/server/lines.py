"""Threads for work that must not hold up the loop: each kind has its own, and its own line."""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from typing import Any

from kvshare_mm.apps.server.errors import ApiError
from kvshare_mm.apps.server.options import ServerOptions
from kvshare_mm.modalities.decoding import Asker, asker

_LONGEST_RETRY_S = 60.0


class Line:
    """Some threads for one kind of work.

    Args:
        name: of the work, for errors.
        threads: jobs done at a time.
        max_waiting: jobs that may wait; more are refused.
    """

    def __init__(self, name: str, threads: int, max_waiting: int) -> None:
        self._name = name
        self._threads = threads
        self._most = threads + max_waiting
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=f"kvshare-{name}")
        self._unfinished = 0  # counted on the loop's thread
        self._numbers = itertools.count()
        self._running: dict[int, float] = {}  # since when
        self._mean_s = 0.0

    async def run(self, make: Callable[..., Any], *arguments: Any) -> Any:
        """The result of a function, run in a thread.

        Whoever is cancelled meanwhile leaves the line, and ends decoding that is under way.

        Raises:
            ApiError: 429, too many wait already.
        """
        if self._unfinished >= self._most:
            raise ApiError(
                429,
                f"{self._unfinished} requests wait for {self._name} already; try again later",
                code="queue_full",
                retry_after=self._retry_after,
            )
        waits = Asker()
        context = copy_context()
        context.run(asker.set, waits)
        loop = asyncio.get_running_loop()
        job = self._pool.submit(context.run, self._timed, make, *arguments)
        self._unfinished += 1
        job.add_done_callback(lambda job: self._ended(loop, job))
        try:
            return await asyncio.wrap_future(job)
        except asyncio.CancelledError:
            waits.leave()
            raise

    @property
    def stuck_s(self) -> float:
        """Seconds that the longest job has been running."""
        return max((time.monotonic() - start for start in [*self._running.values()]), default=0.0)

    def close(self) -> None:
        """Take no more jobs; those that run are not waited for."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    @property
    def _retry_after(self) -> float:
        return min(_LONGEST_RETRY_S, math.ceil(self._mean_s * self._most / self._threads))

    def _timed(self, make: Callable[..., Any], *arguments: Any) -> Any:
        number, start = next(self._numbers), time.monotonic()
        self._running[number] = start
        try:
            return make(*arguments)
        finally:
            del self._running[number]
            self._mean_s += 0.1 * (time.monotonic() - start - self._mean_s)

    def _ended(self, loop: asyncio.AbstractEventLoop, _: Future[Any]) -> None:
        def count() -> None:
            self._unfinished -= 1

        if not loop.is_closed():
            loop.call_soon_threadsafe(count)


class Lines:
    """All kinds of work: none waits for another.

    Args:
        options: how many may wait.

    Attributes:
        media: requests with pictures or sound: decoded, resized, tokenised.
        tokens: requests of text.
        admin: the cache's administration.
        metrics: what monitoring asks for.
    """

    def __init__(self, options: ServerOptions) -> None:
        self.media = Line("media", options.media_threads, options.max_media_waiting)
        self.tokens = Line("tokens", 2, options.max_waiting)
        self.admin = Line("administration", 2, 32)
        self.metrics = Line("metrics", 1, 8)

    @property
    def all(self) -> tuple[Line, ...]:
        return self.media, self.tokens, self.admin, self.metrics

    def of(self, prompt: Any) -> Line:
        """The line of a request.

        Args:
            prompt: text, token ids or messages.
        """
        return self.media if _has_media(prompt) else self.tokens


def _has_media(prompt: Any) -> bool:
    if isinstance(prompt, str) or not prompt or not isinstance(prompt[0], dict):
        return False
    contents = (message["content"] for message in prompt)
    return any(part["type"] != "text" for c in contents if not isinstance(c, str) for part in c)
