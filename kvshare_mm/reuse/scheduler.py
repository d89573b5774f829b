"""Decides what is reused and what is kept; holds no KV and no tensors.

Natively it lives in the engine's process, inside vLLM in the scheduler's, and the KV it decides
about in the workers'. Nothing in here may fail a request: what goes wrong is counted with its
reason and the request is computed in full.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from kvshare_mm.identity import text_identity
from kvshare_mm.index.base import IndexRecord
from kvshare_mm.index.semantic import SemanticIndex
from kvshare_mm.node import Node
from kvshare_mm.reuse.calibration import Calibration, Verdict
from kvshare_mm.reuse.catalogue import Catalogue, Found
from kvshare_mm.reuse.divergence import divergence_bound, residual_risk
from kvshare_mm.reuse.orders import Report
from kvshare_mm.reuse.plan import Decline, PlannerOptions, Promise, ReusePlan
from kvshare_mm.reuse.repair import (
    MaxDivergence,
    RepairPolicy,
    asked_divergence,
    repaired_plan,
    with_factor,
)
from kvshare_mm.reuse.tree import healed
from kvshare_mm.stream import Segment, SegmentStream

if TYPE_CHECKING:
    from kvshare_mm.store.states import StateStore

logger = logging.getLogger(__name__)

# Of donors on disk something is known even where RAM is for nothing else.
_LEAST_KNOWN_BYTES = 1 << 20
# What is expected where nothing can be: of KV that nobody may trust.
_MOST_NATS = 1000.0


def namespace(fingerprint: str, salt: str) -> str:
    """The namespace of a model's requests under one salt, which its sender chooses."""
    return f"{fingerprint}-{text_identity(salt)}"


