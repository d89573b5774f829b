"""A stored request: what it owns the KV of, and whose KV stands at its other positions.

No tensors here: KV bytes live in `kvshare_mm.store`, what nodes make together in `reuse.tree`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from kvshare_mm.stream import Segment

# Of Python's objects: a node with its ids and the heads of its arrays; a span, piece or medium.
_NODE_BYTES, _PART_BYTES = 1200, 170
# Pairs of one position: six heads give 30% of their attention to three others at most.
_MOST_READS = 18


class Span(NamedTuple):
    """Positions ``[start, end)``."""

    start: int
    end: int

    @property
    def length(self) -> int:
        return self.end - self.start


class Piece(NamedTuple):
    """`length` positions from `start` whose KV is `owner`'s from `owner_start`."""

    owner: str
    owner_start: int
    start: int
    length: int

    @property
    def end(self) -> int:
        return self.start + self.length

    @property
    def shift(self) -> int:
        """Target index minus owner index. Keys move by `plan.turn_of`."""
        return self.start - self.owner_start


@dataclass(frozen=True, slots=True)
class Node:
    """One stored request.

    Attributes:
        node_id: unique id.
        namespace: everything that must be equal before KV may be shared.
        align_keys: ``[N]`` of the request, kept as uint32 if they are tokens only, else as uint64.
        own: spans whose KV this node owns, ascending and disjoint.
        pieces: spans whose KV other nodes own, ascending, disjoint, and disjoint from `own`.
        exact_len: positions ``[0, exact_len)`` equal what a full prefill gives.
        attention: ``[P]`` float16, P <= N: how much the prompt's last position looked at each, mean
            over heads and layers; None if it was not recorded.
        drift: ``[P]`` float16, P <= N: how far the KV of each is from what its context gives (see
            `divergence.passed_on`), 0 behind P; None: nowhere.
        reads: ``[R, 2]`` int32: a position and one far before it that it reads, see `reads.Reads`;
            None: unknown.
        risk: the residual risk that it was served with.
        parent: id of the donor this request was edited from (lineage, for people), or None. It may
            be gone.
        created_s: seconds since the epoch.
        positions: ``[3, N]`` int32 rotary positions; None: the index.
        media: where its pictures and clips are.
    """

    node_id: str
    namespace: str
    align_keys: np.ndarray = field(repr=False)
    own: tuple[Span, ...]
    pieces: tuple[Piece, ...] = ()
    exact_len: int = 0
    attention: np.ndarray | None = field(default=None, repr=False)
    parent: str | None = None
    created_s: float = 0.0
    positions: np.ndarray | None = field(default=None, repr=False)
    media: tuple[Segment, ...] = ()
    drift: np.ndarray | None = field(default=None, repr=False)
    risk: float = 0.0
    reads: np.ndarray | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        # Nodes are many, and all in RAM wherever their KV is.
        if self.align_keys.dtype == np.uint64 and not (self.align_keys >> 32).any():
            object.__setattr__(self, "align_keys", self.align_keys.astype(np.uint32))
        if self.reads is not None and not _are_reads(self.reads, len(self.align_keys)):
            raise ValueError(f"node {self.node_id}: reads are not pairs of its positions")
        compact = {
            "attention": np.float16,
            "drift": np.float16,
            "positions": np.int32,
            "reads": np.int32,
        }
        for name, dtype in compact.items():
            if (values := getattr(self, name)) is not None:
                object.__setattr__(self, name, values.astype(dtype, copy=False))
        spans = sorted([*self.own, *(Span(p.start, p.end) for p in self.pieces)])
        end = 0
        for span in spans:
            if span.start < end or span.length <= 0:
                raise ValueError(f"node {self.node_id}: spans overlap or are empty at {span}")
            end = span.end
        if end > len(self.align_keys) or not 0 <= self.exact_len <= len(self.align_keys):
            raise ValueError(f"node {self.node_id}: spans or exact_len go beyond the keys")
        for name in ("attention", "drift"):
            if (values := getattr(self, name)) is not None and len(values) > len(self.align_keys):
                raise ValueError(f"node {self.node_id}: more {name} than keys")
        if self.positions is not None and self.positions.shape != (3, len(self.align_keys)):
            raise ValueError(f"node {self.node_id}: positions are not [3, {len(self.align_keys)}]")
        if any(m.end > len(self.align_keys) for m in self.media):
            raise ValueError(f"node {self.node_id}: media go beyond the keys")
        if list(self.own) != sorted(self.own) or list(self.pieces) != sorted(
            self.pieces, key=lambda p: p.start
        ):
            raise ValueError(f"node {self.node_id}: spans must be ascending")

    def __len__(self) -> int:
        return len(self.align_keys)

    @property
    def wide_keys(self) -> np.ndarray:
        """``[N]`` uint64, as prompts and indexes have them."""
        return self.align_keys.astype(np.uint64)

    @property
    def num_bytes(self) -> int:
        """Bytes that it takes in RAM wherever its KV is."""
        arrays = (self.align_keys, self.attention, self.drift, self.positions, self.reads)
        parts = len(self.own) + len(self.pieces) + len(self.media)
        return _NODE_BYTES + _PART_BYTES * parts + sum(a.nbytes for a in arrays if a is not None)

    @property
    def num_owned(self) -> int:
        """Number of positions whose KV this node owns."""
        return sum(s.length for s in self.own)

    @property
    def owners(self) -> dict[str, int]:
        """Positions borrowed, by the id of the node that owns their KV."""
        borrowed: dict[str, int] = {}
        for piece in self.pieces:
            borrowed[piece.owner] = borrowed.get(piece.owner, 0) + piece.length
        return borrowed

    def owned_row(self, start: int, length: int) -> int | None:
        """Row of `start` in the owned KV; None unless the `length` positions are in one span."""
        row = 0
        for span in self.own:
            if span.start <= start and start + length <= span.end:
                return row + start - span.start
            row += span.length
        return None


def _are_reads(reads: np.ndarray, length: int) -> bool:
    if reads.ndim != 2 or reads.shape[1] != 2 or not np.issubdtype(reads.dtype, np.integer):
        return False
    reader, read = reads.T
    some = bool(((read >= 0) & (read < reader) & (reader < length)).all())
    return some and len(reads) <= _MOST_READS * length


def spans_of(mask: np.ndarray, offset: int = 0) -> tuple[Span, ...]:
    """Spans of the true positions of `mask`, moved by `offset`."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], mask.astype(np.int8), [0]))))
    return tuple(Span(int(a) + offset, int(b) + offset) for a, b in edges.reshape(-1, 2))
