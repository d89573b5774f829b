"""A connection that is made at first use and left alone for a while after a failure."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from kvshare_mm.index.base import IndexLeftAloneError, IndexUnavailableError

logger = logging.getLogger(__name__)


class LazyClient:
    """Hands out one client to all threads and turns its failures into IndexUnavailableError.

    After a failure every use fails at once for `retry_after` seconds, so a dead server costs one
    timeout and not one per request. Then a new client is made: a server that was restarted may
    have to be told again what to load.

    Args:
        name: what the client talks to, for messages.
        connect: makes the client; may raise anything.
        disconnect: closes it.
        retry_after: seconds to leave it alone after a failure.
    """

    def __init__(
        self,
        name: str,
        connect: Callable[[], Any],
        disconnect: Callable[[Any], None],
        retry_after: float,
    ) -> None:
        self._name = name
        self._connect = connect
        self._disconnect = disconnect
        self._retry_after = retry_after
        self._lock = threading.Lock()
        self._client: Any = None
        self._closed = False
        self._down_until = 0.0

    @contextmanager
    def use(self, action: str) -> Iterator[Any]:
        """The client, connected if need be.

        Args:
            action: what is about to be done, for messages.

        Raises:
            IndexUnavailableError: anything was raised inside, with it as the cause; or the client
                is closed.
            IndexLeftAloneError: it failed a moment ago.
        """
        wait = self._down_until - time.monotonic()
        if wait > 0:
            raise IndexLeftAloneError(f"{self._name} failed; left alone for {wait:.1f} s more")
        client = None
        try:
            client = self._connected()
            yield client
        except IndexUnavailableError:
            raise
        # Client libraries raise their own errors, grpc's, and ValueError for a closed channel.
        except Exception as error:
            if self._drop(client):
                logger.warning(
                    "%s: %s: %s; left alone for %.0f s",
                    self._name, action, _reason(error), self._retry_after,
                )  # fmt: skip
            raise IndexUnavailableError(f"{self._name}: {action}: {error}") from error

    def close(self) -> None:
        """Disconnect; further use raises IndexUnavailableError."""
        with self._lock:
            client, self._client, self._closed = self._client, None, True
        self._shut(client)

    def _connected(self) -> Any:
        with self._lock:
            if self._closed:
                raise IndexUnavailableError(f"{self._name} is closed")
            if self._client is None:
                # Threads that waited here for an attempt that failed must not each make their own.
                if time.monotonic() < self._down_until:
                    raise IndexLeftAloneError(f"{self._name} failed a moment ago")
                try:
                    self._client = self._connect()
                except Exception:
                    self._down_until = time.monotonic() + self._retry_after
                    raise
            return self._client

    def _drop(self, client: Any) -> bool:
        """False: another thread has, and so closed it for this one, too."""
        with self._lock:
            if client is not self._client:
                return False
            self._down_until = time.monotonic() + self._retry_after
            self._client = None
        self._shut(client)
        return True

    def _shut(self, client: Any) -> None:
        if client is None:
            return
        try:
            self._disconnect(client)
        except Exception:
            logger.warning("%s: disconnecting failed", self._name, exc_info=True)


def _reason(error: Exception) -> str:
    details = getattr(error, "details", None)  # gRPC's: the first line of its text says nothing
    text = str(details() if callable(details) else error)
    return next(iter(text.splitlines()), type(error).__name__)
