"""What is to be written to disk, together with whom, and who waits for it."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from kvshare_mm.errors import KVUnavailableError
from kvshare_mm.store.base import StoredNode
from kvshare_mm.store.disk import DiskTier

logger = logging.getLogger(__name__)

# Where nothing new is written, a disk that failed is given what is asked for again so long after.
_AGAIN_S = 30.0


@dataclass(eq=False, slots=True)
class Flush:
    """One that waits.

    Attributes:
        given: ids of the nodes that it waits for.
        failed: one of them was not written, or one that nobody waited for before it.
    """

    given: set[str]
    failed: bool


class WriteQueue:
    """Nodes in the order in which they are written. Not thread-safe: its store locks.

    A node is of no use on disk without those that it borrows from, so these go there before it.

    Args:
        peek: gives a node that is in RAM, by its id.
    """

    def __init__(self, peek: Callable[[str], StoredNode | None]) -> None:
        self._peek = peek
        self._queue: OrderedDict[str, StoredNode] = OrderedDict()
        self._later: set[str] = set()  # to be written with the next that borrows from them
        self._failing = False  # the last write
        self._again_s = 0.0
        self._flushes: list[Flush] = []
        self._untold = False  # a failure

    def __contains__(self, node_id: object) -> bool:
        return node_id in self._queue

    def __iter__(self) -> Iterator[str]:
        return iter(self._queue)

    def __len__(self) -> int:
        return len(self._queue)

    def get(self, node_id: str) -> StoredNode | None:
        return self._queue.get(node_id)

    def first(self) -> StoredNode:
        """The one to be written now; it stays in the queue until it is `done`."""
        return next(iter(self._queue.values()))

    def add(self, stored: StoredNode) -> None:
        """A node for the disk. While that fails, those it borrows from wait until it has taken the
        node: or each node would try all that are older."""
        node_id = stored.node.node_id
        if not self._failing and self._add_owners(stored):
            self._queue.pop(node_id, None)  # behind them
        self._queue[node_id] = stored
        self._later.discard(node_id)

    def add_later(self, node_id: str) -> None:
        """A node for the disk once one that is borrows from it."""
        self._later.add(node_id)

    def add_waiting(self, node_id: str) -> None:
        """If a node waits for a borrower, it does no longer, unless the disk fails, which is tried
        again from time to time."""
        blocked = self._failing and (self._queue or time.monotonic() < self._again_s)
        stored = self._peek(node_id) if not blocked and node_id in self._later else None
        if stored is not None:
            self.add(stored)

    def drop(self, node_id: str) -> None:
        """A node is not to be written; an unknown id is ignored."""
        self._queue.pop(node_id, None)

    def forget(self, node_ids: Iterable[str]) -> None:
        """Nodes are gone."""
        self._later.difference_update(node_ids)

    def done(self, stored: StoredNode, failure: str | None, lost: Iterable[str] = ()) -> None:
        """A node was written, or why it was not.

        Args:
            lost: others that left the disk though it had room: like one that the disk did not take,
                what RAM still has is written with the next that borrows from it.
        """
        node_id = stored.node.node_id
        if self._queue.get(node_id) is stored:  # else a newer version waits
            del self._queue[node_id]
        if failure != "too_large":  # which says nothing of the disk
            self._failing = failure is not None
            self._again_s = time.monotonic() + _AGAIN_S
        again = {*lost, node_id} if failure == "io_error" else {*lost}
        self._later.update(n for n in again if n not in self._queue and self._peek(n) is not None)
        if failure is None:
            self._add_owners(stored)

    def begin_flush(self) -> Flush:
        """Somebody waits for all that is in the queue now."""
        flush = Flush(set(self._queue), self._untold)
        self._untold = False
        self._flushes.append(flush)
        return flush

    def end_flush(self, flush: Flush, told: bool) -> None:
        """Somebody waits no longer, and was told how it went; else the next is."""
        self._flushes.remove(flush)
        self._untold |= flush.failed and not told

    def failed(self, node_id: str) -> None:
        """All that wait for the node are told that it is not on disk, or else the next."""
        told = [flush for flush in self._flushes if node_id in flush.given]
        for flush in told:
            flush.failed = True
        self._untold |= not told

    def _add_owners(self, stored: StoredNode) -> set[str]:
        """Those it borrows from that were not for the disk yet, each behind its own. Returns them;
        who waits for the node waits for them.

        No recursion: as many may borrow from each other as a session has turns.
        """
        owners: set[str] = set()
        path = [(stored, iter(stored.node.owners))]
        while path:
            borrower, left = path[-1]
            name = next(left, None)
            owner = self._peek(name) if name is not None and name in self._later else None
            if owner is not None:
                self._later.discard(owner.node.node_id)
                owners.add(owner.node.node_id)
                path.append((owner, iter(owner.node.owners)))
            elif name is None:
                path.pop()
                if borrower is not stored:
                    self._queue[borrower.node.node_id] = borrower
        for flush in self._flushes:
            flush.given |= owners if stored.node.node_id in flush.given else set()
        return owners


def write(disk: DiskTier, stored: StoredNode) -> tuple[list[str], tuple[str, str] | None]:
    """Write a node.

    Returns:
        The ids that left the disk, and reason and message if the node itself is not on it.
    """
    node_id = stored.node.node_id
    try:
        dropped = disk.put(stored)
    except KVUnavailableError as error:
        disk.delete(node_id)  # an older version, which the tree knows no more
        return [], (error.reason, str(error))
    except Exception as error:
        # The thread must outlive a bug, or every later node would wait for it in RAM.
        logger.exception("writing node %s", node_id)
        disk.delete(node_id)
        return [], ("internal", str(error))
    too_large = ("too_large", f"node {node_id} does not fit on disk beside what is pinned")
    return dropped, too_large if node_id in dropped else None
