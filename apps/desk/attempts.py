"""How fast keys can be tried out."""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Callable
from dataclasses import dataclass

from kvshare_mm.apps.desk.limits import DeskLimits

_PERIOD_S = 60.0
_MAX_ADDRESSES = 4096


@dataclass(slots=True)
class _Bucket:
    """Fills with attempts, drains evenly."""

    size: int
    level: float = 0.0
    at: float = 0.0

    def drain(self, now: float) -> None:
        self.level = max(0.0, self.level - (now - self.at) * self.size / _PERIOD_S)
        self.at = now

    @property
    def wait_s(self) -> float:
        return max(0.0, (self.level + 1 - self.size) * _PERIOD_S / self.size)


class Attempts:
    """Counts attempts to log in, by address and of all together.

    Args:
        limits: of the desk.
        clock: seconds on a monotonic clock.
    """

    def __init__(self, limits: DeskLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._clock = clock
        self._all = _Bucket(limits.all_logins)
        self._addresses: dict[str, _Bucket] = {}

    def begin(self, address: str) -> float:
        """Count an attempt; 0: it may be made, else the seconds until one may be."""
        buckets = (self._all, self._of(address))
        wait = max(bucket.wait_s for bucket in buckets)
        if not wait:
            for bucket in buckets:
                bucket.level += 1
        return wait

    def succeeded(self, address: str) -> None:
        """The last attempt was right: it does not count."""
        for bucket in (self._all, self._of(address)):
            bucket.level = max(0.0, bucket.level - 1)

    def _of(self, address: str) -> _Bucket:
        now = self._clock()
        name = _network(address)
        if name not in self._addresses and len(self._addresses) >= _MAX_ADDRESSES:
            for bucket in self._addresses.values():
                bucket.drain(now)
            self._addresses = {k: b for k, b in self._addresses.items() if b.level}
        found = self._addresses.setdefault(name, _Bucket(self._limits.logins, at=now))
        for bucket in (self._all, found):
            bucket.drain(now)
        return found


def _network(address: str) -> str:
    """Whoever has an IPv6 address has the 2**64 beside it too."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if parsed.version == 6 and parsed.ipv4_mapped is None:
        return str(ipaddress.ip_network((parsed, 64), strict=False))
    return str(parsed)
