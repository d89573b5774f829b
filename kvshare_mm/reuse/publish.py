"""Gives a replica's donors to others, and takes them back, behind the answers."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from enum import Enum
from typing import Any

from kvshare_mm.errors import KVUnavailableError
from kvshare_mm.index.base import IndexUnavailableError
from kvshare_mm.index.shared import Fingerprints, SharedCatalogue
from kvshare_mm.modalities.backlog import Backlog
from kvshare_mm.node import Node
from kvshare_mm.store.base import StoredNode
from kvshare_mm.store.shared import SharedTier

logger = logging.getLogger(__name__)

_MAX_QUEUED, _BATCH = 256, 16
_PURGE_S = 60.0
_RETRY_S = 5.0
_LAST_S = 0.1  # for a thread that has nothing left to do


class _Do(Enum):
    PUBLISH = "publish"
    WITHDRAW = "withdraw"
    CHECK = "check"


_Order = tuple[_Do, str, str]
"""What to do with the node of an id and a namespace."""


class Publisher:
    """A thread that writes to the store and the catalogue that replicas share.

    What fails because one of them is down is done later where it must be: deletions, and rows of
    donors whose KV was written. A donor whose KV was not is published with the next that borrows
    from it.

    Args:
        stored: gives a donor with its KV. Raises KVUnavailableError.
        tier: KV of all replicas.
        catalogue: rows of all.
        fingerprints: of a namespace. Raises KVUnavailableError.
        foreign: ids of donors here that other replicas made.
        counters: events by name are counted here.

    Attributes:
        withdrawn: ids of nodes that were withdrawn and are shared still.
    """

    def __init__(
        self,
        stored: Callable[[str, str], StoredNode],
        tier: SharedTier,
        catalogue: SharedCatalogue,
        fingerprints: Callable[[str], Fingerprints],
        foreign: set[str],
        counters: Counter[str],
    ) -> None:
        self.withdrawn: set[str] = set()
        self._stored = stored
        self._tier = tier
        self._catalogue = catalogue
        self._fingerprints = fingerprints
        self._foreign = foreign
        self._counters = counters
        self._queue: queue.SimpleQueue[_Order | None] = queue.SimpleQueue()
        self._backlog = Backlog()
        self._rows: dict[str, dict[str, Any]] = {}  # to be added, by node
        self._unlisted: set[str] = set()  # whose rows are to be removed
        self._doubted: dict[str, str] = {}  # namespaces of nodes whose KV may be gone
        self._deleted: dict[str, str] = {}  # namespaces of nodes whose KV is to be deleted
        self._closing = threading.Event()
        self._giving = threading.Lock()
        self._over = False  # the thread takes no more orders
        self._purged = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="kvshare-publish", daemon=True)
        self._thread.start()

    def publish(self, node_id: str, ns: str) -> None:
        """Share a donor, or its new version, some time later."""
        if self._queue.qsize() >= _MAX_QUEUED:
            self._counters["shared_write_queue_full"] += 1
        else:
            self._order(_Do.PUBLISH, node_id, ns)

    def withdraw(self, node_id: str, ns: str) -> None:
        """Share a donor no longer. Replicas that have taken it over keep it."""
        self.withdrawn.add(node_id)
        self._order(_Do.WITHDRAW, node_id, ns)

    def check(self, node_id: str, ns: str) -> None:
        """Remove the row of a node if its KV is gone."""
        if self._queue.qsize() < _MAX_QUEUED:
            self._order(_Do.CHECK, node_id, ns)

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until all that was given so far was done, or has failed; False: time ran out."""
        return self._backlog.wait(timeout_s)

    def close(self, timeout_s: float) -> None:
        """Do what is left, for so many seconds at most, then stop."""
        until = time.monotonic() + timeout_s
        self.flush(timeout_s)
        self._closing.set()
        self._queue.put(None)
        self._thread.join(max(_LAST_S, until - time.monotonic()))
        if self._deleted:
            logger.warning("%d deleted donors stay shared until they expire", len(self._deleted))

    def _order(self, do: _Do, node_id: str, ns: str) -> None:
        with self._giving:
            if not self._over:
                self._backlog.give()
                self._queue.put((do, node_id, ns))
            else:
                self._dropped(do, node_id, ns)

    @property
    def _late(self) -> bool:
        return bool(self._rows or self._unlisted or self._deleted or self._doubted)

    def _run(self) -> None:
        while not self._closing.is_set():
            orders: list[_Order | None] = []
            with suppress(queue.Empty):
                orders.append(self._queue.get(timeout=_RETRY_S if self._late else None))
                while len(orders) < _BATCH:
                    orders.append(self._queue.get_nowait())
            for order in orders:
                if order is not None:
                    self._tried(self._take, *order)
            self._tried(self._write)
            self._backlog.did(sum(order is not None for order in orders))
        self._drop()

    def _tried(self, step: Callable[..., None], *given: Any) -> None:
        try:
            step(*given)
        except Exception:
            self._counters["shared_error"] += 1
            logger.exception("shared donors: not published")

    def _drop(self) -> None:
        """Nobody shall wait for what there was no time for, or for what comes after the end."""
        with self._giving, suppress(queue.Empty):
            self._over = True
            while True:
                if (order := self._queue.get_nowait()) is not None:
                    self._dropped(*order)
                    self._backlog.did()

    def _dropped(self, do: _Do, node_id: str, ns: str) -> None:
        if do is _Do.WITHDRAW:
            self._deleted[node_id] = ns
        self._counters["shared_write_closed"] += 1

    def _take(self, do: _Do, node_id: str, ns: str) -> None:
        """Carry out an order, but for what `_write` does."""
        try:
            if do is _Do.WITHDRAW:
                self._rows.pop(node_id, None)
                self._unlisted.add(node_id)
                self._deleted[node_id] = ns
            elif do is _Do.CHECK:
                self._doubted[node_id] = ns
            else:
                prints = self._fingerprints(ns)
                for node in self._put(node_id, ns):
                    if (row := self._catalogue.row(node, prints)) is not None:
                        self._rows[node.node_id] = row
        except KVUnavailableError as error:
            self._counters[f"shared_write_{error.reason}"] += 1
        while len(self._rows) > _MAX_QUEUED:
            del self._rows[next(iter(self._rows))]
            self._counters["shared_write_queue_full"] += 1

    def _write(self) -> None:
        """Delete KV, and bring the catalogue up to date; what fails is left for the next time."""
        gone: set[str] = set()
        try:
            for node_id, ns in [*self._deleted.items()]:
                self._tier.delete(node_id, ns)
                del self._deleted[node_id]
                self.withdrawn.discard(node_id)
            # Now, not when it was doubted: it may have been published again since.
            self._doubted = {n: ns for n, ns in self._doubted.items() if not self._tier.keep(n, ns)}
            gone = set(self._doubted)
        except KVUnavailableError as error:
            self._counters[f"shared_write_{error.reason}"] += 1
        try:
            if self._rows:
                self._catalogue.add([*self._rows.values()])
                self._counters["shared_published"] += len(self._rows)
                self._rows.clear()
            if unlisted := self._unlisted | gone:
                self._catalogue.remove(unlisted)
                self._unlisted.clear()
                self._doubted = {n: ns for n, ns in self._doubted.items() if n not in gone}
            if time.monotonic() - self._purged > _PURGE_S:
                self._purged = time.monotonic()
                self._catalogue.remove_expired()
        except IndexUnavailableError as error:
            self._counters["shared_write_catalogue_down"] += 1
            logger.info("shared donors: %s", error)

    def _put(self, node_id: str, ns: str) -> list[Node]:
        """Publish a node, and those it borrows from that are not, or no longer, shared: without
        them it would be full of holes. Returns those published."""
        stored = self._stored(node_id, ns)
        self._tier.put(stored)
        nodes = [stored.node]
        for owner in stored.node.owners:
            if owner not in self._foreign and not self._tier.keep(owner, ns):
                with suppress(KVUnavailableError):  # it is gone from here, too
                    owned = self._stored(owner, ns)
                    self._tier.put(owned)
                    nodes.append(owned.node)
        return nodes
