"""What is done behind the answers, one after the other, on a thread of its own."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable

from kvshare_mm.native.prefill import Prefiller
from kvshare_mm.native.request import SlotRequest

logger = logging.getLogger(__name__)


class Saver:
    """Saves are numbered as they are ordered and done in that order.

    Args:
        changed: the engine's lock. It guards the numbers, and is told when a save is done.

    Attributes:
        done: number of the last save that is done.
        ordered: number of the last save.
        last: number of the last save of each namespace that may not be done yet.
    """

    def __init__(self, changed: threading.Condition) -> None:
        self.done = 0
        self.last: dict[str, int] = {}
        self._changed = changed
        self.ordered = 0
        self._orders: queue.SimpleQueue[tuple[Callable[[], None], str] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="kvshare-save", daemon=True)
        self._thread.start()

    def order(self, save: Callable[[], None], ns: str | None = None) -> None:
        """Have something saved. Lock held.

        Args:
            save: does it, and raises nothing.
            ns: whose next requests shall wait for it; None: nobody's.
        """
        self.ordered += 1
        if ns is not None:
            self.last[ns] = self.ordered
        self._orders.put((save, ns or ""))

    @property
    def idle(self) -> bool:
        """Whether all is done. Lock held."""
        return self.done == self.ordered

    def close(self) -> None:
        """Do what is ordered, then stop."""
        self._orders.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (order := self._orders.get()) is not None:
            save, ns = order
            save()
            with self._changed:
                self.done += 1
                if self.last.get(ns) == self.done:
                    del self.last[ns]
                self._changed.notify_all()


def save_request(
    prefiller: Prefiller,
    counters: Counter[str],
    request: SlotRequest,
    release: Callable[[SlotRequest], None] | None = None,
) -> None:
    """Make a request in its slot a donor; raises nothing.

    Args:
        counters: events by name are counted here.
        release: is told when the slot of an answered request was read; None: it is still being
            answered, and its prompt is stored.
    """
    over = release is not None
    start = time.perf_counter()
    try:
        assert request.prefill is not None
        request.node_id = prefiller.save(
            request.slot,
            request.spec.stream,
            request.spec.namespace,
            request.prefill,
            request.token_ids[:-1] if over else (),
            request.spec.text,
            request.node_id,
            over,
        )
        if request.audit is not None:
            request.audit.node_id = request.node_id
    except Exception:
        # A cache problem is never a request's problem.
        counters["save_failed"] += over
        logger.exception("could not take up %s as a donor", request.request_id)
    finally:
        counters["save_us"] += int(1e6 * (time.perf_counter() - start))
        if release is not None:
            release(request)
