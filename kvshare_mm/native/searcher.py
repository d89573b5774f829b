"""Looking for donors by meaning, for requests that wait anyway, on a thread of its own."""

from __future__ import annotations

import queue

from kvshare_mm.modalities.one_core import start_on_one_core
from kvshare_mm.native.request import SlotRequest
from kvshare_mm.reuse.donors import DonorPool


class Searcher:
    """Args: donors: where to look; None: nowhere."""

    def __init__(self, donors: DonorPool | None) -> None:
        self._donors = donors
        self._requests: queue.SimpleQueue[SlotRequest | None] = queue.SimpleQueue()
        self._thread = start_on_one_core(self._run, "kvshare-search")

    def look(self, request: SlotRequest) -> None:
        """Tell a request its donors, unless it starts before."""
        self._requests.put(request)

    def close(self) -> None:
        """Finish what was asked, then stop."""
        self._requests.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (request := self._requests.get()) is not None:
            if request.slot < 0 and not request.cancelled and self._donors is not None:
                spec = request.spec
                request.similar = self._donors.reuse.similar(spec.text, spec.namespace)
