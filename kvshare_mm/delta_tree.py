"""The DELTA tree: stored requests that share KV instead of repeating it.

A node is a stored request. It owns KV only for the positions it computed; for every other position
it holds a *piece* that names the node that owns the KV and where. Pieces always name the owner
itself, never a node that merely points on, so reading a node costs one step however long its
history is, and dropping a node in between loses nothing but what that node owned.

No tensors here: the tree is arithmetic on positions. KV bytes live in `kvshare_mm.store`.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import NamedTuple

import numpy as np

from kvshare_mm.divergence import as_risky_as, passed_on, residual_risk
from kvshare_mm.plan import Donor, ReusePlan
from kvshare_mm.stream import Segment

_MANY = 100
"""So many spans are cheaper painted at once than one by one."""
# Of Python's objects: a node with its ids and the heads of its arrays; a span, piece or medium.
_NODE_BYTES, _PART_BYTES = 1200, 170


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
        """Target index minus owner index. What keys are turned by is told by `plan.one_turn`."""
        return self.start - self.owner_start


@dataclass(frozen=True, slots=True)
class Node:
    """One stored request.

    Attributes:
        node_id: unique id.
        namespace: everything that must be equal before KV may be shared.
        keys: ``[N]`` alignment keys of the request, kept as uint32 if they are tokens only, else as
            uint64.
        own: spans whose KV this node owns, ascending and disjoint.
        pieces: spans whose KV other nodes own, ascending, disjoint, and disjoint from `own`.
        exact_len: positions ``[0, exact_len)`` equal what a full prefill gives.
        attention: ``[P]`` float16, P <= N: how much the prompt's last position looked at each, mean
            over heads and layers; None if it was not recorded.
        drift: ``[P]`` float16, P <= N: how far the KV of each is from what its context gives (see
            `divergence.passed_on`), 0 behind P; None: nowhere.
        risk: the residual risk that it was served with.
        parent: id of the donor this request was edited from (lineage, for people), or None. It may
            be gone.
        created_s: seconds since the epoch.
        positions: ``[3, N]`` int32 rotary positions; None: the index.
        media: where its pictures and clips are.
    """

    node_id: str
    namespace: str
    keys: np.ndarray = field(repr=False)
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

    def __post_init__(self) -> None:
        # Nodes are many, and all in RAM wherever their KV is.
        if self.keys.dtype == np.uint64 and not (self.keys >> 32).any():
            object.__setattr__(self, "keys", self.keys.astype(np.uint32))
        compact = {"attention": np.float16, "drift": np.float16, "positions": np.int32}
        for name, dtype in compact.items():
            if (values := getattr(self, name)) is not None:
                object.__setattr__(self, name, values.astype(dtype, copy=False))
        spans = sorted([*self.own, *(Span(p.start, p.end) for p in self.pieces)])
        end = 0
        for span in spans:
            if span.start < end or span.length <= 0:
                raise ValueError(f"node {self.node_id}: spans overlap or are empty at {span}")
            end = span.end
        if end > len(self.keys) or not 0 <= self.exact_len <= len(self.keys):
            raise ValueError(f"node {self.node_id}: spans or exact_len go beyond the keys")
        for name in ("attention", "drift"):
            if (values := getattr(self, name)) is not None and len(values) > len(self.keys):
                raise ValueError(f"node {self.node_id}: more {name} than keys")
        if self.positions is not None and self.positions.shape != (3, len(self.keys)):
            raise ValueError(f"node {self.node_id}: positions are not [3, {len(self.keys)}]")
        if any(m.end > len(self.keys) for m in self.media):
            raise ValueError(f"node {self.node_id}: media go beyond the keys")
        if list(self.own) != sorted(self.own) or list(self.pieces) != sorted(
            self.pieces, key=lambda p: p.start
        ):
            raise ValueError(f"node {self.node_id}: spans must be ascending")

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def alignment_keys(self) -> np.ndarray:
        """``[N]`` uint64, as prompts and indexes have them."""
        return self.keys.astype(np.uint64)

    @property
    def num_bytes(self) -> int:
        """Bytes that it takes in RAM wherever its KV is."""
        arrays = (self.keys, self.attention, self.drift, self.positions)
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


class DeltaTree:
    """All stored requests of one process.

    Not thread-safe: the engine guards it with the lock that also guards its indexes.

    Args:
        max_owners: a new node borrows from at most this many others. What it would borrow from
            more it owns itself: reading a node stays cheap however its history branched.
    """

    def __init__(self, max_owners: int = 8) -> None:
        if max_owners < 1:
            raise ValueError("max_owners must be at least 1")
        self.max_owners = max_owners
        self._nodes: dict[str, Node] = {}

    def __contains__(self, node_id: object) -> bool:
        return node_id in self._nodes

    def __iter__(self) -> Iterator[Node]:
        """The nodes as they are now, the oldest first."""
        return iter(list(self._nodes.values()))

    def __len__(self) -> int:
        return len(self._nodes)

    def __getitem__(self, node_id: str) -> Node:
        return self._nodes[node_id]

    def get(self, node_id: str) -> Node | None:
        return self._nodes.get(node_id)

    # -- life of a node ---------------------------------------------------------------------

    def derive(
        self,
        node_id: str,
        namespace: str,
        keys: np.ndarray,
        plan: ReusePlan,
        created_s: float,
        attention: np.ndarray | None = None,
        positions: np.ndarray | None = None,
        media: tuple[Segment, ...] = (),
    ) -> Node:
        """The node of a request served with `plan`: it owns only what was computed.

        Args:
            keys: ``[N]`` keys of prompt and answer; ``N`` is at least ``plan.num_tokens``. Behind
                the plan everything was computed.
            attention: ``[P]`` float32 of the prompt's last position, if known.
            positions: ``[3, N]`` rotary positions; None: the index.
            media: where its pictures and clips are.

        Returns:
            A node that is not inserted yet.
        """
        kept = plan.kept
        kept[plan.repair] = False
        pieces: list[Piece] = []
        for run in plan.runs:
            if run.donor not in self._nodes:
                continue  # dropped since it was planned: what it gave is owned
            for span in spans_of(kept[run.start : run.end], run.start):
                pieces.extend(self.resolve(run.donor, span.start, span.length, run.shift))
        borrowed: dict[str, int] = {}
        for piece in pieces:
            borrowed[piece.owner] = borrowed.get(piece.owner, 0) + piece.length
        owners = set(sorted(borrowed, key=lambda o: -borrowed[o])[: self.max_owners])
        pieces = sorted((p for p in pieces if p.owner in owners), key=lambda p: p.start)
        drift = passed_on(plan)
        owned = np.ones(len(keys), dtype=bool)
        for piece in pieces:
            owned[piece.start : piece.end] = False
        return Node(
            node_id=node_id,
            namespace=namespace,
            keys=keys,
            own=spans_of(owned),
            pieces=tuple(pieces),
            # What was computed before anything approximate is what a full prefill gives.
            exact_len=len(keys) if drift is None else int(np.argmax(plan.reused)),
            attention=attention,
            parent=plan.donors[0] if plan.donors and plan.donors[0] in self._nodes else None,
            created_s=created_s,
            positions=positions,
            media=media,
            drift=drift,
            risk=residual_risk(plan),
        )

    def insert(self, node: Node) -> None:
        """Add a node. Pieces whose owner is not (or no longer) here are holes."""
        if node.node_id in self._nodes:
            raise ValueError(f"node {node.node_id} is in the tree already")
        self._nodes[node.node_id] = node

    def drop(self, node_id: str) -> None:
        """Forget a node; an unknown id is not an error.

        Children keep what they own and what others own for them; the rest of what they could read
        are holes from now on. Nothing is rewritten: a node may have thousands of children.
        """
        self._nodes.pop(node_id, None)

    # -- reading ----------------------------------------------------------------------------

    def resolve(self, node_id: str, start: int, length: int, shift: int = 0) -> list[Piece]:
        """Who owns the KV of `length` positions of a node.

        Args:
            start: first position, in target coordinates: the node's position plus `shift`.
            length: number of positions.
            shift: target position minus the node's position.

        Returns:
            Pieces in target coordinates, ascending. Holes are left out.
        """
        node = self._nodes[node_id]
        low, high = start - shift, start - shift + length
        # A heavily edited request has thousands of pieces, and is asked for as many runs.
        found = [
            Piece(node_id, max(s.start, low), max(s.start, low) + shift, n)
            for s in node.own[_overlapping(node.own, low, high)]
            if (n := min(s.end, high) - max(s.start, low)) > 0
        ]
        for piece in node.pieces[_overlapping(node.pieces, low, high)]:
            first = max(piece.start, low)
            n = min(piece.end, high) - first
            if n > 0 and piece.owner in self._nodes:
                found.append(
                    Piece(piece.owner, piece.owner_start + first - piece.start, first + shift, n)
                )
        return sorted(found, key=lambda p: p.start)

    def begins(self, node_id: str) -> bool:
        """Whether the KV of a node's first position can be read; cheap."""
        node = self._nodes.get(node_id)
        if node is None:
            return False
        first = node.pieces[0] if node.pieces else None
        borrowed = first is not None and first.start == 0 and first.owner in self._nodes
        return borrowed or bool(node.own and node.own[0].start == 0)

    def donor(self, node_id: str) -> Donor:
        """The node as the planner sees it."""
        node = self._nodes[node_id]
        owners, owner_start, start, length = _columns(node)
        known = {o: self._nodes[o].exact_len for o in set(owners) if o in self._nodes}
        length = length * np.array([o in known for o in owners], dtype=bool)
        sure = np.array([known.get(o, 0) for o in owners], dtype=np.int64) - owner_start
        readable = _painted(start, length, len(node))
        material = _painted(start, np.clip(sure, 0, length), len(node))
        holes = np.flatnonzero(~readable)
        prefix = int(holes[0]) if len(holes) else len(node)
        exact = min(prefix, node.exact_len)
        attention, drift = _widened(node.attention), _widened(node.drift)
        if drift is not None and attention is not None:
            drift = as_risky_as(drift, attention, node.risk)
        if drift is None and node.exact_len < len(node):
            drift = np.where(np.arange(len(node)) < node.exact_len, 0, np.float32(np.inf))
        return Donor(
            node_id,
            node.alignment_keys,
            material,
            prefix,
            exact,
            attention,
            node.positions,
            drift,
        )

    @property
    def num_tokens_owned(self) -> int:
        """Positions whose KV is held."""
        return sum(n.num_owned for n in self)

    @property
    def num_tokens_whole(self) -> int:
        """Positions that would be held if every readable request were stored whole."""
        return sum(
            n.num_owned + sum(p.length for p in n.pieces if p.owner in self._nodes) for n in self
        )


