"""Threads for work that must not hold up the loop: each kind has its own, and its own line."""

from __future__ import annotations

import asyncio
import itertools
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from typing import Any

from kvshare_mm.apps.server.errors import ApiError
from kvshare_mm.apps.server.options import ServerOptions
from kvshare_mm.errors import EngineClosedError, QueueFullError
from kvshare_mm.modalities.decoding import Asker, asker
from kvshare_mm.native.fair_queue import FairQueue

_LONGEST_RETRY_S = 60.0
_STARTED = 1  # what a tenant is charged when a job starts, before it is known how long it takes
_PER_S = 1_000_000


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    tenant: str
    context: Context
    work: Callable[[], Any]
    result: Future[Any] = field(default_factory=Future)


class Line:
    """Some threads for one kind of work. Each tenant that waits gets the same share of their time.

    Args:
        name: of the work, for errors.
        threads: jobs done at a time.
        max_waiting: jobs that may wait; more are refused, see `FairQueue`.
    """

    def __init__(self, name: str, threads: int, max_waiting: int) -> None:
        self._name = name
        self._threads = threads
        self._most = threads + max_waiting
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=f"kvshare-{name}")
        self._lock = threading.Lock()  # of what follows
        self._waiting: FairQueue[_Job] = FairQueue(max_waiting)
        self._busy = 0
        self._closed = False
        self._numbers = itertools.count()
        self._running: dict[int, float] = {}  # since when
        self._mean_s = 0.0

    async def run(self, tenant: str, make: Callable[..., Any], *arguments: Any) -> Any:
        """The result of a function, run in a thread.

        Whoever is cancelled meanwhile leaves the line, and ends decoding that is under way.

        Args:
            tenant: whose share of the threads is used.
            make: the function.
            arguments: of it.

        Raises:
            ApiError: 429, too many wait already.
            EngineClosedError: the line takes no more jobs.
        """
        waits = Asker()
        context = copy_context()
        context.run(asker.set, waits)
        job = _Job(tenant, context, lambda: make(*arguments))
        self._add(job)
        try:
            return await asyncio.wrap_future(job.result)
        except asyncio.CancelledError:
            waits.leave()
            self._give_up(job)
            raise

    @property
    def unfinished(self) -> int:
        """Jobs that run or wait."""
        with self._lock:
            return self._busy + len(self._waiting)

    @property
    def stuck_s(self) -> float:
        """Seconds that the longest job has been running."""
        return max((time.monotonic() - start for start in [*self._running.values()]), default=0.0)

    def close(self) -> None:
        """Take no more jobs; those that have begun, or are about to, are not waited for."""
        with self._lock:
            self._closed = True
            waiting = [*self._waiting]
            self._waiting.clear()
        for job in waiting:
            job.result.cancel()
        self._pool.shutdown(wait=False)

    @property
    def _retry_after(self) -> float:
        return min(_LONGEST_RETRY_S, math.ceil(self._mean_s * self._most / self._threads))

    def _add(self, job: _Job) -> None:
        with self._lock:
            if self._closed:
                raise EngineClosedError("the server is shutting down")
            if self._busy < self._threads:
                self._busy += 1
                self._waiting.charge(job.tenant, _STARTED)
                self._pool.submit(self._work, job)
                return
            try:
                self._waiting.add(job.tenant, job)
            except QueueFullError as error:
                count = self._busy + len(self._waiting)
                raise ApiError(
                    429,
                    f"{count} requests wait for {self._name} already; try again later",
                    code="queue_full",
                    retry_after=self._retry_after,
                ) from error

    def _give_up(self, job: _Job) -> None:
        with self._lock:
            if job in self._waiting:
                self._waiting.remove(job.tenant, job)

    def _work(self, first: _Job) -> None:
        """Do a job, and then what waits, until nothing does."""
        job: _Job | None = first
        while job is not None:
            taken = self._timed(job)
            with self._lock:
                self._waiting.charge(job.tenant, int(taken * _PER_S))
                self._mean_s += 0.1 * (taken - self._mean_s)
                job = self._waiting.next(lambda _: True)
                if job is None:
                    self._busy -= 1
                else:
                    self._waiting.remove(job.tenant, job)
                    self._waiting.charge(job.tenant, _STARTED)

    def _timed(self, job: _Job) -> float:
        """Do a job; how many seconds it took."""
        if not job.result.set_running_or_notify_cancel():
            return 0.0
        number, start = next(self._numbers), time.monotonic()
        self._running[number] = start
        try:
            made = job.context.run(job.work)
        except BaseException as error:
            job.result.set_exception(error)
        else:
            job.result.set_result(made)
        finally:
            del self._running[number]
        return time.monotonic() - start


class Lines:
    """All kinds of work: none waits for another.

    Args:
        options: how many may wait.

    Attributes:
        parsing: large bodies: parsed, base64 decoded.
        media: requests with pictures or sound: decoded, resized, tokenised.
        tokens: requests of text.
        admin: the cache's administration.
        metrics: what monitoring asks for.
    """

    def __init__(self, options: ServerOptions) -> None:
        # One at a time: most of it holds the lock of the interpreter.
        self.parsing = Line("parsing", 1, options.max_media_waiting)
        self.media = Line("media", options.media_threads, options.max_media_waiting)
        self.tokens = Line("tokens", 2, options.max_waiting)
        self.admin = Line("administration", 2, 32)
        self.metrics = Line("metrics", 1, 8)

    @property
    def all(self) -> tuple[Line, ...]:
        return self.parsing, self.media, self.tokens, self.admin, self.metrics

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
