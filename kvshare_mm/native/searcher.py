"""Looking for donors for requests that wait, each kind of search on a thread of its own."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable

from kvshare_mm.modalities.one_core import start_on_one_core
from kvshare_mm.native.prefill import Prefiller, PrefillResult
from kvshare_mm.native.request import SlotRequest
from kvshare_mm.reuse.donors import DonorPool

logger = logging.getLogger(__name__)

# Of the time that computing a prompt takes, what it may wait in vain for other replicas' word.
_PATIENCE = 0.02


class Searcher:
    """One kind of search.

    Args:
        search: looks for donors of a request that has not started.
        name: of the thread.
    """

    def __init__(self, search: Callable[[SlotRequest], None], name: str) -> None:
        self._search = search
        self._requests: queue.SimpleQueue[SlotRequest | None] = queue.SimpleQueue()
        self._thread = start_on_one_core(self._run, name)

    def look(self, request: SlotRequest) -> None:
        """Tell a request its donors, unless it starts before."""
        self._requests.put(request)

    def close(self) -> None:
        """Finish what was asked, then stop."""
        self._requests.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (request := self._requests.get()) is not None:
            if request.slot < 0 and not request.cancelled:
                try:
                    self._search(request)
                except Exception:
                    # A cache problem is never a request's problem.
                    logger.exception("looking for donors of %s failed", request.request_id)


class Searches:
    """What is searched for requests before they start: donors by meaning, where they wait anyway,
    and donors of other replicas, for which they wait a little.

    Args:
        donors: this engine's; None: nothing is searched.
        prefiller: plans with them.
        changed: the engine's lock.
        help_s: longest that a request waits to hear whether other replicas have a donor for it,
            unless it takes long to compute.
    """

    def __init__(
        self,
        donors: DonorPool | None,
        prefiller: Prefiller,
        changed: threading.Condition,
        help_s: float,
    ) -> None:
        self._donors = donors
        self._prefiller = prefiller
        self._changed = changed
        self._help_s = help_s
        self._meaning = Searcher(self._by_meaning, "kvshare-search")
        self._shared = donors.shared if donors is not None else None
        self._elsewhere = (
            None if self._shared is None else Searcher(self._at_others, "kvshare-shared")
        )

    def hold(self, request: SlotRequest) -> None:
        """Have a request wait for other replicas. Lock held."""
        if self._shared is not None:
            patience = _PATIENCE * self._shared.seconds(len(request.spec.stream))
            request.help_until = time.perf_counter() + max(self._help_s, patience)

    def look(self, request: SlotRequest, must_wait: bool) -> None:
        """Search for a request that was queued; `must_wait`: for a slot."""
        if must_wait and request.spec.options.reuse == "similar":
            self._meaning.look(request)
        if request.help_until and self._elsewhere is not None:
            self._elsewhere.look(request)

    def computed(self, result: PrefillResult) -> None:
        """So long it took to compute a prompt."""
        if self._shared is not None:
            self._shared.computed(result.plan.num_computed, result.compute)

    def close(self) -> None:
        """Finish what was asked, then stop."""
        for searcher in (self._meaning, self._elsewhere):
            if searcher is not None:
                searcher.close()

    def _by_meaning(self, request: SlotRequest) -> None:
        if self._donors is not None:
            spec, reuse = request.spec, self._donors.reuse
            overlap = reuse.catalogue.overlap(spec.namespace, spec.stream.align_keys)
            with self._changed:
                request.overlap = max(request.overlap, overlap)
            request.similar = reuse.similar(spec.text, spec.namespace)

    def _at_others(self, request: SlotRequest) -> None:
        """Take over others' donors; the request waits as long as that is faster than computing."""

        def more_time(seconds: float) -> bool:
            with self._changed:
                now = time.perf_counter()
                if request.slot >= 0 or request.cancelled or request.help_until < now:
                    return False
                request.help_until = now + seconds
                return True

        try:
            if request.help_until > time.perf_counter():
                spec, asked = request.spec, request.spec.options
                self._prefiller.bring(
                    spec.stream,
                    spec.namespace,
                    asked.reuse or "similar",
                    asked.policy,
                    request.similar,
                    more_time,
                )
        finally:
            with self._changed:
                request.help_until = 0.0
                self._changed.notify_all()
