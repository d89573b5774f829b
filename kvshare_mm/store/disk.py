"""Local disk: the tier that outlives the process, one file per node in one folder."""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np

from kvshare_mm.errors import KVUnavailableError, NotFiniteError, StoreError
from kvshare_mm.node import Node
from kvshare_mm.store.base import NodeKV, StoredNode, check_finite
from kvshare_mm.store.codec import TEMP_SUFFIX, read_node, read_record, write_node
from kvshare_mm.store.eviction import EvictionLedger
from kvshare_mm.store.lock import FolderLock

logger = logging.getLogger(__name__)

# Files with other names are never touched: people do point a cache at a folder of model weights.
NODE_SUFFIX = ".kvnode"
_TEMP_PATTERN = f"*{NODE_SUFFIX}.*{TEMP_SUFFIX}"


def is_temporary(path: Path) -> bool:
    """Whether a file is what a write was about to put in place."""
    return path.match(_TEMP_PATTERN)


def node_file(node_id: str) -> str:
    """The name of a node's file: ids may hold what file names may not."""
    digest = hashlib.blake2b(node_id.encode("utf-8", "surrogatepass"), digest_size=16)
    return f"{digest.hexdigest()}{NODE_SUFFIX}"


class DiskTier:
    """Keeps nodes in files within a budget of bytes; full, it evicts (see `eviction`).

    Opening reads the record of every node in the folder, not its K and V; damaged files, and those
    of an older format, are deleted and counted, temporary files of a killed writer are removed.
    Those of a newer format stay, and their bytes leave less of the budget. Thread-safe.

    Processes may share a folder: files appear whole or not at all, and one that another process
    removed reads as "evicted". Each process counts, and evicts, what it found at its opening and
    wrote itself, so N processes that write may use up to N budgets. A folder that is removed is
    made again by the next write.

    Parameters:
        folder: created if it does not exist.
        max_bytes: budget for the files; while a node is written, one more file may exist.
        durable: flush every node to the device, to survive power cuts and not only killed
            processes. A damaged node is found and dropped at reading in either case.
        clock: seconds, monotonic; pins expire by it.

    Attributes:
        num_corrupt: damaged files deleted since the opening.
        left_alone: files that were there at the opening and are not used, by reason:
            "newer_format", "io_error".
        num_recreated: times that the folder was removed by others and made again.

    Raises:
        StoreError: the folder cannot be created, read or written, or is being repaired.
        ValueError: `max_bytes` is negative.
    """

    name = "disk"

    def __init__(
        self,
        folder: str | os.PathLike[str],
        max_bytes: int,
        durable: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder = Path(folder)
        self.num_corrupt = 0
        self.num_recreated = 0
        self.left_alone: Counter[str] = Counter()
        self._durable = durable
        self._ledger = EvictionLedger(max_bytes, clock)
        # Two locks, so that nobody waits for a write to learn what is here, or to delete it.
        # `_changing` is held while the folder changes, `_lock` while ledger and `_doomed` are used;
        # taken in this order.
        self._changing = threading.Lock()
        self._lock = threading.Lock()
        self._doomed: set[str] = set()  # deleted, but for their files
        self._lost: list[str] = []  # went with a removed folder, and nobody was told yet
        self._num_written = 0
        self._written: dict[str, int] = {}  # of nodes here that were written since: which write
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._used = FolderLock(self.folder)
            self._check_writable()
            self._scan()
        except BlockingIOError as error:
            raise StoreError(f"{self.folder} is being repaired; start again when it is") from error
        except OSError as error:
            raise StoreError(
                f"cannot keep KV in {self.folder}: {error}. Give a folder that this process may"
                " create or write, or turn the disk tier off."
            ) from error

    def put(self, stored: StoredNode) -> list[str]:
        """Write or replace a node; evict others only once it is written.

        Returns:
            Ids of the nodes that are no longer here: those evicted for it, or that went with a
            removed folder; or only its own, if it cannot fit beside what is pinned, and then
            nothing else was evicted.

        Raises:
            KVUnavailableError: "io_error" (disk full); what was here still is.
            ValueError: K and V do not belong to the node, see `codec.write_node`.
        """
        node_id = stored.node.node_id
        try:
            with self._changing:
                with self._lock:
                    fits = self._ledger.can_fit(node_id, stored.kv.num_bytes)
                    if not fits:
                        # Known before it is written: gigabytes may be at stake.
                        self._ledger.discard(node_id)
                        self._written.pop(node_id, None)
                        evicted = [node_id]
                if fits:
                    self._recreate()
                    num_bytes = write_node(self._path(node_id), stored, durable=self._durable)
                    with self._lock:
                        self._doomed.discard(node_id)
                        self._num_written += 1
                        self._written[node_id] = self._num_written
                        evicted = self._ledger.admit(node_id, num_bytes)
                        for evicted_id in evicted:
                            self._written.pop(evicted_id, None)
                for evicted_id in evicted:
                    self._unlink(self._path(evicted_id))
        finally:
            self.clean(0.0)
        lost, self._lost = self._lost, []
        return [*(each for each in lost if each != node_id), *evicted]

    def get(self, node_id: str) -> StoredNode:
        """Read the node, verify every byte and mark it used.

        Raises:
            KVUnavailableError: "evicted", the node is not here; "corrupt", it was damaged, or held
                what is no number, and is deleted now; "io_error", it could not be read this time.
        """
        with self._lock:
            if node_id not in self._ledger:
                raise KVUnavailableError("evicted", f"node {node_id} is not in {self.folder}")
            begun = self._written.get(node_id)
        path = self._path(node_id)
        try:
            stored = read_node(path)
            self._check(path, stored.node, stored.embedding, stored.kv)
        except KVUnavailableError as error:
            self._drop_unreadable(node_id, error, begun)
            raise
        self.touch(node_id)
        # The modification time carries the order of use over a restart; losing it loses no data.
        with suppress(OSError):
            os.utime(path)
        return stored

    def touch(self, node_id: str) -> None:
        """Mark a node as just used without reading it; an unknown id is ignored."""
        with self._lock:
            self._ledger.touch(node_id)

    def delete(self, node_id: str) -> None:
        """Delete a node, pinned or not; an unknown id is not an error.

        Its file goes at once, or when what is written now is.
        """
        self.forget(node_id)
        self.clean(0.0)

    def forget(self, node_id: str) -> None:
        """Delete a node but for its file, which the next `clean` removes: waits for no disk."""
        with self._lock:
            self._discard(node_id)

    def clean(self, timeout_s: float | None) -> bool:
        """Remove the files of deleted nodes.

        Args:
            timeout_s: for what is written or removed now; 0: that one removes them in its turn;
                None: there is no limit.

        Returns:
            Whether those deleted before the call are gone.
        """
        # Looked at again once the lock is free, as whoever dooms a node meanwhile does not get it.
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with self._lock:
            asked = set(self._doomed)
        while True:
            with self._lock:
                if not self._doomed:
                    return True
                done = asked.isdisjoint(self._doomed)
            # Others' are removed too, who found the lock taken; nobody waits for it for them.
            left = -1.0 if deadline is None else max(0.0, deadline - time.monotonic())
            if not self._changing.acquire(timeout=0.0 if done else left):
                return done
            try:
                with self._lock:
                    doomed = list(self._doomed)
                for node_id in doomed:
                    self._unlink(self._path(node_id))
                    with self._lock:  # not before: who asks would think that it is gone
                        self._doomed.discard(node_id)
            finally:
                self._changing.release()

    def records(self) -> Iterator[tuple[Node, np.ndarray | None]]:
        """Yield node and embedding (``[dim]`` float32, or None) of all nodes held now.

        Least recently used first. K and V are neither read nor verified: `get` does that. Nodes
        that vanish or turn out damaged meanwhile are left out.
        """
        for node_id in self:
            begun = self._written.get(node_id)
            try:
                node, embedding = self._record(self._path(node_id))
            except KVUnavailableError as error:
                self._drop_unreadable(node_id, error, begun)
            else:
                yield node, embedding

    def pin(self, node_id: str, ttl_s: float) -> None:
        """Keep a node from eviction until it is unpinned as often, at most for `ttl_s` seconds."""
        with self._lock:
            self._ledger.pin(node_id, ttl_s)

    def unpin(self, node_id: str) -> None:
        """Undo one `pin`; a node that is not pinned is not an error."""
        with self._lock:
            self._ledger.unpin(node_id)

    def close(self) -> None:
        """Others may repair the folder from now on."""
        self._used.close()

    def __contains__(self, node_id: object) -> bool:
        with self._lock:
            return node_id in self._ledger

    def __iter__(self) -> Iterator[str]:
        """Iterate over the ids held now, least recently used first."""
        with self._lock:
            return iter(list(self._ledger))

    def __len__(self) -> int:
        with self._lock:
            return len(self._ledger)

    @property
    def num_bytes(self) -> int:
        """Bytes in use by the files of the nodes."""
        with self._lock:
            return self._ledger.num_bytes

    @property
    def max_bytes(self) -> int:
        """Budget in bytes."""
        return self._ledger.max_bytes

    def _path(self, node_id: str) -> Path:
        return self.folder / node_file(node_id)

    def _recreate(self) -> None:
        """Make the folder again if it was removed; what went with it is `_lost`."""
        if self.folder.is_dir():
            return
        try:
            self.folder.mkdir(mode=0o700, parents=True)
        except OSError as error:
            raise KVUnavailableError("io_error", f"cannot make {self.folder}: {error}") from error
        with suppress(OSError):
            self._used = FolderLock(self.folder)
        self.num_recreated += 1
        logger.warning("%s was removed; it is made again, empty", self.folder)
        with self._lock:
            gone = list(self._ledger)
            for node_id in gone:
                self._ledger.discard(node_id)
            self._lost += gone
            self._written.clear()

    def _check_writable(self) -> None:
        # Asking the permission bits is not enough: on a read-only mount or over a
        # quota, only writing fails.
        probe = self.folder / f"probe{NODE_SUFFIX}.{secrets.token_hex(8)}{TEMP_SUFFIX}"
        probe.write_bytes(b"kvshare")
        probe.unlink(missing_ok=True)

    def _scan(self) -> None:
        """Fill the ledger from the folder, in the order the nodes were last used."""
        found: list[tuple[int, int, Path]] = []
        for path in self.folder.iterdir():
            if is_temporary(path):
                self._unlink(path)
            elif path.name.endswith(NODE_SUFFIX):
                try:
                    stat = path.stat()
                except FileNotFoundError:  # another process evicts while we look
                    continue
                except OSError as error:
                    self.left_alone["io_error"] += 1
                    logger.warning("cannot read %s: %s", path, error)
                    continue
                found.append((stat.st_mtime_ns, stat.st_size, path))
        newer_bytes = 0
        for _, num_bytes, path in sorted(found):
            try:
                node, _ = self._record(path)
            except KVUnavailableError as error:
                self._note(error)
                if error.reason == "corrupt":
                    self._unlink(path)
                elif error.reason != "evicted":
                    self.left_alone[error.reason] += 1
                newer_bytes += num_bytes if error.reason == "newer_format" else 0
                continue
            for evicted_id in self._ledger.admit(node.node_id, num_bytes):
                self._unlink(self._path(evicted_id))
        if newer_bytes:
            logger.warning(
                "%s holds %d nodes of a newer format, which stay there unused, %d bytes",
                self.folder,
                self.left_alone["newer_format"],
                newer_bytes,
            )
            for evicted_id in self._ledger.reserve(newer_bytes):
                self._unlink(self._path(evicted_id))
        logger.info(
            "disk store %s: %d nodes, %d bytes, %d damaged files deleted",
            self.folder,
            len(self._ledger),
            self._ledger.num_bytes,
            self.num_corrupt,
        )

    def _record(self, path: Path) -> tuple[Node, np.ndarray | None]:
        node, embedding, _ = read_record(path)
        self._check(path, node, embedding)
        return node, embedding

    def _check(
        self, path: Path, node: Node, embedding: np.ndarray | None, kv: NodeKV | None = None
    ) -> None:
        """Raises KVUnavailableError("corrupt") for what is whole but must not be here."""
        if self._path(node.node_id) != path:
            raise KVUnavailableError("corrupt", f"{path} holds node {node.node_id}: renamed?")
        try:
            check_finite(node, embedding, kv)
        except NotFiniteError as error:  # an older version stored such nodes
            raise KVUnavailableError("corrupt", f"{path}: {error}") from error

    def _drop_unreadable(self, node_id: str, error: KVUnavailableError, begun: int | None) -> None:
        """Forget a node that is gone or damaged; one that could not be read may be next time.

        Args:
            begun: which write it came from when reading began: a newer one is not forgotten.
        """
        self._note(error)
        if error.reason == "io_error":
            return
        with self._lock:
            if self._written.get(node_id) != begun:
                return
            if error.reason == "newer_format":  # another process, of a later version, wrote it
                self._ledger.discard(node_id)
                self._written.pop(node_id, None)
            else:
                # Also when it is gone: another process may have written it again since.
                self._discard(node_id)
        self.clean(0.0)

    def _discard(self, node_id: str) -> None:
        """`_lock` held."""
        self._ledger.discard(node_id)
        self._written.pop(node_id, None)
        self._doomed.add(node_id)

    def _note(self, error: KVUnavailableError) -> None:
        if error.reason == "corrupt":
            self.num_corrupt += 1
            logger.warning("deleting it: %s", error)
        elif error.reason == "io_error":
            logger.warning("%s", error)

    def _unlink(self, path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("cannot delete %s, which frees no space now: %s", path, error)
