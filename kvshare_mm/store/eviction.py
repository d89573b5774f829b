"""Which nodes a tier holds, and which it gives up when it is full: shared by the tiers on one host.

The policy is a size-aware LRU. Each node is scored by ``age x bytes``, where its age is the number
of uses of other nodes since it was last used itself: the node that frees most for the least recent
use goes first, so that one big report nobody asks about goes before twenty small ones. Ages grow at
one pace, scores do not, so no order can be kept; only the `WINDOW` least recently used nodes are
scored, which bounds the cost of an eviction however many nodes there are.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

WINDOW = 64


@dataclass(frozen=True, slots=True)
class _Use:
    num_bytes: int
    tick: int


@dataclass(slots=True)
class _Pin:
    holders: int
    expires_s: float


class EvictionLedger:
    """Sizes, last uses and pins of the nodes in one tier. Not thread-safe: its tier locks.

    Parameters:
        max_bytes: budget of the tier; 0 holds nothing. `reserve` leaves a part of it to others.
        clock: seconds, monotonic; pins expire by it.

    Raises:
        ValueError: `max_bytes` is negative.
    """

    def __init__(self, max_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        if max_bytes < 0:
            raise ValueError(f"max_bytes is {max_bytes}; a tier needs a budget of 0 or more bytes")
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.reserved_bytes = 0
        self._clock = clock
        self._tick = 0
        self._uses: OrderedDict[str, _Use] = OrderedDict()  # least recently used first
        self._pins: dict[str, _Pin] = {}

    def __contains__(self, node_id: object) -> bool:
        return node_id in self._uses

    def __iter__(self) -> Iterator[str]:
        """Iterate over node ids, least recently used first."""
        return iter(self._uses)

    def __len__(self) -> int:
        return len(self._uses)

    def can_fit(self, node_id: str, num_bytes: int) -> bool:
        """Return whether a node of this size fits beside all the others that are pinned."""
        pinned = sum(
            self._uses[pinned_id].num_bytes
            for pinned_id in self._pins
            if pinned_id != node_id and pinned_id in self._uses and self._is_pinned(pinned_id)
        )
        return pinned + num_bytes <= self.max_bytes - self.reserved_bytes

    def admit(self, node_id: str, num_bytes: int) -> list[str]:
        """Enter a node, or its new size, as just used; evict others until it fits.

        Returns:
            Ids of the nodes that have to go: the evicted ones; or only `node_id`, if it cannot fit.
        """
        self.discard(node_id)
        if not self.can_fit(node_id, num_bytes):
            return [node_id]
        evicted = self._make_room(num_bytes)
        self._tick += 1
        self._uses[node_id] = _Use(num_bytes, self._tick)
        self.num_bytes += num_bytes
        return evicted

    def reserve(self, num_bytes: int) -> list[str]:
        """Leave so much of the budget to others; returns the ids of the nodes that have to go.
        Pinned ones stay, even beyond the budget."""
        self.reserved_bytes = num_bytes
        return self._make_room(0)

    def touch(self, node_id: str) -> None:
        """Mark a node as just used; an unknown id is ignored."""
        use = self._uses.get(node_id)
        if use is not None:
            self._tick += 1
            self._uses[node_id] = _Use(use.num_bytes, self._tick)
            self._uses.move_to_end(node_id)

    def discard(self, node_id: str) -> None:
        """Forget a node; an unknown id is ignored. Its pins wait for it to return."""
        use = self._uses.pop(node_id, None)
        if use is not None:
            self.num_bytes -= use.num_bytes

    def pin(self, node_id: str, ttl_s: float) -> None:
        """Keep a node from eviction until every `pin` is undone by `unpin`, or for `ttl_s` seconds.

        The time to live is for holders that die before they unpin. The node need not be here yet:
        one that is being moved between tiers is protected wherever it arrives.
        """
        now = self._clock()
        self._pins = {held: pin for held, pin in self._pins.items() if pin.expires_s > now}
        pin = self._pins.setdefault(node_id, _Pin(0, now))
        pin.holders += 1
        pin.expires_s = max(pin.expires_s, now + ttl_s)

    def unpin(self, node_id: str) -> None:
        """Undo one `pin`; a node that is not pinned is ignored."""
        pin = self._pins.get(node_id)
        if pin is not None:
            pin.holders -= 1
            if pin.holders == 0:
                del self._pins[node_id]

    def _make_room(self, num_bytes: int) -> list[str]:
        evicted = []
        while self.num_bytes + num_bytes > self.max_bytes - self.reserved_bytes:
            victim = self._victim()
            if victim is None:
                break
            self.discard(victim)
            evicted.append(victim)
        return evicted

    def _is_pinned(self, node_id: str) -> bool:
        pin = self._pins.get(node_id)
        return pin is not None and pin.expires_s > self._clock()

    def _victim(self) -> str | None:
        unpinned = (node_id for node_id in self._uses if not self._is_pinned(node_id))
        return max(islice(unpinned, WINDOW), key=self._score, default=None)

    def _score(self, node_id: str) -> int:
        use = self._uses[node_id]
        return (self._tick + 1 - use.tick) * use.num_bytes
