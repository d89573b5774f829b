"""What is known of the donors without their KV: the DELTA tree, the indexes, plans from them.

No tensors: a scheduler can have one while the KV lies in other processes.
"""

from __future__ import annotations

import math
import threading
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from kvshare_mm.errors import KVUnavailableError
from kvshare_mm.index.base import IndexRecord
from kvshare_mm.index.lexical import LexicalIndex
from kvshare_mm.index.prefix import PrefixIndex
from kvshare_mm.node import Node, Piece
from kvshare_mm.reuse.align import common_prefix
from kvshare_mm.reuse.plan import Donor, PlannerOptions, ReusePlan
from kvshare_mm.reuse.planner import make_plan
from kvshare_mm.reuse.tree import DeltaTree
from kvshare_mm.reuse.words import joined_positions
from kvshare_mm.stream import Segment

_MIN_STORED_TOKENS = 16
# Requests that begin like a target and may be approximate; those looked at for the exact prefix,
# which may be lost with its owner.
_PREFIX_CANDIDATES = 2
_EXACT_CANDIDATES = 32
# Nodes whose tree is known, and what one takes.
_MAX_RELATED, _RELATED_BYTES = 1 << 16, 250
# Those passed over because their very begin is lost.
_MAX_LOST = 2048


@dataclass(frozen=True, slots=True)
class Found:
    """A plan with what it took to make it, in seconds."""

    plan: ReusePlan
    lookup: float
    planning: float


