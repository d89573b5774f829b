"""Who has the desk open: sessions that begin with a key and end with it."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from kvshare_mm.apps.desk.limits import DeskLimits
from kvshare_mm.apps.desk.uploads import Uploads
from kvshare_mm.apps.server.errors import ApiError
from kvshare_mm.apps.server.keys import Caller, digest
from kvshare_mm.native.fair_queue import has_room

_SWEEP_S = 1.0


@dataclass(slots=True, eq=False)
class Visitor:
    """One session.

    Attributes:
        name: under which it keeps uploads; no secret, and told nobody.
        caller: whose key it began with.
        key: that key, or None where none is asked for.
        came: when it began, on a monotonic clock.
        seen: when it last sent a request.
        pages: the session hashes of its open pages, the oldest first.
        streams: its open event streams, each ended by its timeout.
        questions: how many are being answered.
        uploading: how many of its files are on their way.
    """

    name: str
    caller: Caller
    key: str | None = field(repr=False)
    came: float
    seen: float
    pages: dict[str, None] = field(default_factory=dict)
    streams: set[asyncio.Timeout] = field(default_factory=set)
    questions: int = 0
    uploading: int = 0


class Visitors:
    """All sessions.

    Args:
        limits: of the desk.
        uploads: what ends with a session.
        caller_of: whose key this is, or None; asked at every request again.
        clock: seconds on a monotonic clock.
    """

    def __init__(
        self,
        limits: DeskLimits,
        uploads: Uploads,
        caller_of: Callable[[str | None], Caller | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits = limits
        self._uploads = uploads
        self._caller_of = caller_of
        self._clock = clock
        self._visitors: dict[str, Visitor] = {}  # by the digest of the cookie, the least used first
        self._pages: dict[str, Visitor] = {}

    def enter(self, caller: Caller, key: str | None) -> str:
        """Begin a session and return its cookie.

        Raises:
            ApiError: 503, there are too many.
        """
        if len(self._visitors) >= self._limits.visitors:
            # An open page holds a stream: who only comes and goes cannot push it out.
            idle = [cookie for cookie, v in self._visitors.items() if not v.streams]
            if not idle:
                raise ApiError(503, "too many people are at the desk", retry_after=60)
            sessions = Counter(v.caller.tenant for v in self._visitors.values())
            self._end(max(idle, key=lambda c: sessions[self._visitors[c].caller.tenant]))
        cookie = secrets.token_urlsafe(32)
        now = self._clock()
        self._visitors[digest(cookie)] = Visitor(secrets.token_hex(16), caller, key, now, now)
        return cookie

    def of_cookie(self, cookie: str | None) -> Visitor | None:
        """The session of a cookie; None: there is none, or it has ended."""
        known = "" if cookie is None else digest(cookie)
        visitor = self._visitors.get(known)
        if visitor is None:
            return None
        if not self.lasts(visitor):
            self._end(known)
            return None
        visitor.seen = self._clock()
        self._visitors[known] = self._visitors.pop(known)
        return visitor

    def of_page(self, page: str | None) -> Visitor:
        """The session that an open page belongs to.

        Raises:
            ApiError: 401, it has ended.
        """
        visitor = self._pages.get(page or "")
        if visitor is None or not self.lasts(visitor):
            raise ApiError(401, "your session at the desk has ended: load the page again")
        return visitor

    def claim(self, visitor: Visitor, page: str) -> None:
        """A page belongs to the session that names it first.

        Raises:
            ApiError: 404, it is another's.
        """
        owner = self._pages.setdefault(page, visitor)
        if owner is not visitor:
            raise ApiError(404, "there is no such page")
        visitor.pages[page] = None
        while len(visitor.pages) > self._limits.pages:
            oldest = next(iter(visitor.pages))
            del visitor.pages[oldest], self._pages[oldest]

    def lasts(self, visitor: Visitor) -> bool:
        """Whether a session goes on: its key is known, and it is not too old."""
        now = self._clock()
        caller = self._caller_of(visitor.key)
        if caller is None or caller.tenant != visitor.caller.tenant:
            return False
        visitor.caller = caller  # its limits may be others now
        return now - visitor.came < self._limits.lifetime_s and (
            bool(visitor.streams) or now - visitor.seen < self._limits.idle_s
        )

    def has_room(self, visitor: Visitor, held: Callable[[Visitor], int], most: int) -> bool:
        """Whether a visitor's tenant may take one more of what all tenants share."""
        taken: Counter[str] = Counter()
        for each in self._visitors.values():
            taken[each.caller.tenant] += held(each)
        tenant = visitor.caller.tenant
        return has_room(taken[tenant], taken.total(), len({*+taken, tenant}), most)

    @asynccontextmanager
    async def streaming(self, visitor: Visitor) -> AsyncIterator[None]:
        """Around an event stream, which ends with its session.

        Raises:
            ApiError: 429, there are too many.
        """
        crowded = not self.has_room(visitor, lambda v: len(v.streams), self._limits.all_streams)
        if crowded or len(visitor.streams) >= self._limits.streams:
            raise ApiError(429, "too many pages of the desk are open", retry_after=10)
        try:
            async with asyncio.timeout(None) as ending:
                visitor.streams.add(ending)
                try:
                    yield
                finally:
                    visitor.streams.discard(ending)
                    visitor.seen = self._clock()
        except TimeoutError:
            if not ending.expired():
                raise

    def leave(self, cookie: str) -> None:
        """End a session."""
        self._end(digest(cookie))

    def sweep(self) -> None:
        """End sessions that do not last, and drop files that were kept long enough."""
        for known, visitor in list(self._visitors.items()):
            if not self.lasts(visitor):
                self._end(known)
        self._uploads.expire()

    async def keep_sweeping(self) -> None:
        """Sweep until cancelled."""
        while True:
            await asyncio.sleep(_SWEEP_S)
            self.sweep()

    def end_streams(self) -> None:
        """Let go of all pages that are open in browsers."""
        for visitor in self._visitors.values():
            _end_streams(visitor)

    def _end(self, known: str) -> None:
        visitor = self._visitors.pop(known, None)
        if visitor is None:
            return
        _end_streams(visitor)
        for page in visitor.pages:
            self._pages.pop(page, None)
        self._uploads.forget(visitor.name)


def _end_streams(visitor: Visitor) -> None:
    for ending in visitor.streams:
        if not ending.expired():
            ending.reschedule(asyncio.get_running_loop().time())
