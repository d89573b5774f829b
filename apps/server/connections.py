"""Connections are counted from their acceptance on, whatever is or is not said over them."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Gauge
from prometheus_client import Counter as MetricCounter

logger = logging.getLogger(__name__)

# Files that are no connections: the store's, the model's, pipes, media that are fetched, and
# connections that were refused and are still to be closed.
_OTHER_FILES = 160
_MOST_FAREWELLS = 32
# What is read of one of those (a whole body), for how long, and at once.
_MOST_UNREAD, _FAREWELL_S, _PIECE = 64 << 20, 1.0, 1 << 16
_FEWEST = 16
_QUIET_S = 60.0


class Connections:
    """How many connections are open, in all and by client.

    Args:
        most: connections in all.
        most_of_client: connections of one address; of one /64 with IPv6, which is what a client
            of it owns.
        registry: where they are counted.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        most: int,
        most_of_client: int,
        registry: CollectorRegistry,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.most = most
        self.most_of_client = most_of_client
        self._open: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._said = OnceAMinute(clock)
        gauge = Gauge("kvshare:connections", "Open connections of clients.", registry=registry)
        gauge.set_function(lambda: self.num_open)
        self._refused = MetricCounter(
            "kvshare:connections_refused",
            "Connections closed at once: too many in all, or of one client.",
            ["bound"],
            registry=registry,
        )

    @property
    def num_open(self) -> int:
        with self._lock:
            return self._open.total()

    def admit(self, client: str) -> bool:
        """Count a new connection, or refuse it."""
        with self._lock:
            if self._open.total() >= self.most:
                bound, option = "all", f"--max-connections {self.most}"
            elif self._open[client] >= self.most_of_client:
                bound, option = "client", f"--max-connections-per-client {self.most_of_client}"
            else:
                self._open[client] += 1
                return True
        self._refused.labels(bound).inc()
        self._said(f"connections are refused, the last one of {client}: {option}")
        return False

    def release(self, client: str) -> None:
        """A connection has ended."""
        with self._lock:
            self._open[client] -= 1
            if not self._open[client]:
                del self._open[client]


class Listener(socket.socket):
    """A listening socket that accepts no more connections than may be open.

    Only asyncio's own loops ask it; uvloop accepts by itself.

    Args:
        listening: a bound socket; this one takes its place.
        connections: what may be open.
        farewell: sent to clients that are refused.
    """

    def __init__(
        self, listening: socket.socket, connections: Connections, farewell: bytes = b""
    ) -> None:
        super().__init__(listening.family, listening.type, listening.proto, listening.detach())
        self._connections = connections
        self._farewell = farewell
        self._farewells = 0  # of connections that are still to be closed

    def accept(self) -> tuple[socket.socket, Any]:
        """The next connection.

        Raises:
            ConnectionAbortedError: it was refused. The loop comes back for more, after others.
        """
        connection, address = super().accept()
        client = client_of(address[0])
        if self._connections.admit(client):
            return _Accepted(connection, lambda: self._connections.release(client)), address
        connection.setblocking(False)
        try:
            connection.send(self._farewell)
            connection.shutdown(socket.SHUT_WR)
        except OSError as error:
            logger.debug("%s went before it was refused: %s", client, error)
            connection.close()
        else:
            self._close_later(connection)
        raise ConnectionAbortedError(f"too many connections, or too many of {client}")

    def _close_later(self, connection: socket.socket) -> None:
        """Close a refused connection once its client has: what it still sends would make the kernel
        reset it at once, and the farewell be lost."""
        if self._farewells >= _MOST_FAREWELLS:
            connection.close()
            return
        self._farewells += 1
        loop = asyncio.get_running_loop()
        left = _MOST_UNREAD

        def read() -> None:
            nonlocal left
            try:
                taken = len(connection.recv(_PIECE))
            except BlockingIOError:
                return
            except OSError:
                taken = 0
            left -= taken
            if not taken or left <= 0:
                end()

        def end() -> None:
            timer.cancel()
            loop.remove_reader(connection)
            connection.close()
            self._farewells -= 1

        timer = loop.call_later(_FAREWELL_S, end)
        loop.add_reader(connection, read)


class _Accepted(socket.socket):
    """A connection that says when it is closed."""

    def __init__(self, connection: socket.socket, on_close: Callable[[], None]) -> None:
        super().__init__(connection.family, connection.type, connection.proto, connection.detach())
        self._on_close: Callable[[], None] | None = on_close

    def close(self) -> None:
        super().close()
        on_close, self._on_close = self._on_close, None
        if on_close is not None:
            on_close()


class OnceAMinute:
    """Writes a warning at most once a minute, with how many were not written.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._next = float("-inf")
        self._left_out = 0

    def __call__(self, message: str) -> None:
        now = self._clock()
        if now < self._next:
            self._left_out += 1
            return
        logger.warning("%s (%d more in the last minute)", message, self._left_out)
        self._next = now + _QUIET_S
        self._left_out = 0


def quiet_about_files(loop: asyncio.AbstractEventLoop) -> None:
    """Say once a minute, not with each attempt, that no connection can be accepted."""
    said = OnceAMinute()

    def handler(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if "socket.accept()" in context.get("message", ""):
            said(f"connections cannot be accepted: {context.get('exception')}")
        else:
            loop.default_exception_handler(context)

    loop.set_exception_handler(handler)


def room_for(most: int, files_each: int = 1, others: int = 0) -> int:
    """How many connections fit into what this process may open; its limit is raised if need be.

    Args:
        most: connections that are wanted.
        files_each: open files for one of them.
        others: files beside them, and beside what any server has.
    """
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return most
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    others += _OTHER_FILES
    wanted = files_each * most + others
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    fitting = max(_FEWEST, (allowed - others) // files_each)
    if fitting < most:
        logger.warning(
            "at most %d connections instead of %d: this process may open %d files (ulimit -n)",
            fitting,
            most,
            hard,
        )
    return min(most, fitting)


def client_of(address: str) -> str:
    """Whose an address is: who has one of IPv6 has the 2**64 beside it too."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if ip.version == 4:
        return str(ip)
    if ip.ipv4_mapped is not None:
        return str(ip.ipv4_mapped)
    return str(ipaddress.ip_network((ip, 64), strict=False))
