"""How far a thread has got with what it is given."""

from __future__ import annotations

import threading


class Backlog:
    """Counts what a thread is given and does, in that order. Thread-safe.

    Args:
        given: what it has to do from the start.
    """

    def __init__(self, given: int = 0) -> None:
        self._given = given
        self._done = 0
        self._changed = threading.Condition()

    def give(self) -> None:
        """One more is about to be given."""
        with self._changed:
            self._given += 1

    def did(self, count: int = 1) -> None:
        """So many were done, or have failed."""
        with self._changed:
            self._done += count
            self._changed.notify_all()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for what was given so far, however much is given meanwhile; False: time ran out."""
        timeout_s = None if timeout_s is None else min(timeout_s, threading.TIMEOUT_MAX)
        with self._changed:
            last = self._given
            return self._changed.wait_for(lambda: self._done >= last, timeout_s)
