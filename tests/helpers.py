"""What tests of several folders use."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any


class Clock:
    """A clock that only a test moves."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait for a condition; the limit is for a broken program, not a measurement."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)


def in_threads(work: Callable[[Any], object], arguments: Sequence[Any]) -> None:
    """Do the work for all arguments at once; what one of them raises is raised here."""
    with ThreadPoolExecutor(len(arguments)) as pool:
        list(pool.map(work, arguments))
