"""Finds requests that begin alike, by chained block hashes: where the exact reuse comes from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import xxhash
from numpy.typing import NDArray

from kvshare_mm.index.base import IndexRecord
from kvshare_mm.index.postings import Postings, PostingsIndex

_AT_ONCE = 64
"""Nodes told at once of many that share a prefix."""


class PrefixIndex(PostingsIndex[None]):
    """Node ids by the hash of each block-aligned prefix of their keys, as vLLM's prefix cache.

    A block's hash covers the hash before it, so one hash tells whether two prompts agree so far;
    and whoever has a prefix has all shorter ones, so the longest is found by bisection. Hashes can
    collide: the caller compares keys before it reuses anything. Safe to use from many threads.
    Memory is 4 bytes per block of a stored prompt, and 16 more for one that no other has.

    Args:
        block: positions per block; what follows the last whole block is not indexed.
    """

    def __init__(self, block: int = 16) -> None:
        if block < 1:
            raise ValueError(f"block must be at least 1, got {block}")
        super().__init__(posting_bytes=0)
        self.block = block

    def add(self, records: Sequence[IndexRecord]) -> None:
        """Store records; a node id that is known already is replaced and counts as newest."""
        chained: dict[str, list[tuple[str, None, NDArray[np.uint64]]]] = {}
        for record in {record.node_id: record for record in records}.values():
            added = chained.setdefault(record.namespace, [])
            added.append((record.node_id, None, self._chain(record.align_keys)))
        self._put(chained)

    def longest(self, namespace: str, keys: NDArray[np.uint64], limit: int = 4) -> list[str]:
        """The nodes that share the longest block-aligned prefix with `keys`, newest first.

        Args:
            namespace: only its nodes are looked at.
            keys: ``[N]`` uint64 alignment keys of the new prompt.
            limit: most nodes returned; all of them share the same number of blocks.

        Returns:
            At most `limit` node ids; empty if no first block is shared.
        """
        return next(self.descending(namespace, keys), (0, []))[1][: max(0, limit)]

    def descending(
        self, namespace: str, keys: NDArray[np.uint64]
    ) -> Iterator[tuple[int, list[str]]]:
        """The nodes that share at least a block with `keys`, each once, the longest prefix first.

        Yields:
            A number of positions, and nodes that share so many or more, the newest first. Of many
            nodes with one prefix the older ones come later.
        """
        chain = self._chain(keys)
        depth = len(chain)
        told: set[str] = set()
        while depth:
            with self._lock:
                postings = self._namespaces.get(namespace)
                if postings is None:
                    return
                holders = _Holders(postings, chain[:depth])
                depth = holders.deepest(len(told))
                if not depth:
                    return
                slots = np.sort(holders.slots(depth))[::-1]
                # Those told are among the first of them.
                newest = slots[: _AT_ONCE + len(told)].tolist()
                found = [node for s in newest if (node := postings.ids[s]) not in told]
            told.update(found)
            yield depth * self.block, found

    def _chain(self, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """``[N // block]`` the hash of each block and all before it."""
        data = np.ascontiguousarray(keys, dtype="<u8").tobytes()
        width = self.block * 8
        parent = 0
        hashes = []
        for start in range(0, len(data) - width + 1, width):
            # The parent as seed is part of the hash, and needs no copy of the block.
            parent = xxhash.xxh3_64_intdigest(data[start : start + width], seed=parent)
            hashes.append(parent)
        return np.array(hashes, dtype=np.uint64)


class _Holders:
    """The nodes that have each block of a prompt. Used with the index's lock held."""

    def __init__(self, postings: Postings[None], chain: NDArray[np.uint64]) -> None:
        self._alive = postings.alive
        # By run: its slots, and where those of each block begin and end.
        self._runs = [(run.slots, *run.holders(chain)) for run in postings.runs]
        self._depth = len(chain)

    def slots(self, depth: int) -> NDArray[np.int32]:
        """Of the nodes that have the first `depth` blocks."""
        found = [
            slots[begin[depth - 1] : end[depth - 1]]
            for slots, begin, end in self._runs
            if begin[depth - 1] < end[depth - 1]
        ]
        if not found:
            return np.empty(0, np.int32)
        every: NDArray[np.int32] = np.concatenate(found)
        held: NDArray[np.int32] = every[self._alive[every]]
        return held

    def deepest(self, known: int) -> int:
        """How many of the first blocks more than `known` nodes have: those with more blocks have
        them too."""
        low, high = 0, self._depth
        while low < high:
            middle = (low + high + 1) // 2
            if len(self.slots(middle)) > known:
                low = middle
            else:
                high = middle - 1
        return low
