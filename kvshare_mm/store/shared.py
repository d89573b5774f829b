"""KV that several replicas share: a record and blocks of rows for each node, in a store elsewhere.

Only the blocks that a plan needs are fetched. What comes back is verified before anybody reads it:
the store elsewhere may lose, cut or mix up what it holds, and that is a miss with its reason. It is
trusted not to forge: whoever may write to it can, as with a store folder.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
import xxhash

from kvshare_mm.errors import KVUnavailableError
from kvshare_mm.identity import text_identity
from kvshare_mm.node import Node, Span, spans_of
from kvshare_mm.store.base import NodeKV, StoredNode
from kvshare_mm.store.codec import KVType, record_bytes, record_of, tensor_bytes

BLOCK = 64
"""Rows of a block: 2.9 MiB of SmolLM2's float32. Read one after the other, blocks came as fast as
a node whole (46 MiB in 25 ms), and between two of them the clock can be looked at."""

_LAYOUT = "2"  # part of each key: raise it with the layout of record or blocks
_HEAD = struct.Struct("<16sI")  # checksum of all behind it, number of blocks
RECORD = "record"
"""The part of a key that says what its blocks are, which are the parts "0", "1", ..."""


class RemoteStore(Protocol):
    """Bytes by key and part, somewhere else. Every method may raise KVUnavailableError with
    "shared_down" (it failed, or failed a moment ago) or "shared_full"."""

    def put(self, key: str, part: str, content: bytes | memoryview, ttl_s: float) -> None:
        """Keep a part, in place of what it was. `ttl_s` seconds after its last part or lease a key
        is needed no more; a store without expiry keeps it until room is needed."""

    def get(self, key: str, part: str) -> bytes | None: ...

    def delete(self, key: str) -> None: ...

    def lease(self, key: str, ttl_s: float) -> bool:
        """Keep a key for `ttl_s` seconds from now on; False: it is not there."""

    def agree(self, key: str, mine: bytes) -> bytes:
        """What all that ask have in common for `key`: what the first of them brought."""

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Head:
    """What is known of a shared node without its KV.

    Attributes:
        node: the node as it was published.
        types: shape and dtype of K and V.
        checksums: of each block of `BLOCK` owned rows.
        k_exponents: what K was packed with.
    """

    node: Node
    types: dict[str, KVType]
    checksums: tuple[bytes, ...]
    k_exponents: torch.Tensor | None

    def num_bytes(self, rows: np.ndarray) -> int:
        """Bytes that fetching these owned rows (``[num_owned]`` bool) takes."""
        blocks = len(np.unique(np.flatnonzero(rows) // BLOCK))
        return blocks * BLOCK * sum(_row_bytes(kind) for kind in self.types.values())


class SharedTier:
    """Nodes in a `RemoteStore`. Thread-safe as far as that is.

    Args:
        remote: where they are.
        ttl_s: seconds for which a node is kept after it was published or asked for last.
    """

    name = "shared"

    def __init__(self, remote: RemoteStore, ttl_s: float) -> None:
        self.remote = remote
        self.ttl_s = ttl_s

    def put(self, stored: StoredNode) -> None:
        """Publish a node, or its new version. Raises KVUnavailableError."""
        node, key = stored.node, _key(stored.node.namespace, stored.node.node_id)
        record = record_bytes(replace(stored, embedding=None))
        self.remote.delete(key)
        try:
            checksums = []
            for block, start in enumerate(range(0, node.num_owned, BLOCK)):
                rows = slice(start, start + BLOCK)
                content = b"".join(tensor_bytes(x[:, :, rows]) for x in (stored.kv.k, stored.kv.v))
                checksums.append(xxhash.xxh3_128_digest(content))
                self.remote.put(key, str(block), content, self.ttl_s)
            body = b"".join(checksums) + record
            head = _HEAD.pack(_head_checksum(len(checksums), body), len(checksums)) + body
            # The last: a node whose record is there is whole.
            self.remote.put(key, RECORD, head, self.ttl_s)
        except KVUnavailableError:
            # A full store would be full of nodes of which some is there, until they expire.
            with suppress(KVUnavailableError):
                self.remote.delete(key)
            raise

    def head(self, node_id: str, namespace: str) -> Head:
        """A node without its KV, kept for another while.

        Raises:
            KVUnavailableError: "evicted", "corrupt", "newer_format", "wrong_namespace",
                "shared_down".
        """
        key = _key(namespace, node_id)
        content = self.remote.get(key, RECORD)
        if content is None:
            raise KVUnavailableError("evicted", f"node {node_id} is not shared any more")
        if len(content) < _HEAD.size:
            raise _corrupt(node_id, "its record is cut")
        checksum, blocks = _HEAD.unpack_from(content)
        body = content[_HEAD.size :]
        if _head_checksum(blocks, body) != checksum:
            raise _corrupt(node_id, "the checksum of its record does not match")
        node, types, k_exponents = record_of(body[16 * blocks :])
        if (node.node_id, node.namespace) != (node_id, namespace):
            raise KVUnavailableError("wrong_namespace", f"{node_id} is {node.node_id} of another")
        if any(kind.shape[2] != node.num_owned for kind in types.values()):
            raise _corrupt(node_id, "K and V are not what it owns")
        self.remote.lease(key, self.ttl_s)
        found = tuple(body[16 * i : 16 * (i + 1)] for i in range(blocks))
        if blocks != -(-node.num_owned // BLOCK):
            raise _corrupt(node_id, "blocks are missing")
        return Head(node, types, found, k_exponents)

    def rows(
        self, head: Head, wanted: np.ndarray, clock: Callable[[], None] = lambda: None
    ) -> tuple[np.ndarray, NodeKV]:
        """KV of the blocks that hold the owned rows `wanted`.

        Args:
            wanted: ``[num_owned]`` bool.
            clock: called before each block; what it raises ends this.

        Returns:
            ``[num_owned]`` bool, the rows that were fetched, and their KV.

        Raises:
            KVUnavailableError: "evicted", "corrupt" or "shared_down".
        """
        node_id = head.node.node_id
        got = np.zeros(head.node.num_owned, dtype=bool)
        blocks = np.unique(np.flatnonzero(wanted) // BLOCK).tolist()
        for block in blocks:
            got[block * BLOCK : (block + 1) * BLOCK] = True
        tensors = {
            name: torch.empty((*t.shape[:2], int(got.sum()), t.shape[3]), dtype=t.dtype)
            for name, t in head.types.items()
        }
        at = 0
        for block in blocks:
            clock()
            content = self.remote.get(_key(head.node.namespace, node_id), str(block))
            if content is None:
                raise KVUnavailableError("evicted", f"block {block} of {node_id} is gone")
            if xxhash.xxh3_128_digest(content) != head.checksums[block]:
                raise _corrupt(node_id, f"the checksum of block {block} does not match")
            size = min(BLOCK, head.node.num_owned - block * BLOCK)
            _place(content, tensors, at, size, node_id)
            at += size
        return got, NodeKV(tensors["k"], tensors["v"], head.k_exponents)

    def keep(self, node_id: str, namespace: str) -> bool:
        """Keep a node for another while; False: it is not there. Raises KVUnavailableError."""
        return self.remote.lease(_key(namespace, node_id), self.ttl_s)

    def delete(self, node_id: str, namespace: str) -> None:
        """Delete a node; an unknown one is not an error. Raises KVUnavailableError."""
        self.remote.delete(_key(namespace, node_id))


def narrowed(node: Node, rows: np.ndarray, borrowed: Callable[[str, int, int], np.ndarray]) -> Node:
    """A node as far as its KV was fetched: the rest are holes, which are computed again.

    Args:
        rows: ``[num_owned]`` bool, the owned rows that are here.
        borrowed: which of `length` positions from `start` an owner's KV is here of:
            ``[length]`` bool.
    """
    pieces = [
        piece._replace(
            owner_start=piece.owner_start + part.start,
            start=piece.start + part.start,
            length=part.length,
        )
        for piece in node.pieces
        for part in spans_of(borrowed(piece.owner, piece.owner_start, piece.length))
    ]
    return replace(node, own=spans_of(painted(node, rows)), pieces=tuple(pieces))


def painted(node: Node, rows: np.ndarray | bool = True) -> np.ndarray:
    """``[N]`` bool: the positions of these owned rows (``[num_owned]`` bool, or all)."""
    mask = np.zeros(len(node), dtype=bool)
    mask[_positions(node.own)] = rows
    return mask


def rows_of(node: Node, spans: Iterable[Span]) -> np.ndarray:
    """``[num_owned]`` bool: the owned rows that stand at these positions."""
    mask = np.zeros(len(node), dtype=bool)
    for span in spans:
        mask[span.start : span.end] = True
    rows: np.ndarray = mask[_positions(node.own)]
    return rows


def _positions(own: Sequence[Span]) -> np.ndarray:
    parts = [np.arange(span.start, span.end) for span in own]
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def _key(namespace: str, node_id: str) -> str:
    return f"kvshare:{_LAYOUT}:{text_identity(namespace)}:{node_id}"


def _head_checksum(blocks: int, body: bytes) -> bytes:
    return xxhash.xxh3_128_digest(blocks.to_bytes(4, "little") + body)


def _row_bytes(kind: KVType) -> int:
    layers, heads, _, dim = kind.shape
    return layers * heads * dim * kind.dtype.itemsize


def _place(
    content: bytes, tensors: dict[str, torch.Tensor], at: int, size: int, node_id: str
) -> None:
    """Write a block of `size` rows into K and V behind the first `at`."""
    start = 0
    for name in ("k", "v"):
        target = tensors[name]
        layers, heads, rows, dim = target.shape
        width = dim * target.dtype.itemsize
        end = start + layers * heads * size * width
        if end > len(content):
            raise _corrupt(node_id, "a block is cut")
        block = np.frombuffer(content, np.uint8, end - start, start)
        whole = np.asarray(tensor_bytes(target)).reshape(layers, heads, rows, width)
        whole[:, :, at : at + size] = block.reshape(layers, heads, size, width)
        start = end
    if start != len(content):
        raise _corrupt(node_id, "a block is too long")


def _corrupt(node_id: str, why: str) -> KVUnavailableError:
    return KVUnavailableError("corrupt", f"shared node {node_id}: {why}")


class Deadline:
    """Raises KVUnavailableError("too_slow") once a moment has passed."""

    def __init__(self, seconds: float) -> None:
        self._end = time.perf_counter() + seconds

    def __call__(self) -> None:
        if time.perf_counter() > self._end:
            raise KVUnavailableError("too_slow", "computing it again is faster by now")
