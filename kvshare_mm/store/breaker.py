"""Leaves a store alone for a while once it has failed a few times."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from kvshare_mm.errors import KVUnavailableError

logger = logging.getLogger(__name__)

_FAILURES = 3


class Breaker:
    """Counts failures of a shared store; after three in a row it is not asked. Thread-safe.

    Args:
        retry_after_s: seconds for which it is left alone then.
        failures: exceptions that say that it failed.
    """

    def __init__(self, retry_after_s: float, *failures: type[Exception]) -> None:
        self.down_until = 0.0
        self._retry_after_s = retry_after_s
        self._failing = failures
        self._lock = threading.Lock()
        self._failures = 0

    @contextmanager
    def use(self) -> Iterator[None]:
        """Ask the store inside. Raises KVUnavailableError("shared_down") if that fails, or has."""
        if time.monotonic() < self.down_until:
            raise KVUnavailableError("shared_down", "the shared store failed a moment ago")
        try:
            yield
        except self._failing as error:
            self._failed(error)
            raise KVUnavailableError("shared_down", f"the shared store failed: {error}") from error
        self._failures = 0

    def _failed(self, error: Exception) -> None:
        with self._lock:
            self._failures += 1
            if self._failures >= _FAILURES:
                self._failures = 0
                self.down_until = time.monotonic() + self._retry_after_s
                logger.warning(
                    "shared store: %s; left alone for %.0f s", error, self._retry_after_s
                )
