"""Host RAM over local disk: nodes are served from RAM and written through to disk behind it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Literal

import numpy as np

from kvshare_mm.errors import KVUnavailableError, NotFiniteError
from kvshare_mm.node import Node
from kvshare_mm.store.base import NodeKV, StoredNode, check_finite
from kvshare_mm.store.disk import DiskTier
from kvshare_mm.store.host import HostTier, ram_bytes
from kvshare_mm.store.write_queue import WriteQueue, write

logger = logging.getLogger(__name__)

# A disk that takes so long for a node, and is slower than so many bytes a second, is not waited for
# at the end.
_STALLED_S, _SLOWEST = 60.0, 10e6

Lasting = Literal["now", "borrowed", "never"]


class TieredStore:
    """Where the KV of every stored node is, and the only place the engine asks for it.

    `put` returns at once: a thread writes the node to disk. Until that is done the queue keeps the
    node in RAM and readable, even if the host tier evicts it; for such nodes the queue has a
    budget of its own, beyond which an evicted node that is not on disk yet is gone. A disk that
    fails costs durability and nothing else. Thread-safe.

    Parameters:
        host: the RAM tier.
        disk: the disk tier, or None.
        on_gone: called with the id of a node once it is in no tier any more: evicted from the
            last one, damaged, or deleted. From any thread, holding no lock.
        max_queued_bytes: budget for nodes that only the write queue keeps in RAM. One node is
            kept whatever its size.

    Attributes:
        counters: events by name: ``write_<reason>`` for nodes that did not get to disk
            ("io_error", "too_large" for the disk tier, "queue_full", "internal"), ``read_<reason>``
            for reads that raised (reasons of `KVUnavailableError`), ``not_finite`` for what was
            refused, ``folder_recreated`` for a folder on disk that was removed and made again.
    """

    def __init__(
        self,
        host: HostTier,
        disk: DiskTier | None,
        on_gone: Callable[[str], None],
        max_queued_bytes: int = 1 << 28,
    ) -> None:
        self.counters: dict[str, int] = {}
        self._host = host
        self._disk = disk
        self._on_gone = on_gone
        self._max_queued_bytes = max_queued_bytes
        # Taken before the locks of the tiers, and not held while a node is read or written: a slow
        # disk must not hold up what RAM can answer.
        self._changed = threading.Condition()
        self._queue = WriteQueue(host.peek)
        self._writing: str | None = None
        self._doomed: set[str] = set()  # deleted while they are written
        self._num_writes = 0
        self._num_puts = 0
        self._versions: dict[str, int] = {}  # at which put a node came
        self._resident: set[str] = {*host, *(disk or ())}  # what `on_gone` was not called for
        self._closing = disk is None
        self._writer: threading.Thread | None = None
        if disk is not None:
            self._writer = threading.Thread(
                target=self._write_behind, args=(disk,), name="kv-writer", daemon=True
            )
            self._writer.start()

    def put(self, stored: StoredNode, lasting: Lasting = "now") -> None:
        """Keep a node, or its new version, in RAM and queue it for the disk.

        Args:
            lasting: "borrowed": for the disk only once a node that is borrows from it; "never": it
                is kept elsewhere. Where an older version is on disk, it is replaced all the same.

        Raises:
            NotFiniteError: K, V, attention or embedding hold NaN or an infinity. Nothing changed.
        """
        self._check(stored.node, stored.embedding, stored.kv)
        with self._changed:
            latest = self._host.peek(stored.node.node_id) or self._queue.get(stored.node.node_id)
            if stored.embedding is None and latest is not None:
                stored = replace(stored, embedding=latest.embedding)  # it came meanwhile
            gone = self._put(stored, lasting)
        self._announce(gone)

    def get(self, node_id: str, namespace: str) -> StoredNode:
        """Return a node from RAM, or from disk, and then keep it in RAM.

        Raises:
            KVUnavailableError: "evicted", "corrupt", "io_error"; "wrong_namespace" if the node is
                not of this namespace, whatever the caller's index says.
        """
        try:
            stored, version = self._from_ram(node_id)
            promote = stored is None
            if stored is None:
                stored = self._from_disk(node_id)
            if stored.node.namespace != namespace:
                message = f"node {node_id} is of {stored.node.namespace!r}, not of {namespace!r}"
                raise KVUnavailableError("wrong_namespace", message)
        except KVUnavailableError as error:
            self._unreadable(node_id, error)
            raise
        if promote:
            self._promote(stored, version)
        return stored

    def update_embedding(self, node_id: str, embedding: np.ndarray) -> bool:
        """Replace the search vector (``[dim]`` float32) of a node, on disk too.

        The node is written again whole, or only once if it was still queued: milliseconds, behind
        the request, for one file format without in-place updates.

        Returns:
            False if the node is gone or cannot be read.

        Raises:
            NotFiniteError: the vector holds NaN or an infinity. Nothing changed.
        """
        with self._changed:
            stored = self._host.peek(node_id) or self._queue.get(node_id)
            version = self._versions.get(node_id)
        if stored is None:
            try:
                stored = self._from_disk(node_id)
            except KVUnavailableError as error:
                logger.debug("no embedding for node %s: %s", node_id, error)
                self._unreadable(node_id, error)
                return False
        self._check(stored.node, embedding)
        with self._changed:
            # It may have been deleted, or put again, while it was read.
            if self._locate(node_id) is None:
                return False
            latest = self._host.peek(node_id) or self._queue.get(node_id)
            if latest is None and version == self._versions.get(node_id):
                latest = stored
            gone = [] if latest is None else self._put(replace(latest, embedding=embedding))
        self._announce(gone)
        return latest is not None or self.update_embedding(node_id, embedding)

    def delete(self, node_id: str) -> None:
        """Delete a node from all tiers; an unknown id is not an error."""
        with self._changed:
            if self._writing == node_id:
                self._doomed.add(node_id)  # it would come back after it was deleted
            self._queue.drop(node_id)
            self._host.delete(node_id)
            if self._disk is not None:
                self._disk.forget(node_id)
            gone = self._forget([node_id])
            self._changed.notify_all()
        if self._disk is not None:
            self._disk.clean(0.0)
        self._announce(gone)

    def resident(self, node_id: str) -> Literal["host", "disk"] | None:
        """Return the fastest tier that holds a node; the write queue counts as host."""
        with self._changed:
            return self._locate(node_id)

    def ids(self) -> list[str]:
        """Ids of all nodes held now, in any tier."""
        with self._changed:
            return sorted(self._resident)

    def bytes_by_tier(self) -> dict[str, int]:
        """Return the bytes in use, by tier name. A node in two tiers counts in both."""
        tiers = (self._host, self._disk) if self._disk is not None else (self._host,)
        return {tier.name: tier.num_bytes for tier in tiers}

    def records(self) -> Iterator[tuple[Node, np.ndarray | None]]:
        """Yield node and embedding of every node on disk, to rebuild tree and index at start."""
        return iter(()) if self._disk is None else self._disk.records()

    @property
    def host_bytes(self) -> int:
        """Budget in RAM, in bytes."""
        return self._host.max_bytes

    def reserve(self, num_bytes: int) -> None:
        """Leave so much of the budget in RAM to what is known of nodes without their KV."""
        with self._changed:
            gone = self._settle(self._host.reserve(num_bytes))
        self._announce(gone)

    def touch(self, node_id: str) -> None:
        """Mark a node as just used, in every tier; an unknown id is ignored.

        One that was for the disk only with a borrower goes there now.
        """
        with self._changed:
            if not self._closing:
                self._queue.add_waiting(node_id)
                self._changed.notify_all()
        self._host.touch(node_id)
        if self._disk is not None:
            self._disk.touch(node_id)

    def pin(self, node_id: str, ttl_s: float) -> None:
        """Keep a node from eviction, in every tier, until unpinned or for `ttl_s` seconds."""
        self._host.pin(node_id, ttl_s)
        if self._disk is not None:
            self._disk.pin(node_id, ttl_s)

    def unpin(self, node_id: str) -> None:
        """Undo one `pin`."""
        self._host.unpin(node_id)
        if self._disk is not None:
            self._disk.unpin(node_id)

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until what is in the write queue now is written, and what was deleted is gone.

        Returns:
            True if it is, and so is what failed before and no flush was told of; False after
            `timeout_s` seconds or if a write failed (see `counters`).
        """
        timeout_s = None if timeout_s is None else min(timeout_s, threading.TIMEOUT_MAX)
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        told = False
        with self._changed:
            flush, deleted = self._queue.begin_flush(), set(self._doomed)
        try:
            with self._changed:
                written = self._changed.wait_for(
                    lambda: (
                        flush.given.isdisjoint(self._queue) and deleted.isdisjoint(self._doomed)
                    ),
                    timeout_s,
                )
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            cleaned = self._disk is None or self._disk.clean(left)
            told = True
        finally:
            with self._changed:
                self._queue.end_flush(flush, told)
        return written and cleaned and not flush.failed

    def close(self, timeout_s: float | None = None) -> None:
        """Write what is queued, then stop the writer. What is put later stays in RAM only.

        Args:
            timeout_s: None: as long as it takes, unless the disk hangs.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._writer is not None:
            before = -1
            while self._writer.is_alive() and before != self._num_writes:
                before = self._num_writes
                self._writer.join(self._patience() if timeout_s is None else timeout_s)
                if timeout_s is not None:
                    break
            if self._writer.is_alive():
                logger.warning("closed with %d nodes not on disk yet", len(self._queue))
            elif self._disk is not None:
                self._disk.close()

    def _patience(self) -> float:
        """Seconds that a disk may take for what it writes now."""
        with self._changed:
            size = ram_bytes(self._queue.first()) if self._queue else 0
        return max(_STALLED_S, size / _SLOWEST)

    def _check(self, node: Node, embedding: np.ndarray | None, kv: NodeKV | None = None) -> None:
        """Lock not held: reading gigabytes takes a while."""
        try:
            check_finite(node, embedding, kv)
        except NotFiniteError:
            with self._changed:
                self._count("not_finite")
            raise

    def _put(self, stored: StoredNode, lasting: Lasting = "now") -> list[str]:
        """Lock held. Returns the ids of the nodes that this pushed out of the last tier."""
        node_id = stored.node.node_id
        self._resident.add(node_id)
        self._doomed.discard(node_id)
        self._num_puts += 1
        self._versions[node_id] = self._num_puts
        on_disk = self._disk is not None and node_id in self._disk
        older = on_disk or node_id in self._queue or node_id == self._writing
        if (lasting == "now" or older) and not self._closing:
            self._queue.add(stored)
            self._changed.notify_all()
        elif lasting == "borrowed":
            self._queue.add_later(node_id)
        return self._settle(self._host.put(stored))

    def _from_ram(self, node_id: str) -> tuple[StoredNode | None, int | None]:
        """A node, and at which put it came."""
        with self._changed:
            version = self._versions.get(node_id)
            if node_id not in self._host:
                return self._queue.get(node_id), version
            if self._disk is not None:
                # Else the nodes used most, which RAM answers for, would be the first to leave the
                # disk, and be missing after a restart.
                self._disk.touch(node_id)
            return self._host.get(node_id), version

    def _from_disk(self, node_id: str) -> StoredNode:
        if self._disk is None or node_id in self._doomed:
            raise KVUnavailableError("evicted", f"node {node_id} is not stored")
        return self._disk.get(node_id)

    def _unreadable(self, node_id: str, error: KVUnavailableError) -> None:
        with self._changed:
            self._count(f"read_{error.reason}")
            gone = self._forget([node_id])
        self._announce(gone)

    def _promote(self, stored: StoredNode, version: int | None) -> None:
        node_id = stored.node.node_id
        with self._changed:
            # Not if it was deleted, or a newer version came, while it was read.
            if self._locate(node_id) != "disk" or self._versions.get(node_id) != version:
                return
            gone = self._settle(self._host.put(stored))
        self._announce(gone)

    def _locate(self, node_id: str) -> Literal["host", "disk"] | None:
        """Lock held."""
        if node_id in self._host or node_id in self._queue:
            return "host"
        if self._disk is None or node_id in self._doomed:
            return None
        return "disk" if node_id in self._disk else None

    def _settle(self, evicted: Iterable[str]) -> list[str]:
        """Lock held. Decide what the host tier's evictions mean; return what is gone."""
        for node_id in evicted:
            if node_id not in self._queue or node_id == self._writing:
                continue
            queued_only = [n for n in self._queue if n not in self._host]
            num_bytes = sum(ram_bytes(s) for s in map(self._queue.get, queued_only) if s)
            if len(queued_only) > 1 and num_bytes > self._max_queued_bytes:
                self._queue.drop(node_id)
                if self._disk is not None:
                    self._disk.forget(node_id)  # an older version; the writer removes its file
                full = f"no room to hold node {node_id} until written"
                self._write_failed(node_id, "queue_full", full)
        return self._forget(evicted)

    def _forget(self, node_ids: Iterable[str]) -> list[str]:
        """Lock held. Return those in no tier any more, each once."""
        candidates = dict.fromkeys(node_ids)
        gone = [n for n in candidates if n in self._resident and self._locate(n) is None]
        self._resident.difference_update(gone)
        self._queue.forget(gone)
        for node_id in gone:
            self._versions.pop(node_id, None)
        return gone

    def _announce(self, gone: Iterable[str]) -> None:
        """Lock not held: the tree has locks of its own."""
        for node_id in gone:
            try:
                self._on_gone(node_id)
            except Exception:
                logger.exception("on_gone(%s) failed", node_id)

    def _write_behind(self, disk: DiskTier) -> None:
        recreated = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closing)
                if not self._queue:
                    return
                stored = self._queue.first()
                node_id = self._writing = stored.node.node_id
            dropped, failure = write(disk, stored)
            with self._changed:
                self._writing = None
                self._num_writes += 1
                if failure is not None:
                    self._write_failed(node_id, *failure)
                if node_id in self._doomed:
                    disk.forget(node_id)
                    self._doomed.discard(node_id)
                # What the disk has no room for is not tried again and again.
                lost: list[str] = []
                told = failure is None or failure[0] == "too_large"
                if told and disk.num_recreated > recreated:
                    lost = [each for each in dropped if each != node_id]
                    recreated = disk.num_recreated
                self._queue.done(stored, failure[0] if failure else None, lost)
                if disk.num_recreated:
                    self.counters["folder_recreated"] = disk.num_recreated
                gone = self._forget([node_id, *dropped])
                self._changed.notify_all()
            disk.clean(0.0)
            self._announce(gone)

    def _write_failed(self, node_id: str, reason: str, message: str) -> None:
        """Lock held. Count a node that is not on disk; log the first of each reason."""
        self._queue.failed(node_id)
        name = f"write_{reason}"
        self._count(name)
        if self.counters[name] == 1:
            logger.warning("%s; later failures of this kind are only counted (%s)", message, name)

    def _count(self, name: str) -> None:
        self.counters[name] = self.counters.get(name, 0) + 1
