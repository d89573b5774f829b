"""Who is next: waiting requests of several tenants, each of which gets the same share of the work.

The virtual token counter of "Fairness in Serving Large Language Models" (Sheng et al., OSDI 2024,
arXiv 2401.00588): what a tenant was served is counted in tokens as they are computed, and next is
the one that had least. Unlike rounds with a deficit it needs no guess of how long an answer will
be. Who comes back after a pause begins where the others are: nobody saves up for a burst.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

from kvshare_mm.errors import QueueFullError

T = TypeVar("T")

PROMPT_TOKEN, ANSWER_TOKEN = 1, 2
"""What a computed token counts; those of answers take longer (the paper's weights)."""


def has_room(own: int, total: int, num_tenants: int, most: int) -> bool:
    """Whether a tenant may take one more of what all share.

    Where others have taken all, a tenant that has less than its share may take one more. Twice as
    many are never taken.

    Args:
        own: what it has.
        total: what all have.
        num_tenants: how many have something, this one counted.
        most: of all together.
    """
    return total < most or (own < max(1, most // num_tenants) and total < 2 * most)


class FairQueue(Generic[T]):
    """Waiting requests by tenant. Not thread-safe: the engine's lock guards it.

    Args:
        max_waiting: requests that may wait, see `has_room`.
    """

    def __init__(self, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self._waiting: dict[str, deque[T]] = {}
        self._served: dict[str, int] = {}
        self._floor = 0  # what the waiting tenants had at least when one was last chosen
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[T]:
        """All that wait, by tenant."""
        return (request for waiting in self._waiting.values() for request in waiting)

    def add(self, tenant: str, request: T) -> None:
        """Put a request behind the others of its tenant.

        Raises:
            QueueFullError: too many wait.
        """
        own = len(self._waiting.get(tenant, ()))
        if not has_room(own, self._size, len({*self._waiting, tenant}), self._max_waiting):
            raise QueueFullError(f"{self._size} requests are waiting already; try again later")
        if not own:
            self._begin(tenant)
        self._waiting[tenant].append(request)
        self._size += 1

    def next(self, ready: Callable[[T], bool]) -> T | None:
        """A request that can start, of the tenant that was served least: see `choose`."""
        # Of equal ones, who has waited longest since the last time that nothing of theirs waited.
        for tenant in sorted(self._waiting, key=lambda t: self._served[t]):
            able = list(filter(ready, self._waiting[tenant]))
            if able:
                self._floor = max(self._floor, min(self._served[t] for t in self._waiting))
                return self.choose(able)
        return None

    def choose(self, able: Sequence[T]) -> T:
        """Of a tenant's requests that can start, longest waiting first, the one that does."""
        return able[0]

    def remove(self, tenant: str, request: T) -> None:
        """A request starts, or is given up."""
        waiting = self._waiting[tenant]
        waiting.remove(request)
        self._size -= 1
        if not waiting:
            del self._waiting[tenant]

    def charge(self, tenant: str, amount: int) -> None:
        """Something was computed for a tenant."""
        self._served[tenant] = self._served.get(tenant, self._floor) + amount

    def clear(self) -> None:
        self._waiting.clear()
        self._size = 0

    def _begin(self, tenant: str) -> None:
        self._waiting[tenant] = deque()
        self._served[tenant] = max(self._served.get(tenant, 0), self._floor)
        # Who has had no more than everybody begins at the floor anyway.
        for idle in [t for t, n in self._served.items() if n <= self._floor]:
            if idle not in self._waiting:
                del self._served[idle]