class ReuseScheduler:
    """Donors of one model: finds them, plans with them, takes up finished requests. Thread-safe.

    Args:
        host_bytes: budget of RAM; what is known of donors takes half of it at most, from where on
            the oldest of them are dropped.
        max_candidates: donors aligned with a target.
        num_holders: those that must hold a node's KV before it is a donor.

    Attributes:
        counters: events by name.
        catalogue: the donors.
        semantic: finds donors by meaning; None: nobody does.
        calibration: what audits taught; None: the bound's constants hold as they are.
        default: the policy of requests that ask for none. Families are given up for it, and for
            those that bound divergence, whoever asks for them.
        only_exact: why nothing similar can be reused with this model; None: it can.
        states: of its recurrent layers; None: it can go on from anywhere.
    """

    def __init__(self, host_bytes: int, max_candidates: int = 4, num_holders: int = 1) -> None:
        self.counters: Counter[str] = Counter()
        self.catalogue = Catalogue(self.counters, max_candidates)
        self.semantic: SemanticIndex | None = None
        self.calibration: Calibration | None = None
        self.default: RepairPolicy = MaxDivergence()
        self.only_exact: Decline | None = None
        self.states: StateStore | None = None
        self._max_bytes = max(_LEAST_KNOWN_BYTES, host_bytes // 2)
        self._num_holders = num_holders
        # Nodes whose KV is on its way, with their words; and by how many holders nodes were
        # restored that not all have told of.
        self._saving: dict[str, tuple[Node, str]] = {}
        self._healing: dict[str, Node] = {}
        self._restored: dict[str, int] = {}
        self._touched: list[str] = []
        self._dropped: list[str] = []
        self._changed = threading.Condition()

    # -- a new request ----------------------------------------------------------------------

    def find(
        self,
        stream: SegmentStream,
        ns: str,
        options: PlannerOptions,
        policy: RepairPolicy,
        similar: tuple[str, ...] = (),
        look_only: bool = False,
        beside: Sequence[Node] = (),
    ) -> Found:
        """Plan the reuse of stored requests for a prompt, repairs included.

        Args:
            ns: its namespace; donors of others are never looked at.
            options: when reuse is worth it.
            policy: which kept positions are computed anyway, and what it takes over from
                approximate donors.
            similar: ids that a search by meaning brought in time, if any.
            look_only: the plan will not be carried out.
            beside: nodes that are planned with as if they were here.
        """
        try:
            if self.only_exact is not None:
                return self._resumed(stream, ns, options, policy, self.only_exact)
            start = self._verdict(ns, policy)
            found = self._found(
                stream, ns, options, with_factor(policy, start.factor), similar, beside
            )
            family = self.catalogue.family(found.plan.edited_from)
            verdict = start
            if found.plan.num_reused:
                verdict = self._verdict(ns, policy, family, look_only)
            if verdict.factor > start.factor and found.plan.continued.any():
                # What a donor was continued for is more than this family can be trusted with.
                stricter = with_factor(policy, verdict.factor)
                found = self._found(stream, ns, options, stricter, similar, beside)
                family = self.catalogue.family(found.plan.edited_from)
            begun = time.perf_counter()
            plan = self._kept_to(found.plan, policy, family, verdict)
            return Found(plan, found.lookup, found.planning + time.perf_counter() - begun)
        except Exception:
            # A cache problem is never a request's problem.
            self.counters["lookup_error"] += 1
            logger.exception("donor lookup failed; computing in full")
            return Found(ReusePlan(len(stream), declined=Decline.LOOKUP_ERROR), 0.0, 0.0)

    def _resumed(
        self,
        stream: SegmentStream,
        ns: str,
        options: PlannerOptions,
        policy: RepairPolicy,
        why: Decline,
    ) -> Found:
        """The exact prefix, as far as it can be gone on from."""
        found = self._found(stream, ns, options.but_exact_only(), policy, (), ())
        length = found.plan.num_exact
        if self.states is not None:
            length = self.states.longest(ns, stream.align_keys, length)
        why = Decline.EXACT_ONLY if options.exact_only else why
        return replace(found, plan=found.plan.resumed_at(length, why))

    def _found(
        self,
        stream: SegmentStream,
        ns: str,
        options: PlannerOptions,
        policy: RepairPolicy,
        similar: tuple[str, ...],
        beside: Sequence[Node],
    ) -> Found:
        return self.catalogue.find(
            stream.align_keys,
            ns,
            replace(options, tolerance=policy.tolerance),
            similar,
            stream.positions,
            stream.pictures,
            beside,
        )

    def _verdict(
        self, ns: str, policy: RepairPolicy, family: str | None = None, look_only: bool = False
    ) -> Verdict:
        """Who asks for a policy of their own that promises nothing gets what they ask for."""
        ruled = asked_divergence(policy) is not None or policy == self.default
        if self.calibration is None or not ruled:
            return Verdict(1.0)
        return self.calibration.verdict(ns, family, look_only)

    def _kept_to(
        self, plan: ReusePlan, policy: RepairPolicy, family: str | None, verdict: Verdict
    ) -> ReusePlan:
        """The plan as far as it is to be carried out, with what it promises."""
        if plan.num_reused and verdict.shut:
            return plan.only_exact(Decline.AUDITED)
        plan = repaired_plan(plan, with_factor(policy, verdict.factor))
        if not plan.num_reused or family is None:
            return plan
        asked = asked_divergence(policy)
        bound = min(_MOST_NATS, divergence_bound(residual_risk(plan)))
        promise = Promise(
            family=family,
            asked=MaxDivergence().kl if asked is None else asked,
            bound=bound,
            expected=bound * verdict.factor,
            ruled=asked is not None or policy == self.default,
            trial=verdict.trial,
        )
        return plan.with_promise(promise)

    def similar(self, text: str, ns: str) -> tuple[str, ...]:
        """Donors that mean something similar; takes as long as embedding a prompt does."""
        if self.semantic is None:
            return ()
        return self.semantic.search(ns, text, self.catalogue.max_candidates)

    # -- a finished request -----------------------------------------------------------------

    def save(
        self,
        keys: np.ndarray,
        ns: str,
        plan: ReusePlan,
        text: str,
        attention: np.ndarray | None = None,
        positions: np.ndarray | None = None,
        media: tuple[Segment, ...] = (),
        over: bool = True,
        reads: np.ndarray | None = None,
    ) -> Node | None:
        """What a request is to be stored as; it is a donor once that is reported.

        Args:
            keys: ``[N]`` uint64 keys of prompt and answer, as far as KV was computed.
            ns: its namespace.
            plan: what it was served with.
            text: what it shall be found by.
            attention: ``[P]`` float32, how much the prompt's last position looked at each.
            positions: ``[3, N]`` rotary positions; None: the index.
            media: where its pictures and clips are.
            over: it is finished; else its prompt is stored, and it will come again.
            reads: ``[R, 2]`` computed positions and what they read far before them, if known.

        Returns:
            The node, or None if there is nothing to gain from storing it.
        """
        node = self.catalogue.derive(keys, ns, plan, attention, positions, media, reads)
        if node is None:
            return None
        twin = self.catalogue.twin(node)
        with self._changed:
            if twin is not None:
                # Stored again with each repetition, it would push others out.
                if over:
                    self._touched.append(twin)
                    self.counters["save_known"] += 1
                return None
            self._saving[node.node_id] = node, text
        return node

    def heal(self, node_id: str) -> Node | None:
        """What a node is once the KV of its request was computed in full; it takes its place when
        all holders report that they have it. None: it is gone, or exact already."""
        node = self.catalogue.tree.get(node_id)
        if node is None or node.exact_len == len(node):
            return None
        self._healing[node_id] = healed(node, self.catalogue.tree, None)
        return self._healing[node_id]

    def saving(self, ns: str | None = None) -> list[str]:
        """Nodes of a namespace, or of all, whose KV is on its way."""
        with self._changed:
            return [i for i, (node, _) in self._saving.items() if ns in (None, node.namespace)]

    def wait_saved(self, node_ids: list[str], timeout_s: float) -> bool:
        """Wait until these are donors, or never will be; False if time ran out."""
        with self._changed:
            return self._changed.wait_for(
                lambda: not any(node_id in self._saving for node_id in node_ids), timeout_s
            )

    # -- what became of the KV --------------------------------------------------------------

    def reported(self, report: Report) -> None:
        """Take up what the holders of the KV tell."""
        for node in report.restored:
            held = self._restored.pop(node.node_id, 0) + 1
            if held < self._num_holders:
                self._restored[node.node_id] = held
            else:
                self.counters["restored"] += 1
                self._add(node)
        for node_id, reason in report.not_saved.items():
            self.counters[f"save_{reason}"] += 1
            self.forget(node_id)
        for node_id in report.gone:
            self.forget(node_id)
        for node_id, holders in report.stored.items():
            with self._changed:
                saved = self._saving.get(node_id)
            better = self._healing.pop(node_id, None)
            if holders == self._num_holders:
                mass = report.attention.get(node_id)
                attention = None if mass is None else (mass / holders).astype(np.float32)
                if saved is not None:
                    self._saved(*saved, attention)
                elif better is not None:
                    self._healed(better, attention)

    def _healed(self, node: Node, attention: np.ndarray | None) -> None:
        if attention is not None:
            node = replace(node, attention=attention)
        self.counters["healed"] += self.catalogue.replace(node)

    def _saved(self, node: Node, text: str, attention: np.ndarray | None) -> None:
        self._add(node if attention is None else replace(node, attention=attention))
        self.counters["saved"] += 1
        if self.semantic is not None:
            record = IndexRecord(node.node_id, node.namespace, node.wide_keys)
            self.semantic.add(record, text)
        # Only now: who waits for it looks for it the moment that it is no longer being saved.
        if not self._over(node.node_id):
            self.forget(node.node_id)  # its KV went meanwhile

    def _over(self, node_id: str) -> bool:
        """A node's saving is over; False: it was before."""
        with self._changed:
            was = self._saving.pop(node_id, None) is not None
            self._changed.notify_all()
        return was

    def forget(self, node_id: str) -> None:
        """A node's KV is gone, or never came."""
        self._over(node_id)
        self._healing.pop(node_id, None)
        if self.catalogue.remove(node_id):
            self.counters["forgotten"] += 1
            if self.semantic is not None:
                self.semantic.remove(node_id)

    def adopted(self, node: Node) -> None:
        """A node came from elsewhere, or more of it than was here: it can be found from now on."""
        if self.catalogue.replace(node):
            return
        self._add(node)

    def _add(self, node: Node) -> None:
        self.catalogue.add(node)
        for node_id in self.catalogue.beyond(self._max_bytes):
            self.counters["forgotten_for_room"] += 1
            with self._changed:
                self._dropped.append(node_id)
            self.forget(node_id)

    @property
    def busy(self) -> bool:
        """Whether there are orders, or reports to come."""
        return bool(self._saving or self._touched or self._dropped)

    def orders(self) -> tuple[list[str], list[str]]:
        """Nodes that were asked for again, and nodes whose KV is to be deleted, since the last
        call."""
        with self._changed:
            orders = self._touched, self._dropped
            self._touched, self._dropped = [], []
        return orders

    def close(self) -> None:
        """Finish what was given to the index of meaning, then stop it."""
        if self.semantic is not None:
            self.semantic.close()
