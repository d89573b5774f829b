"""Which servers are behind a router: those of fixed URLs, and all addresses that names have."""

from __future__ import annotations

import asyncio
import itertools
import logging
import socket
from collections.abc import Awaitable, Callable, Sequence

import httpcore2

from kvshare_mm.apps.router.replicas import Replica, check
from kvshare_mm.errors import ConfigError

logger = logging.getLogger(__name__)

_CHECK_S = 1.0
_LOOKUP_S = 5.0
_DNS = "dns+"

Lookup = Callable[[str], Awaitable[Sequence[str]]]


class Fleet:
    """The replicas. For one event loop.

    Args:
        fixed: those that are always there, numbered from 1.
        names: like ``http://name:port``; every address that the name has is a replica.
        lookup: URLs of the addresses that such a name has. Raises OSError: nobody says.

    Attributes:
        replicas: those that are there now; the list is the same one for ever.
    """

    def __init__(
        self, fixed: Sequence[Replica], names: Sequence[str] = (), lookup: Lookup | None = None
    ) -> None:
        self.replicas = [*fixed]
        self._fixed = frozenset(r.origin for r in fixed)
        self._found: dict[str, frozenset[str]] = dict.fromkeys(names, frozenset())
        self._unknown: set[str] = set()
        self._lookup = lookup or addresses

    async def resolve(self) -> None:
        """Look the names up: new addresses become replicas, those that are gone are none any more.

        A name that nobody knows at the moment keeps the addresses that it had. A new replica gets
        the lowest number that is free: a server that was restarted at another address gets its old
        one back, and what is known of its store with it.
        """
        for name in self._found:
            try:
                async with asyncio.timeout(_LOOKUP_S):
                    self._found[name] = frozenset(await self._lookup(name))
                self._unknown.discard(name)
            except (OSError, UnicodeError) as error:
                self._told(name, f"{name} was not found: {str(error) or type(error).__name__}")
        there = self._fixed.union(*self._found.values())
        for gone in (r for r in self.replicas if r.origin not in there):
            logger.info("replica %d, %s, is gone", gone.number, gone.origin)
        self.replicas[:] = [r for r in self.replicas if r.origin in there]
        for origin in sorted(there.difference(r.origin for r in self.replicas)):
            taken = {r.number for r in self.replicas}
            try:
                new = Replica(next(n for n in itertools.count(1) if n not in taken), origin)
            except ConfigError as error:
                self._told(origin, f"{origin} cannot be asked: {error}")
                continue
            logger.info("replica %d is %s", new.number, new.origin)
            self.replicas.append(new)

    def _told(self, what: str, warning: str) -> None:
        if what not in self._unknown:
            logger.warning("%s", warning)
        self._unknown.add(what)

    async def watch(self, pool: httpcore2.AsyncConnectionPool) -> None:
        """Ask every replica every second whether it answers, and look names up every five; for
        ever."""

        async def one(replica: Replica) -> None:
            while replica in self.replicas:
                await check(replica, pool)
                await asyncio.sleep(_CHECK_S)

        watched: set[Replica] = set()
        async with asyncio.TaskGroup() as tasks:
            while True:
                for replica in set(self.replicas) - watched:
                    tasks.create_task(one(replica))
                watched = set(self.replicas)
                await asyncio.sleep(_LOOKUP_S)
                await self.resolve()


def fleet_of(urls: str, lookup: Lookup | None = None) -> Fleet:
    """Replicas of URLs with commas between them; `dns+` stands before names.

    Raises:
        ConfigError: one is no URL, or there twice.
    """
    given = [url.strip() for url in urls.split(",") if url.strip()]
    names = [Replica(0, url[len(_DNS) :]).origin for url in given if url.startswith(_DNS)]
    fixed = [url for url in given if not url.startswith(_DNS)]
    replicas = [Replica(number, url) for number, url in enumerate(fixed, 1)]
    if not given or len({*names, *(r.origin for r in replicas)}) < len(given):
        raise ConfigError("--replicas names at least one server, and none twice")
    for name in names:
        if not name.startswith("http:"):  # certificates are of names
            raise ConfigError(f"--replicas: dns+{name}: servers found by DNS are asked over http")
    return Fleet(replicas, names, lookup)


async def addresses(name: str) -> list[str]:
    """URLs of all addresses of ``http://name:port``; of IPv6 only if there are no others.

    Raises:
        OSError: there are none, or nobody says.
    """
    url = Replica(0, name).url("/")
    found = await asyncio.get_running_loop().getaddrinfo(
        url.host.decode(), url.port or 80, type=socket.SOCK_STREAM
    )
    # A pod of two stacks has one of each kind.
    family = socket.AF_INET if any(f[0] == socket.AF_INET for f in found) else socket.AF_INET6
    hosts = {str(f[4][0]) for f in found if f[0] == family}
    return [f"http://[{h}]:{url.port or 80}" if ":" in h else f"http://{h}:{url.port or 80}"
            for h in hosts]  # fmt: skip
