"""Requests that wait: for a slot, for a save, for a long prompt that is being computed.

Of a tenant's requests the one starts first that is expected to reuse most: it is soon done, and its
donor is at hand. Whoever is overtaken loses no more time than its own prompt takes in full, and is
overtaken a few times at most.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence

from kvshare_mm.native.fair_queue import FairQueue
from kvshare_mm.native.request import SlotRequest
from kvshare_mm.native.saver import Saver

# Requests that overtake one at most: what computes nearly nothing takes a slot for its answer.
_MOST_OVERTAKE = 8


class WaitingRequests(FairQueue[SlotRequest]):
    """Not thread-safe: the engine's lock guards it.

    Args:
        max_waiting: requests that may wait, see `has_room`.
        saver: whose saves are waited for.
        chunk: most positions of a prompt that are computed at once.
    """

    # Longest that a request waits for a donor that is being saved before it does without, seconds.
    MAX_HOLD_S = 0.5

    def __init__(self, max_waiting: int, saver: Saver, chunk: int) -> None:
        super().__init__(max_waiting)
        self._saver = saver
        self._chunk = chunk

    def hold(self, request: SlotRequest, save: int) -> None:
        """Have a request wait until a save is done."""
        request.after, request.held = save, time.perf_counter()

    def choose(self, able: Sequence[SlotRequest]) -> SlotRequest:
        best, most, room = able[0], 0.0, math.inf
        for request in able:
            length, expected = len(request.spec.stream), request.expected_tokens
            if expected <= room and length - expected > most:
                best, most = request, length - expected
            left = length - request.overtaken
            room = min(room, left if left >= length / _MOST_OVERTAKE else -1)
        return best

    def start(self, request: SlotRequest) -> None:
        """Take out a request that starts."""
        tenant = request.spec.options.tenant
        for earlier in itertools.takewhile(lambda r: r is not request, self._waiting[tenant]):
            least = len(earlier.spec.stream) / _MOST_OVERTAKE
            earlier.overtaken += max(request.expected_tokens, least)
        self.remove(tenant, request)

    @property
    def gone(self) -> list[SlotRequest]:
        """Those that nobody waits for any more."""
        return [r for r in self if r.cancelled]

    def drop_gone(self) -> list[SlotRequest]:
        """Take them out."""
        gone = self.gone
        for request in gone:
            self.remove(request.spec.options.tenant, request)
        return gone

    @property
    def longest_s(self) -> float:
        """Seconds after which one of those held may start although nobody tells."""
        now = time.perf_counter()
        waits = [r.help_until - now for r in self if r.help_until > now]
        return max(0.0, min([self.MAX_HOLD_S, *waits]))

    def first(self, active: Sequence[SlotRequest]) -> SlotRequest | None:
        """The request that starts next beside those in slots, if one can."""
        now = time.perf_counter()
        latest = now - self.MAX_HOLD_S
        prefilling = [r for r in active if r.prefill is None]
        return self.next(
            lambda r: (
                r.help_until <= now
                and (r.after <= self._saver.done or r.held <= latest)
                and (not prefilling or self._passes(r, *prefilling))
            )
        )

    def _passes(self, request: SlotRequest, long: SlotRequest, *others: SlotRequest) -> bool:
        """Whether a request of one chunk, as far as it is computed, may come between those of a
        long prompt, or of one that is far from done: one at a time, and none that had better wait
        and reuse it."""
        few, left = request.expected_tokens, long.computing.left if long.computing else 0
        fits = few <= self._chunk and (self._chunk < len(long.spec.stream) or 2 * few <= left)
        return fits and not others and not request.is_like(long)
