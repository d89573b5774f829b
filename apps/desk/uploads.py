"""Pictures and clips that visitors have sent.

They are kept in memory, and a page knows them by a token: there is no path that could name another
file of this machine, nor one that an error could tell.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from kvshare_mm.apps.desk.limits import DeskLimits


@dataclass(frozen=True, slots=True)
class Upload:
    """A file of a visitor.

    Attributes:
        content: its bytes.
        kind: the content type that the browser gave it.
        since: when it was last sent, on a monotonic clock.
    """

    content: bytes
    kind: str
    since: float


class Uploads:
    """What all visitors have sent, each only for who sent it.

    Args:
        limits: of the desk.
        clock: seconds on a monotonic clock.
    """

    def __init__(self, limits: DeskLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._clock = clock
        self._secret = secrets.token_bytes(32)
        self._held: dict[str, dict[str, Upload]] = {}  # by visitor and token, the oldest first
        self._bytes: dict[str, int] = {}
        self._tenants: dict[str, str] = {}

    @property
    def total_bytes(self) -> int:
        return sum(self._bytes.values())

    def keep(self, visitor: str, content: bytes, kind: str, tenant: str = "") -> str:
        """Keep a file; the same one again has the same token.

        Args:
            visitor: whose it is.
            content: its bytes.
            kind: its content type.
            tenant: of the visitor.

        Raises:
            ValueError: it is larger than a file may be.
        """
        if len(content) > self._limits.upload_bytes:
            raise ValueError(f"the file has more than {self._limits.upload_bytes} bytes")
        named = hashlib.blake2b(f"{visitor}\n{kind}\n".encode(), key=self._secret, digest_size=24)
        named.update(content)
        token = named.hexdigest()
        self._drop(visitor, token)
        self._held.setdefault(visitor, {})[token] = Upload(content, kind, self._clock())
        self._bytes[visitor] = self._bytes.get(visitor, 0) + len(content)
        self._tenants[visitor] = tenant
        while self._bytes[visitor] > self._limits.visitor_bytes:
            self._drop_oldest(visitor)
        while self.total_bytes > self._limits.all_bytes:
            self._drop_oldest(self._largest())
        return token

    def get(self, visitor: str, token: str) -> Upload | None:
        """A file of this visitor; None: it has none of that token, or has it no longer."""
        return self._held.get(visitor, {}).get(token)

    def forget(self, visitor: str) -> None:
        """Drop all that a visitor sent."""
        self._held.pop(visitor, None)
        self._bytes.pop(visitor, None)
        self._tenants.pop(visitor, None)

    def expire(self) -> None:
        """Drop what was sent too long ago."""
        until = self._clock() - self._limits.upload_s
        for visitor, held in list(self._held.items()):
            for token in [token for token, upload in held.items() if upload.since < until]:
                self._drop(visitor, token)

    def _largest(self) -> str:
        """Who holds most, of the tenant whose visitors hold most together."""
        of_tenant: Counter[str] = Counter()
        for visitor, size in self._bytes.items():
            of_tenant[self._tenants[visitor]] += size
        return max(self._bytes, key=lambda who: (of_tenant[self._tenants[who]], self._bytes[who]))

    def _drop_oldest(self, visitor: str) -> None:
        self._drop(visitor, next(iter(self._held[visitor])))

    def _drop(self, visitor: str, token: str) -> None:
        dropped = self._held.get(visitor, {}).pop(token, None)
        if dropped is None:
            return
        self._bytes[visitor] -= len(dropped.content)
        if not self._held[visitor]:
            self.forget(visitor)
