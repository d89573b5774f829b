"""The engine behind the server: loaded while the server already answers, drained at its end."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

from prometheus_client import Gauge

from kvshare_mm.apps.server.errors import ApiError
from kvshare_mm.apps.server.keys import KeyRing
from kvshare_mm.apps.server.limits import Meters
from kvshare_mm.apps.server.lines import Lines
from kvshare_mm.apps.server.media import resolved
from kvshare_mm.apps.server.options import ServerOptions
from kvshare_mm.apps.server.pace import Pace
from kvshare_mm.apps.server.schema import ChatMessage
from kvshare_mm.apps.server.tracing import Tracer
from kvshare_mm.llm import KVShare
from kvshare_mm.metrics import EngineMetrics
from kvshare_mm.modalities.fetch import MediaFetcher
from kvshare_mm.outputs import RequestOutput
from kvshare_mm.reuse.admin import CacheAdmin

logger = logging.getLogger(__name__)

# Finished donors are written in this time, when requests in flight have used up theirs.
_FLUSH_S = 5.0


class Service:
    """What the routes work with.

    Args:
        load: makes the engine; called once, in a thread.
        options: of the server.
        tracer: where spans go.
    """

    def __init__(
        self, load: Callable[[], KVShare], options: ServerOptions, tracer: Tracer | None = None
    ) -> None:
        self.options = options
        self.keys = KeyRing(options.keys_file, options.admin_key, options.api_key)
        self.meters = Meters()
        self.fetcher = MediaFetcher(options.fetch)
        self.tracer = tracer or Tracer(None, options.model_name)
        self.metrics = EngineMetrics(options.model_name, self.stats, self._tree_depth)
        Gauge(
            "kvshare:key_file_broken",
            "1: the file of keys cannot be read; those that it had before are in force.",
            registry=self.metrics.registry,
        ).set_function(lambda: float(self.keys.problem is not None))
        self.started_s = int(time.time())
        self.failure: Exception | None = None
        self._load = load
        self._llm: KVShare | None = None
        self._closed = False
        self._lock = threading.Lock()  # of whether it is closed, and of what is there then
        self._pace = Pace()
        self._ending: float | None = None
        # Tokenising, templates and pictures are work: not on the thread that answers everybody.
        self.lines = Lines(options)

    @property
    def llm(self) -> KVShare:
        """The engine. Raises ApiError 503 while it is loading."""
        if self._llm is None:
            raise ApiError(503, "the model is loading", code="loading", retry_after=2)
        return self._llm

    @property
    def ready(self) -> bool:
        return self._llm is not None

    @property
    def cache(self) -> CacheAdmin:
        """Administration of donors. Raises ApiError 404 if KV is not shared here."""
        if not self.llm.has_cache:
            raise ApiError(404, "this server shares no KV: there are no donors")
        return self.llm.cache

    async def load(self) -> None:
        """Load the model; what goes wrong is kept in `failure`."""
        try:
            await asyncio.wrap_future(self._loading())
        except Exception as error:
            self.failure = error
            raise

    def _loading(self) -> Future[None]:
        """Loads in a thread that nobody waits for at the process' end: it cannot be stopped."""
        loaded: Future[None] = Future()

        loaded.set_running_or_notify_cancel()  # who waits for it may leave, it goes on

        def load() -> None:
            try:
                llm = self._load()
            except BaseException as error:
                loaded.set_exception(error)
                return
            with self._lock:
                if not self._closed:
                    self._llm = llm
            if self._llm is None:
                llm.close()
            loaded.set_result(None)

        threading.Thread(target=load, name="kvshare-load", daemon=True).start()
        return loaded

    async def prepared(self, make: Callable[..., Any], *arguments: Any) -> Any:
        """Run a function of the cache's administration, which takes its time, in a thread."""
        return await self.lines.admin.run("", make, *arguments)

    async def with_media(
        self, messages: Sequence[ChatMessage], tenant: str
    ) -> list[dict[str, Any]]:
        """The messages of a tenant as the engine takes them. Raises InvalidRequestError."""
        return await resolved(
            [message.model_dump() for message in messages],
            self.fetcher,
            self.options.max_media,
            partial(self.lines.parsing.run, tenant),
        )

    @property
    def stuck_s(self) -> float:
        """Seconds for which requests have been there and nothing has moved: neither a layer of the
        model, nor a request that is being prepared. Long prefills, full queues and slow machines
        move."""
        engine = 0.0 if self._llm is None else self._llm.stuck_s
        prepared = (self.lines.parsing, self.lines.media, self.lines.tokens)
        return max(engine, *(line.stuck_s for line in prepared))

    def ends(self) -> None:
        """The server ends; requests in flight have their time from now on."""
        if self._ending is None:
            self._ending = time.monotonic() + self.options.shutdown_timeout_s

    @property
    def left_s(self) -> float:
        """Seconds until the end, those for tidying up not counted."""
        self.ends()
        assert self._ending is not None
        return max(0.0, self._ending - time.monotonic())

    def finished(self, output: RequestOutput, request_id: str, headers: dict[str, str]) -> None:
        """Count an answer."""
        self.metrics.observe(output)
        self.tracer.record(output, request_id, headers)
        self._pace.ended(output.metrics.total - output.metrics.queue)

    @property
    def retry_after(self) -> float:
        """Seconds until a place in the queue may be free."""
        return self._pace.seconds

    def stats(self) -> dict[str, Any] | None:
        """The engine's counters; None while it is loading."""
        return None if self._llm is None else self._llm.stats()

    async def close(self) -> None:
        """Keep what is finished, release everything."""
        with self._lock:
            self._closed = True
        for line in self.lines.all:
            line.close()
        if self._llm is not None:
            flushed = await asyncio.to_thread(self._llm.flush, max(_FLUSH_S, self.left_s))
            if not flushed:
                logger.warning("not all donors could be kept in time")
            await asyncio.to_thread(self._llm.close)
        await asyncio.to_thread(self.tracer.close)

    def _tree_depth(self) -> int:
        if self._llm is None or not self._llm.has_cache:
            return 0
        return max((info.depth for info in self._llm.cache.list()), default=0)