class Catalogue:
    """Donors of one model, without their KV. Thread-safe.

    Args:
        counters: events by name are counted here.
        max_candidates: donors aligned with a target.

    Attributes:
        joining: tokens that go on with the word before them (see `words`); None: plans do not tell.
        each_axis: see `PlannerOptions`.
    """

    def __init__(self, counters: Counter[str], max_candidates: int = 4) -> None:
        self.tree = DeltaTree()
        self.max_candidates = max_candidates
        self.joining: np.ndarray | None = None
        self.each_axis = False
        self._counters = counters
        self._lexical = LexicalIndex()
        self._prefixes = PrefixIndex()
        self._exact = PrefixIndex()
        self._families = _Families()
        self._node_bytes = 0
        self._lock = threading.RLock()

    def find(
        self,
        keys: np.ndarray,
        ns: str,
        options: PlannerOptions,
        similar: tuple[str, ...] = (),
        positions: np.ndarray | None = None,
        pictures: np.ndarray | None = None,
        beside: Sequence[Node] = (),
    ) -> Found:
        """Plan the reuse of stored requests for a prompt.

        Args:
            keys: ``[N]`` uint64 alignment keys.
            ns: the request's namespace; donors of others are never looked at.
            options: when reuse is worth it.
            similar: ids that a dense search brought in time, if any.
            positions: ``[3, N]`` rotary positions; None: the index.
            pictures: ``[N]`` bool: positions that are pictures; None: none are.
            beside: nodes that are planned with as if they were here, in the place of what is
                known by their ids.
        """
        start = time.perf_counter()
        alike: list[str] = []
        prefixes = self._prefixes.longest(ns, keys, _PREFIX_CANDIDATES)
        if not options.exact_only:
            alike = [c.node_id for c in self._lexical.search(ns, keys, self.max_candidates)]
        exact = self._longest_exact(ns, keys)
        with self._lock:
            alike = self._with_chief_owners([*alike, *similar])[: self.max_candidates]
            shared = [node.node_id for node in beside]
            donors = self._donors([*exact, *prefixes, *shared, *alike], ns, beside)
            found = time.perf_counter()
        options = replace(options, each_axis=self.each_axis)
        plan = make_plan(keys, donors, options, positions, pictures)
        if self.joining is not None:
            plan = replace(plan, joined=joined_positions(keys, self.joining))
        return Found(plan, found - start, time.perf_counter() - found)

    def pieces(self, plan: ReusePlan, beside: Sequence[Node] = ()) -> list[Piece]:
        """Who owns the KV of a plan's kept runs. Raises KVUnavailableError("evicted").

        Args:
            beside: what it was planned with, see `find`.
        """
        found: list[Piece] = []
        with self._lock:
            tree = self.tree.beside(beside) if beside else self.tree
            for run in plan.runs:
                parts = (
                    tree.resolve(run.donor, run.start, run.length, run.shift)
                    if run.donor in tree
                    else []
                )
                if sum(p.length for p in parts) != run.length:
                    raise KVUnavailableError("evicted", f"donor {run.donor} is no longer whole")
                found.extend(parts)
        return found

    def derive(
        self,
        keys: np.ndarray,
        ns: str,
        plan: ReusePlan,
        attention: np.ndarray | None = None,
        positions: np.ndarray | None = None,
        media: tuple[Segment, ...] = (),
        reads: np.ndarray | None = None,
    ) -> Node | None:
        """The node of a finished request, not yet added; None: it is too short to be one.

        Args: see `DonorPool.save`.
        """
        if len(keys) < _MIN_STORED_TOKENS:
            return None
        with self._lock:
            return self.tree.derive(
                uuid.uuid4().hex,
                ns,
                keys.copy(),
                plan,
                time.time(),
                attention,
                positions,
                media,
                reads,
            )

    def twin(self, node: Node) -> str | None:
        """A donor that gives all that `node` would, as exactly; None: there is none."""
        keys = node.wide_keys
        with self._lock:
            for donor in self._donors(self._prefixes.longest(node.namespace, keys), node.namespace):
                whole = donor.readable >= len(keys) and np.array_equal(
                    donor.align_keys[: len(keys)], keys
                )
                if whole and _nowhere_looser(donor.drift, node.drift, len(keys)):
                    return donor.donor_id
        return None

    def add(self, node: Node) -> None:
        """A node's KV is stored: it can be found from now on."""
        keys = node.wide_keys
        with self._lock:
            self.tree.insert(node)
            self._families.add(node)
            self._node_bytes += node.num_bytes
        # The indexes have locks of their own, and nobody waits while n-grams are hashed.
        record = IndexRecord(node.node_id, node.namespace, keys)
        self._lexical.add([record])
        self._prefixes.add([record])
        self._exact.add([replace(record, align_keys=keys[: node.exact_len])])
        if node.node_id not in self.tree:  # removed meanwhile
            self._remove_from_indexes(node.node_id)

    def replace(self, node: Node) -> bool:
        """A node is another now, with the same tokens or more behind them; False: it is gone."""
        with self._lock:
            before = self.tree.get(node.node_id)
            if before is None:
                return False
            self.tree.replace(node)
            self._node_bytes += node.num_bytes - before.num_bytes
        record = IndexRecord(node.node_id, node.namespace, node.wide_keys)
        for index in (self._lexical, self._prefixes) if len(node) > len(before) else ():
            index.remove([node.node_id])
            index.add([record])
        self._exact.remove([node.node_id])
        self._exact.add([replace(record, align_keys=record.align_keys[: node.exact_len])])
        if node.node_id not in self.tree:  # removed meanwhile
            self._remove_from_indexes(node.node_id)
        return True

    def overlap(self, ns: str, keys: np.ndarray) -> float:
        """Of a prompt's n-grams, the share that the donor has that has most of them, 0 to 1."""
        return self._lexical.closest([ns], keys, 1).get(ns, ("", 0.0))[1]

    def family(self, node_id: str | None) -> str | None:
        """The root of a node's tree, be it here or gone."""
        with self._lock:
            return self._families.of(node_id)

    def remove(self, node_id: str) -> bool:
        """A node's KV is gone; False: it was not known."""
        with self._lock:
            node = self.tree.get(node_id)
            if node is None:
                return False
            self.tree.drop(node_id)
            self._node_bytes -= node.num_bytes
        self._remove_from_indexes(node_id)
        return True

    @property
    def num_bytes(self) -> int:
        """Bytes of RAM that the donors take wherever their KV is: keys, what they looked at, the
        indexes."""
        indexes = (self._lexical, self._prefixes, self._exact)
        kept = self._node_bytes + self._families.num_bytes
        return kept + sum(index.num_bytes for index in indexes)

    def beyond(self, max_bytes: int) -> list[str]:
        """The oldest donors, so many that the others take at most about `max_bytes`."""
        with self._lock:
            self._families.shrink(max_bytes // 8)
            over, count = self.num_bytes - max_bytes, len(self.tree)
            if over <= 0:
                return []
            oldest = list(islice(self.tree, math.ceil(count * over / self.num_bytes)))
            return [node.node_id for node in oldest]

    def nodes(self) -> list[Node]:
        """All donors as they are now."""
        with self._lock:
            return list(self.tree)

    # -- inside -----------------------------------------------------------------------------

    def _donors(self, ids: list[str], ns: str, beside: Sequence[Node] = ()) -> list[Donor]:
        """Donors by id, each once, of this namespace only; caller holds the lock."""
        donors = []
        tree = self.tree.beside(beside) if beside else self.tree
        for node_id in dict.fromkeys(ids):
            node = tree.get(node_id)
            if node is not None and node.namespace == ns:
                donors.append(tree.donor(node_id))
        return donors

    def _remove_from_indexes(self, node_id: str) -> None:
        for index in (self._lexical, self._prefixes, self._exact):
            index.remove([node_id])

    def _longest_exact(self, ns: str, keys: np.ndarray) -> list[str]:
        """The donor with the longest exact prefix of a prompt that can be read."""
        best: list[str] = []
        reach = looked = lost = 0
        for length, ids in self._exact.descending(ns, keys):
            if reach >= length or looked >= _EXACT_CANDIDATES or lost >= _MAX_LOST:
                break
            for node_id in ids:
                with self._lock:
                    if not self.tree.begins(node_id):
                        lost += 1
                        continue
                    found = self._donors([node_id], ns)
                looked += 1
                for donor in found:
                    exact = min(common_prefix(donor.align_keys, keys), donor.exact_len)
                    if exact > reach:
                        reach, best = exact, [node_id]
                if reach >= length or looked >= _EXACT_CANDIDATES:
                    break
        return best

    def _with_chief_owners(self, ids: list[str]) -> list[str]:
        """Each id followed by the node that owns most of its KV; caller holds the lock.

        What a request repaired is no material for others, so a pool of edited requests alone wears
        out: each new one finds less to keep. The request they came from has it all.
        """
        found: dict[str, None] = {}
        for node_id in ids:
            found[node_id] = None
            node = self.tree.get(node_id)
            owners = {} if node is None else node.owners
            still_here = [owner for owner in owners if owner in self.tree]
            if still_here:
                found[max(still_here, key=lambda owner: owners[owner])] = None
        return list(found)


class _Families:
    """Which tree a node is of. Nodes that are gone are remembered for a while: those that were
    edited from them are still related."""

    def __init__(self) -> None:
        self._roots: dict[str, str] = {}

    def add(self, node: Node) -> None:
        root = node.node_id if node.parent is None else self._roots.get(node.parent, node.parent)
        self._roots[node.node_id] = root
        if len(self._roots) > _MAX_RELATED:
            del self._roots[next(iter(self._roots))]

    def shrink(self, max_bytes: int) -> None:
        """Forget the oldest beyond so many bytes."""
        while self.num_bytes > max_bytes:
            del self._roots[next(iter(self._roots))]

    def of(self, node_id: str | None) -> str | None:
        return None if node_id is None else self._roots.get(node_id, node_id)

    @property
    def num_bytes(self) -> int:
        return _RELATED_BYTES * len(self._roots)


def _nowhere_looser(drift: np.ndarray | None, other: np.ndarray | None, length: int) -> bool:
    """Whether none of the first `length` positions is further off than with the `other` drift."""
    padded = np.zeros((2, length), np.float16)
    for row, values in zip(padded, (drift, other), strict=True):
        if values is not None:
            row[: len(values)] = values[:length]
    return bool((padded[0] <= padded[1]).all())
