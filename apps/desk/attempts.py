"""How fast keys can be tried out."""

from __future__ import annotations

import time
from collections.abc import Callable

from kvshare_mm.apps.desk.limits import DeskLimits
from kvshare_mm.apps.server.connections import client_of
from kvshare_mm.apps.server.limits import Bucket

_MAX_CLIENTS = 4096


class Attempts:
    """Counts attempts to log in, by client and of all together.

    Args:
        limits: of the desk.
        clock: seconds on a monotonic clock.
    """

    def __init__(self, limits: DeskLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._clock = clock
        self._all = Bucket(limits.all_logins, clock)
        self._clients: dict[str, Bucket] = {}

    def begin(self, address: str) -> float:
        """Count an attempt; 0: it may be made, else the seconds until one may be."""
        buckets = (self._all, self._of(address))
        wait = max(bucket.wait(1) for bucket in buckets)
        if not wait:
            for bucket in buckets:
                bucket.take(1)
        return wait

    def succeeded(self, address: str) -> None:
        """The last attempt was right: it does not count."""
        for bucket in (self._all, self._of(address)):
            bucket.take(-1)

    def _of(self, address: str) -> Bucket:
        name = client_of(address)
        if name not in self._clients and len(self._clients) >= _MAX_CLIENTS:
            self._clients = {k: b for k, b in self._clients.items() if b.level < b.capacity}
        return self._clients.setdefault(name, Bucket(self._limits.logins, self._clock))
