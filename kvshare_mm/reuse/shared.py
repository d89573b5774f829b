"""Donors that other replicas made, or that were here once: found in a shared catalogue, taken over
from a shared store.

What is taken over is a donor like any other from then on, with holes where no plan needed its KV.
So the engine plans and edits as ever, and waits for nobody: all of this happens on threads of its
own, and a request that is not helped in time starts without. Whatever goes wrong is a miss, counted
with its reason.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np

from kvshare_mm.errors import KVUnavailableError
from kvshare_mm.index.base import IndexUnavailableError
from kvshare_mm.index.shared import Fingerprints, SharedCatalogue
from kvshare_mm.node import Node, Span
from kvshare_mm.reuse.plan import PlannerOptions, ReusePlan
from kvshare_mm.reuse.publish import Publisher
from kvshare_mm.reuse.repair import RepairPolicy
from kvshare_mm.reuse.scheduler import ReuseScheduler
from kvshare_mm.store.base import NodeKV, StoredNode
from kvshare_mm.store.shared import Deadline, Head, SharedTier, narrowed, painted, rows_of
from kvshare_mm.stream import SegmentStream

logger = logging.getLogger(__name__)

_SECRET = "kvshare:secret"
# Prompts of which less is left to compute are not worth asking for.
_LEAST_COMPUTED = 64
# Donors of this replica that are known to be its own when they had to go and come back.
_MAX_MADE = 65_536
# Tokens a second that are computed, until it was measured, and how fast a measurement replaces it.
_FIRST_RATE, _NEW_SHARE = 2000.0, 0.3

MoreTime = Callable[[float], bool]
"""Asks for so many seconds from now; False: the request has started, or nobody waits for it."""


class Donors(Protocol):
    """What is needed of a `DonorPool`."""

    reuse: ReuseScheduler

    def stored(self, node_id: str, ns: str) -> StoredNode:
        """A donor with its KV. Raises KVUnavailableError."""

    def adopt(self, node: Node, kv: NodeKV) -> bool:
        """Take up a donor that came from elsewhere; False: there was no room for it."""


class SharedDonors:
    """Publishes a replica's donors, and takes over others'.

    Args:
        donors: this replica's.
        tier: KV of all.
        catalogue: where all are found.

    Attributes:
        taken: ids of donors here that were taken over.
    """

    def __init__(self, donors: Donors, tier: SharedTier, catalogue: SharedCatalogue) -> None:
        self.taken: set[str] = set()
        self._made: OrderedDict[str, None] = OrderedDict()  # and published, by this replica
        self._missed = False  # some of these had to go
        self._donors = donors
        self._tier = tier
        self._catalogue = catalogue
        self._counters = donors.reuse.counters
        self._mine = secrets.token_bytes(32)
        self._tokens_per_s = _FIRST_RATE
        self._bytes_per_s: float | None = None
        self._publisher = Publisher(
            donors.stored, tier, catalogue, self._fingerprints, self.taken, self._counters
        )

    def computed(self, tokens: int, seconds: float) -> None:
        """So long it took to compute so many tokens: what taking over has to beat."""
        if tokens >= _LEAST_COMPUTED and seconds > 0:
            self._tokens_per_s += _NEW_SHARE * (tokens / seconds - self._tokens_per_s)

    def seconds(self, tokens: int) -> float:
        """How long it takes to compute so many."""
        return tokens / self._tokens_per_s

    # -- others' donors ---------------------------------------------------------------------

    def bring(
        self,
        stream: SegmentStream,
        ns: str,
        options: PlannerOptions,
        policy: RepairPolicy,
        similar: tuple[str, ...],
        more_time: MoreTime,
    ) -> None:
        """Take over what of others' donors a prompt can use; raises nothing.

        Args: see `ReuseScheduler.find`.
            more_time: has the prompt wait for it.
        """
        try:
            self._bring(stream, ns, options, policy, similar, more_time)
        except KVUnavailableError as error:
            self._counters[f"shared_read_{error.reason}"] += 1
            logger.info("shared donors: %s", error)
        except IndexUnavailableError as error:
            self._counters["shared_catalogue_down"] += 1
            logger.info("shared donors: %s", error)
        except Exception:
            # A cache problem is never a request's problem.
            self._counters["shared_error"] += 1
            logger.exception("shared donors: given up for a prompt")

    def _bring(
        self,
        stream: SegmentStream,
        ns: str,
        options: PlannerOptions,
        policy: RepairPolicy,
        similar: tuple[str, ...],
        more_time: MoreTime,
    ) -> None:
        def plan_with(nodes: Sequence[Node]) -> ReusePlan:
            reuse = self._donors.reuse
            return reuse.find(stream, ns, options, policy, similar, True, nodes).plan

        alone = plan_with(())
        if alone.num_computed < _LEAST_COMPUTED:
            return
        prints = self._fingerprints(ns)
        sparse = prints.of(stream.align_keys, stream.media)
        # Twice as many as are looked at: some may be here already.
        most = 2 * self._donors.reuse.catalogue.max_candidates
        found = self._catalogue.search(prints, sparse, most)
        own = self._catalogue.search(prints, sparse, most, own=True) if self._missed else []
        found = [node_id for node_id in (*found, *own) if not self._whole_here(node_id)][:most]
        if not found:
            return
        if not more_time(self.seconds(alone.num_computed)):
            self._counters["shared_late"] += 1
            return
        begun = time.perf_counter()
        heads = self._heads(found, ns, Deadline(self.seconds(alone.num_computed)))
        nodes = [head.node for head in heads.values()]
        plan = plan_with(nodes)
        saved_s = self.seconds(alone.num_computed - plan.num_computed)
        if alone.num_computed - plan.num_computed < options.min_gain_tokens:
            self._counters["shared_no_gain"] += 1
            return
        wanted = self._wanted(plan, heads, nodes)
        num_bytes = sum(heads[i].num_bytes(rows) for i, rows in wanted.items())
        if self._bytes_per_s is not None and num_bytes / self._bytes_per_s > saved_s:
            self._counters["shared_slower"] += 1
            self._bytes_per_s *= 1 + _NEW_SHARE / 10  # or one bad moment would be for ever
            return
        deadline = Deadline(saved_s - (time.perf_counter() - begun))
        start = time.perf_counter()
        try:
            got = {i: self._tier.rows(heads[i], rows, deadline) for i, rows in wanted.items()}
        except KVUnavailableError as error:
            if error.reason == "too_slow":  # not even that fast, whatever was read by then
                self._measured(num_bytes, max(saved_s, time.perf_counter() - start))
            raise
        self._measured(num_bytes, time.perf_counter() - start)
        self._counters["shared_read_bytes"] += num_bytes
        self._adopt(heads, got, ns)

    def _heads(
        self, node_ids: Sequence[str], ns: str, clock: Callable[[], None]
    ) -> dict[str, Head]:
        """Candidates and the owners of what they borrow, as far as they are to be had."""
        heads: dict[str, Head] = {}
        missing: KVUnavailableError | None = None
        todo = list(dict.fromkeys(node_ids))
        for node_id in todo:
            if node_id in self._publisher.withdrawn:
                continue  # deleted here, and what others borrow from it must not bring it back
            clock()
            try:
                head = self._tier.head(node_id, ns)
            except KVUnavailableError as error:
                if error.reason == "shared_down":
                    raise
                missing = error
                if error.reason == "evicted" and node_id in node_ids:
                    self._publisher.check(node_id, ns)  # or it would hide others that are there
                continue
            if self._gives_more(head.node):
                heads[node_id] = head
            if node_id in node_ids:
                owners = [o for o in head.node.owners if not self._whole_here(o)]
                todo += [o for o in owners if o not in todo]
        if missing is not None and not heads:
            raise missing
        return heads

    def _wanted(
        self, plan: ReusePlan, heads: dict[str, Head], nodes: Sequence[Node]
    ) -> dict[str, np.ndarray]:
        """Which owned rows of which shared node a plan needs: ``[num_owned]`` bool each."""
        spans: dict[str, list[Span]] = {}
        for piece in self._donors.reuse.catalogue.pieces(plan, nodes):
            if piece.owner in heads:
                span = Span(piece.owner_start, piece.owner_start + piece.length)
                spans.setdefault(piece.owner, []).append(span)
        tree = self._donors.reuse.catalogue.tree
        for node_id in spans:
            if (known := tree.get(node_id)) is not None:
                spans[node_id] += known.own  # others borrow it already
        return {i: rows_of(heads[i].node, needed) for i, needed in spans.items()}

    def _adopt(
        self, heads: dict[str, Head], got: dict[str, tuple[np.ndarray, NodeKV]], ns: str
    ) -> None:
        """Make donors of what was fetched, and of what only borrows from that."""
        tree = self._donors.reuse.catalogue.tree
        owned = {
            node_id: painted(
                head.node,
                got[node_id][0] if node_id in got else False,
            )
            for node_id, head in heads.items()
        }

        def borrowed(owner: str, start: int, length: int) -> np.ndarray:
            if owner in got:
                return owned[owner][start : start + length]
            node = tree.get(owner)
            if node is None or node.namespace != ns:
                return np.zeros(length, dtype=bool)
            return painted(node)[start : start + length]

        for node_id, head in heads.items():
            if node_id in got:
                rows, kv = got[node_id]
            elif tree.get(node_id) is None:
                rows, kv = np.zeros(head.node.num_owned, bool), _no_rows(head)
            else:
                continue
            node = narrowed(head.node, rows, borrowed)
            if not node.own and not node.pieces:
                continue
            if not self._gives_more(node) and tree.get(node_id) is not None:
                continue  # it became more here meanwhile, and others may borrow that
            if self._donors.adopt(node, kv):
                self.taken.add(node_id)
                self._counters["shared_taken"] += 1
                self._counters["shared_taken_tokens"] += node.num_owned

    def _whole_here(self, node_id: str) -> bool:
        """Whether all that a node owns is here already, as far as can be told without asking."""
        return node_id not in self.taken and node_id in self._donors.reuse.catalogue.tree

    def _gives_more(self, node: Node) -> bool:
        """Whether a shared node has all that is here under its id, and more."""
        here = self._donors.reuse.catalogue.tree.get(node.node_id)
        if here is None:
            return True
        if len(here) > len(node) or here.exact_len > node.exact_len:
            return False
        every = painted(node)
        mine = painted(here)
        return bool(every[: len(mine)][mine].all()) and every.sum() > mine.sum()

    def _measured(self, num_bytes: int, seconds: float) -> None:
        if not num_bytes:
            return
        rate = num_bytes / max(seconds, 1e-6)
        before = self._bytes_per_s
        self._bytes_per_s = rate if before is None else before + _NEW_SHARE * (rate - before)
        self._counters["shared_read_us"] += int(1e6 * seconds)

    def _fingerprints(self, ns: str) -> Fingerprints:
        # Asked each time: a shared store that was emptied has another secret.
        return _prints(self._tier.remote.agree(_SECRET, self._mine), ns)

    # -- this replica's donors --------------------------------------------------------------

    def publish(self, node_id: str, ns: str) -> None:
        """Share a donor, or its new version, some time later."""
        if node_id not in self.taken:
            self._made[node_id] = None
            if len(self._made) > _MAX_MADE:
                self._made.popitem(last=False)
        self._publisher.publish(node_id, ns)

    def withdraw(self, node_id: str, ns: str) -> None:
        """Share a donor no longer. Replicas that have taken it over keep it."""
        self._made.pop(node_id, None)
        self._publisher.withdraw(node_id, ns)

    def made_here(self, node_id: str) -> bool:
        """Whether a donor that is here is withdrawn from all if it is deleted."""
        return node_id not in self.taken or node_id in self._made

    def forget(self, node_id: str) -> None:
        """A donor is here no longer."""
        self._missed |= node_id in self._made
        self.taken.discard(node_id)

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until all that was given so far is published, or failed; False: time ran out."""
        return self._publisher.flush(timeout_s)

    def close(self, timeout_s: float = 5.0) -> None:
        """Publish what is left, for a few seconds at most, then stop."""
        self._publisher.close(timeout_s)
        self._catalogue.close()
        self._tier.remote.close()


@lru_cache(maxsize=1024)
def _prints(secret: bytes, ns: str) -> Fingerprints:
    return Fingerprints(secret, ns)


def _no_rows(head: Head) -> NodeKV:
    import torch

    k, v = (
        torch.empty((*t.shape[:2], 0, t.shape[3]), dtype=t.dtype)
        for t in (head.types["k"], head.types["v"])
    )
    return NodeKV(k, v, head.k_exponents)