def _widened(values: np.ndarray | None) -> np.ndarray | None:
    return None if values is None else values.astype(np.float32)


def _overlapping(spans: Sequence[Span] | Sequence[Piece], low: int, high: int) -> slice:
    """Those of ascending, disjoint spans that reach into ``[low, high)``."""
    first = bisect_right(spans, low, key=attrgetter("end"))
    return slice(first, bisect_left(spans, high, lo=first, key=attrgetter("start")))


def _columns(node: Node) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
    """Owner, owner's start, start and length (int64) of all that a node owns or borrows."""
    owned = [Piece(node.node_id, span.start, span.start, span.length) for span in node.own]
    parts = [*owned, *node.pieces]
    owner_start, start, length = (
        np.array([part[i] for part in parts], dtype=np.int64) for i in (1, 2, 3)
    )
    return [part.owner for part in parts], owner_start, start, length


def _painted(start: np.ndarray, length: np.ndarray, n: int) -> np.ndarray:
    """``[n]`` bool: positions in one of the disjoint spans."""
    if len(start) < _MANY:
        mask = np.zeros(n, dtype=bool)
        for first, end in zip(start.tolist(), (start + length).tolist(), strict=True):
            mask[first:end] = True
        return mask
    begun = np.bincount(start, minlength=n + 1) - np.bincount(start + length, minlength=n + 1)
    return np.cumsum(begun)[:n] > 0


def spans_of(mask: np.ndarray, offset: int = 0) -> tuple[Span, ...]:
    """Spans of the true positions of `mask`, moved by `offset`."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], mask.astype(np.int8), [0]))))
    return tuple(Span(int(a) + offset, int(b) + offset) for a, b in edges.reshape(-1, 2))
