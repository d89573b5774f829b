"""How fast the queue moves."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

# Answers that tell how fast places in the queue get free.
_RECENT = 32
_LONGEST_S = 60.0


class Pace:
    """Seconds from the end of one answer to that of the next: then a place in the queue is free.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last = clock()
        self._gaps: deque[float] = deque(maxlen=_RECENT)

    def ended(self, ran: float) -> None:
        """An answer is done that ran so many seconds. Time in which nothing ran does not count."""
        now = self._clock()
        self._gaps.append(min(now - self._last, ran))
        self._last = now

    @property
    def seconds(self) -> float:
        """As the last answers have ended; 1 before there were any."""
        return min(_LONGEST_S, sum(self._gaps) / len(self._gaps)) if self._gaps else 1.0
