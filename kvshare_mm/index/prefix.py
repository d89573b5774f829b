"""Finds requests that begin alike, by chained block hashes: where the exact reuse comes from."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np
import xxhash
from numpy.typing import NDArray

from kvshare_mm.index.base import IndexRecord


class PrefixIndex:
    """Node ids by the hash of each block-aligned prefix of their keys, as vLLM's prefix cache.

    A block's hash covers the hash before it, so one lookup per block tells how far two prompts
    agree. Hashes can collide: the caller compares keys before it reuses anything. Safe to use from
    many threads. Memory is about 200 bytes per block of a stored prompt.

    Args:
        block: positions per block; what follows the last whole block is not indexed.
    """

    def __init__(self, block: int = 16) -> None:
        if block < 1:
            raise ValueError(f"block must be at least 1, got {block}")
        self.block = block
        self._lock = threading.Lock()
        # Inner dicts are ordered sets, oldest node first.
        self._nodes: dict[tuple[str, int], dict[str, None]] = {}
        self._chains: dict[str, list[tuple[str, int]]] = {}

    def add(self, records: Sequence[IndexRecord]) -> None:
        """Store records; a node id that is known already is replaced and counts as newest."""
        chained = [
            (record.node_id, [(record.namespace, h) for h in self._chain(record.keys)])
            for record in records
        ]
        with self._lock:
            for node_id, prefixes in chained:
                self._remove(node_id)
                self._chains[node_id] = prefixes
                for prefix in prefixes:
                    self._nodes.setdefault(prefix, {})[node_id] = None

    def remove(self, node_ids: Iterable[str]) -> None:
        """Forget nodes; unknown ids are not an error."""
        with self._lock:
            for node_id in node_ids:
                self._remove(node_id)

    def longest(self, namespace: str, keys: NDArray[np.uint64], limit: int = 4) -> list[str]:
        """The nodes that share the longest block-aligned prefix with `keys`, newest first.

        Args:
            namespace: only its nodes are looked at.
            keys: ``[N]`` uint64 alignment keys of the new prompt.
            limit: most nodes returned; all of them share the same number of blocks.

        Returns:
            At most `limit` node ids; empty if no first block is shared.
        """
        best: dict[str, None] = {}
        with self._lock:
            for block_hash in self._chain(keys):
                nodes = self._nodes.get((namespace, block_hash))
                if nodes is None:
                    break
                best = nodes
            return list(islice(reversed(best), max(0, limit)))

    def __len__(self) -> int:
        return len(self._chains)

    def _chain(self, keys: NDArray[np.uint64]) -> Iterator[int]:
        data = np.ascontiguousarray(keys, dtype="<u8").tobytes()
        width = self.block * 8
        parent = 0
        for start in range(0, len(data) - width + 1, width):
            # The parent as seed is part of the hash, and needs no copy of the block.
            parent = xxhash.xxh3_64_intdigest(data[start : start + width], seed=parent)
            yield parent

    def _remove(self, node_id: str) -> None:
        for prefix in self._chains.pop(node_id, ()):
            nodes = self._nodes[prefix]
            del nodes[node_id]
            if not nodes:
                del self._nodes[prefix]
