"""Search by meaning, kept off the critical path: one thread opens, embeds, inserts and removes.

What may be reused is shared tokens, which the lexical index finds in a fraction of a millisecond;
embedding a prompt takes tens. So new donors are embedded after they were served, and a new prompt
only while it waits for its turn anyway. A failing index costs this help and nothing else.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from kvshare_mm.errors import ModelLoadError
from kvshare_mm.index.base import (
    DenseIndex,
    IndexLeftAloneError,
    IndexRecord,
    IndexUnavailableError,
)
from kvshare_mm.modalities.backlog import Backlog
from kvshare_mm.modalities.one_core import start_on_one_core

logger = logging.getLogger(__name__)

Embed = Callable[[str], np.ndarray]
Opened = tuple[DenseIndex, Embed]


class SemanticIndex:
    """Dense search over stored prompts.

    Args:
        open_index: makes the index, which may connect later, and loads the embedder; called once,
            on the index's own thread. How long an index that fails is left alone is its own affair.
        known: records that the index must hold from the start; what it lacks of them is added.
        on_embedded: told every new vector, so that it can be stored with the node.
        counters: events are counted here.
    """

    def __init__(
        self,
        open_index: Callable[[], Opened],
        known: Sequence[IndexRecord],
        on_embedded: Callable[[str, np.ndarray], object],
        counters: Counter[str],
    ) -> None:
        self._open_index = open_index
        self._known = list(known)
        self._on_embedded = on_embedded
        self._counters = counters
        self._opened: Opened | None = None
        self._ready = False
        self._pending: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._backlog = Backlog(1)  # opening
        self._giving = threading.Lock()
        self._flush_is_last = False  # of what was given
        self._closed = False
        self._thread = start_on_one_core(self._run, "kvshare-semantic")

    def add(self, record: IndexRecord, text: str) -> None:
        """Embed `text` and index the record, some time later."""
        if not self._put(lambda: self._apply((record, text))):
            self._counters["dense_insert_closed"] += 1

    def remove(self, node_id: str) -> None:
        """Forget a node, some time later."""
        if not self._put(lambda: self._apply(node_id)):
            self._counters["dense_remove_closed"] += 1

    def search(self, namespace: str, text: str, limit: int) -> tuple[str, ...]:
        """Ids of similar donors; empty if the index is not ready or fails."""
        if self._opened is None or not self._ready:
            return ()
        index, embed = self._opened
        try:
            found = index.search_dense(namespace, embed(text), limit)
        except Exception as error:  # an embedder may raise anything, and this is only a help
            self._count("dense_search_failed", error)
            return ()
        return tuple(candidate.node_id for candidate in found)

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until everything given so far is searchable; False if time ran out."""
        # By the index's own thread. Here it would take as long as an index that hangs, and one that
        # was told to be quick would be given up, for others too, because somebody had little time.
        if not self._flush_is_last:  # however many wait
            self._put(self._flush)
        return self._backlog.wait(timeout_s)

    def close(self) -> None:
        """Finish what was given, then stop; what comes later is counted and dropped."""
        with self._giving:
            self._closed = True
            self._pending.put(None)
        self._thread.join()
        if self._opened is not None:
            self._try("dense_close_failed", self._opened[0].close)

    def _put(self, work: Callable[[], None]) -> bool:
        """False: nobody would do it any more, and who waited for it would wait for ever."""
        with self._giving:
            if not self._closed:
                self._backlog.give()
                self._pending.put(work)
                self._flush_is_last = work == self._flush
            return not self._closed

    def _run(self) -> None:
        self._finished(self._open)
        while (work := self._pending.get()) is not None:
            self._finished(work)

    def _finished(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception:
            # This thread must live: whatever went wrong concerns one record.
            self._counters["dense_insert_failed"] += 1
            logger.exception("dense index: a record was not taken up")
        finally:
            self._backlog.did()

    def _open(self) -> None:
        try:
            self._opened = self._open_index()
        except ModelLoadError as error:
            self._count("dense_open_failed", error)
        else:
            self._catch_up()

    def _catch_up(self) -> None:
        """Make the index hold what is known, once it can be reached."""
        if self._opened is None or self._ready:
            return
        try:
            self._opened[0].reconcile(self._known)
        except IndexLeftAloneError:
            return
        except IndexUnavailableError as error:
            self._count("dense_open_failed", error)
        else:
            self._ready, self._known = True, []

    def _apply(self, item: tuple[IndexRecord, str] | str) -> None:
        self._catch_up()
        if self._opened is None or not self._ready:
            if isinstance(item, str):
                self._known = [r for r in self._known if r.node_id != item]
            else:
                self._counters["dense_insert_skipped"] += 1
            return
        index, embed = self._opened
        if isinstance(item, str):
            self._try("dense_remove_failed", lambda: index.remove([item]))
            return
        record, text = item
        embedding = embed(text)
        self._on_embedded(record.node_id, embedding)
        self._try("dense_insert_failed", lambda: index.add([replace(record, embedding=embedding)]))

    def _flush(self) -> None:
        with self._giving:
            self._flush_is_last = False
        if self._opened is not None and self._ready:
            self._try("dense_flush_failed", self._opened[0].flush)

    def _try(self, reason: str, call: Callable[[], object]) -> None:
        try:
            call()
        except IndexUnavailableError as error:
            self._count(reason, error)

    def _count(self, reason: str, error: Exception) -> None:
        if not self._counters[reason]:
            logger.warning("%s: %s (further ones are only counted)", reason, error)
        self._counters[reason] += 1
