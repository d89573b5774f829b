"""The DELTA tree: stored requests that share KV instead of repeating it.

A node is a stored request. It owns KV only for the positions it computed; for every other position
it holds a *piece* that names the node that owns the KV and where. Pieces always name the owner
itself, never a node that merely points on, so reading a node costs one step however long its
history is, and dropping a node in between loses nothing but what that node owned.

No tensors here: the tree is arithmetic on positions. KV bytes live in `kvshare_mm.store`.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import ChainMap
from collections.abc import Container, Iterator, MutableMapping, Sequence
from dataclasses import replace
from operator import attrgetter

import numpy as np

from kvshare_mm.node import Node, Piece, Span, spans_of
from kvshare_mm.reuse.dependents import all_reads
from kvshare_mm.reuse.divergence import as_risky_as, passed_on, residual_risk
from kvshare_mm.reuse.plan import Donor, ReusePlan
from kvshare_mm.stream import Segment

_MANY = 100
"""So many spans are cheaper painted at once than one by one."""


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
        self._nodes: MutableMapping[str, Node] = {}

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
        reads: np.ndarray | None = None,
    ) -> Node:
        """The node of a request served with `plan`: it owns only what was computed.

        Args:
            keys: ``[N]`` keys of prompt and answer; ``N`` is at least ``plan.num_tokens``. Behind
                the plan everything was computed.
            attention: ``[P]`` float32 of the prompt's last position, if known.
            positions: ``[3, N]`` rotary positions; None: the index.
            media: where its pictures and clips are.
            reads: ``[R, 2]`` of the computed positions, if known.

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
            align_keys=keys,
            own=spans_of(owned),
            pieces=tuple(pieces),
            exact_len=len(keys) if drift is None else _exact_len(plan, media),
            attention=attention,
            parent=plan.edited_from if plan.edited_from in self._nodes else None,
            created_s=created_s,
            positions=positions,
            media=media,
            drift=drift,
            risk=residual_risk(plan),
            reads=all_reads(plan, reads),
        )

    def insert(self, node: Node) -> None:
        """Add a node. Pieces whose owner is not (or no longer) here are holes."""
        if node.node_id in self._nodes:
            raise ValueError(f"node {node.node_id} is in the tree already")
        self._nodes[node.node_id] = node

    def replace(self, node: Node) -> None:
        """Put another node in the place of one of the same id that owns no more than it does."""
        self._nodes[node.node_id] = node

    def drop(self, node_id: str) -> None:
        """Forget a node; an unknown id is not an error.

        Children keep what they own and what others own for them; the rest of what they could read
        are holes from now on. Nothing is rewritten: a node may have thousands of children.
        """
        self._nodes.pop(node_id, None)

    def beside(self, nodes: Sequence[Node]) -> DeltaTree:
        """A tree of these nodes and all of this one, to be looked at only and for a moment."""
        tree = DeltaTree(self.max_owners)
        tree._nodes = ChainMap({node.node_id: node for node in nodes}, self._nodes)
        return tree

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
            if n > 0 and self._has(piece):
                found.append(
                    Piece(piece.owner, piece.owner_start + first - piece.start, first + shift, n)
                )
        return sorted(found, key=lambda p: p.start)

    def _has(self, piece: Piece) -> bool:
        """Whether its owner is here with all of it: one that was taken over anew may have less."""
        owner = self._nodes.get(piece.owner)
        return owner is not None and owner.owned_row(piece.owner_start, piece.length) is not None

    def begins(self, node_id: str) -> bool:
        """Whether the KV of a node's first position can be read; cheap."""
        node = self._nodes.get(node_id)
        if node is None:
            return False
        first = node.pieces[0] if node.pieces else None
        borrowed = first is not None and first.start == 0 and self._has(first)
        return borrowed or bool(node.own and node.own[0].start == 0)

    def donor(self, node_id: str) -> Donor:
        """The node as the planner sees it."""
        node = self._nodes[node_id]
        owners, owner_start, start, length = _columns(node)
        known = {o: self._nodes[o].exact_len for o in set(owners) if o in self._nodes}
        here = [True] * len(node.own) + [self._has(piece) for piece in node.pieces]
        length = length * np.array(here, dtype=bool)
        sure = np.array([known.get(o, 0) for o in owners], dtype=np.int64) - owner_start
        readable = _painted(start, length, len(node))
        reusable = _painted(start, np.clip(sure, 0, length), len(node))
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
            node.wide_keys,
            reusable,
            prefix,
            exact,
            attention,
            node.positions,
            drift,
            node.reads,
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


def extended(node: Node, keys: np.ndarray, positions: np.ndarray | None) -> Node:
    """A node that goes on: behind its tokens, all was computed.

    Args:
        keys: ``[N]`` uint64 of all, the node's first.
        positions: ``[3, N]`` rotary positions; None: the index.
    """
    owned = np.zeros(len(keys), dtype=bool)
    owned[len(node) :] = True
    for span in node.own:
        owned[span.start : span.end] = True
    return replace(
        node,
        align_keys=keys,
        own=spans_of(owned),
        exact_len=len(keys) if node.exact_len == len(node) else node.exact_len,
        positions=positions,
    )


def healed(node: Node, here: Container[str], attention: np.ndarray | None) -> Node:
    """A node whose KV was computed in full: exact everywhere, and its own where it was not before.

    Args:
        here: ids of nodes that it may go on borrowing from.
        attention: what the prompt's last position looked at then; None: as it is known.
    """
    pieces = tuple(
        piece._replace(length=min(piece.end, node.exact_len) - piece.start)
        for piece in node.pieces
        if piece.start < node.exact_len and piece.owner in here
    )
    owned = np.ones(len(node), dtype=bool)
    for piece in pieces:
        owned[piece.start : piece.end] = False
    return replace(
        node,
        own=spans_of(owned),
        pieces=pieces,
        exact_len=len(node),
        attention=node.attention if attention is None else attention,
        drift=None,
        risk=0.0,
    )


def _exact_len(plan: ReusePlan, media: Sequence[Segment]) -> int:
    """What was computed before anything approximate is what a full prefill gives; but for a medium
    that goes on with that, whose positions may see each other."""
    first = int(np.argmax(plan.reused))
    return next((item.start for item in media if item.start <= first < item.end), first)


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
