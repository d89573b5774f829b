"""Which nodes a tier holds, and which it gives up when it is full: shared by the tiers on one host.

The policy is LFU with dynamic aging (Arlitt et al., "Evaluating content management techniques for
Web proxy caches", 2000). The node of the lowest priority goes: how often it was used, up to
`MOST_USES`, above the priority of what had gone when it was used last. So what many borrow from
outlives its borrowers, and what nobody needs any more stays for `MOST_USES` turnovers of the tier
at most: with more, templates of skewed popularity gain, but sessions that are over keep the room
of those that go on. Sizes do not count: what a node saves is as large as what it takes.
"""

from __future__ import annotations

import heapq
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

MOST_USES = 4


@dataclass(frozen=True, slots=True)
class _Use:
    num_bytes: int
    count: int
    priority: int
    tick: int  # of the last


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
        self._floor = 0  # the highest priority that had to go
        # Priority, tick and id of every use; those that were not a node's last are passed over.
        self._heap: list[tuple[int, int, str]] = []
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
        before = self._uses.get(node_id)
        self.discard(node_id)
        if not self.can_fit(node_id, num_bytes):
            return [node_id]
        evicted = self._make_room(num_bytes)
        self._use(node_id, num_bytes, before.count if before else 1)
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
            self._use(node_id, use.num_bytes, min(use.count + 1, MOST_USES))

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

    def _use(self, node_id: str, num_bytes: int, count: int) -> None:
        """Enter a node's use, which is the `count`th that counts."""
        self._tick += 1
        use = self._uses[node_id] = _Use(num_bytes, count, self._floor + count, self._tick)
        self._uses.move_to_end(node_id)
        heapq.heappush(self._heap, (use.priority, use.tick, node_id))
        if len(self._heap) > 2 * len(self._uses) + 64:
            self._heap = [(u.priority, u.tick, held) for held, u in self._uses.items()]
            heapq.heapify(self._heap)

    def _make_room(self, num_bytes: int) -> list[str]:
        evicted: list[str] = []
        stay = []
        while self._heap and self.num_bytes + num_bytes > self.max_bytes - self.reserved_bytes:
            entry = priority, tick, node_id = heapq.heappop(self._heap)
            use = self._uses.get(node_id)
            if use is None or use.tick != tick:
                continue
            if self._is_pinned(node_id):
                stay.append(entry)
                continue
            self._floor = max(self._floor, priority)  # that of one that was pinned may be lower
            self.discard(node_id)
            evicted.append(node_id)
        for entry in stay:
            heapq.heappush(self._heap, entry)
        return evicted

    def _is_pinned(self, node_id: str) -> bool:
        pin = self._pins.get(node_id)
        return pin is not None and pin.expires_s > self._clock()
