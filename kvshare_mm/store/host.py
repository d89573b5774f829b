"""Host RAM: the tier that answers at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

from kvshare_mm.errors import KVUnavailableError
from kvshare_mm.store.base import StoredNode
from kvshare_mm.store.eviction import EvictionLedger


class HostTier:
    """Keeps nodes in RAM within a budget of bytes; full, it evicts (see `eviction`).

    Nodes are kept as given, not copied: their K and V must not be views into memory that will be
    written again. Thread-safe.

    Parameters:
        max_bytes: budget, for K, V, keys and embeddings together.
        clock: seconds, monotonic; pins expire by it.

    Raises:
        ValueError: `max_bytes` is negative.
    """

    name = "host"

    def __init__(self, max_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._lock = threading.Lock()
        self._ledger = EvictionLedger(max_bytes, clock)
        self._nodes: dict[str, StoredNode] = {}

    def put(self, stored: StoredNode) -> list[str]:
        """Store or replace a node.

        Returns:
            Ids of the nodes that are no longer here: those evicted for it; or only its own, if it
            cannot fit beside what is pinned, and then nothing else was evicted.
        """
        with self._lock:
            evicted = self._ledger.admit(stored.node.node_id, ram_bytes(stored))
            self._nodes[stored.node.node_id] = stored
            for node_id in evicted:
                del self._nodes[node_id]
        return evicted

    def get(self, node_id: str) -> StoredNode:
        """Return the node and mark it used.

        Raises:
            KVUnavailableError: "evicted", the node is not here.
        """
        with self._lock:
            self._ledger.touch(node_id)
            stored = self._nodes.get(node_id)
        if stored is None:
            raise KVUnavailableError("evicted", f"node {node_id} is not in host RAM")
        return stored

    def reserve(self, num_bytes: int) -> list[str]:
        """Leave so much of the budget to what is in RAM beside KV; returns the ids of the nodes
        evicted for it."""
        with self._lock:
            evicted = self._ledger.reserve(num_bytes)
            for node_id in evicted:
                del self._nodes[node_id]
        return evicted

    def touch(self, node_id: str) -> None:
        """Mark a node as just used; an unknown id is ignored."""
        with self._lock:
            self._ledger.touch(node_id)

    def peek(self, node_id: str) -> StoredNode | None:
        """Return the node, or None, without marking it used."""
        with self._lock:
            return self._nodes.get(node_id)

    def delete(self, node_id: str) -> None:
        """Forget a node, pinned or not; an unknown id is not an error."""
        with self._lock:
            self._ledger.discard(node_id)
            self._nodes.pop(node_id, None)

    def pin(self, node_id: str, ttl_s: float) -> None:
        """Keep a node from eviction until it is unpinned as often, at most for `ttl_s` seconds."""
        with self._lock:
            self._ledger.pin(node_id, ttl_s)

    def unpin(self, node_id: str) -> None:
        """Undo one `pin`; a node that is not pinned is not an error."""
        with self._lock:
            self._ledger.unpin(node_id)

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
        """Bytes in use."""
        with self._lock:
            return self._ledger.num_bytes

    @property
    def max_bytes(self) -> int:
        """Budget in bytes."""
        return self._ledger.max_bytes


def ram_bytes(stored: StoredNode) -> int:
    """Return the bytes a node takes in RAM: K, V, keys, positions and embedding."""
    extras = (stored.embedding, stored.node.positions)
    extra_bytes = sum(array.nbytes for array in extras if array is not None)
    return stored.kv.num_bytes + stored.node.align_keys.nbytes + extra_bytes
