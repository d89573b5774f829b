"""The pool of donors of an engine that holds their KV itself: what decides, and the store."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import numpy as np
import torch

from kvshare_mm.errors import KVUnavailableError
from kvshare_mm.index.base import IndexRecord
from kvshare_mm.index.semantic import Opened, SemanticIndex
from kvshare_mm.node import Node
from kvshare_mm.reuse.answers import likely_answer
from kvshare_mm.reuse.editor import KVEditor
from kvshare_mm.reuse.orders import Report
from kvshare_mm.reuse.plan import Decline, ReusePlan
from kvshare_mm.reuse.scheduler import ReuseScheduler
from kvshare_mm.reuse.shared import SharedDonors
from kvshare_mm.reuse.tree import extended, healed
from kvshare_mm.reuse.worker import ReuseWorker
from kvshare_mm.store.base import NodeKV, StoredNode
from kvshare_mm.store.disk import DiskTier
from kvshare_mm.store.host import HostTier
from kvshare_mm.store.states import StateStore
from kvshare_mm.store.tiered import TieredStore
from kvshare_mm.stream import Segment

_Record = tuple[Node, np.ndarray | None]


class DonorPool:
    """Donors of one model, and their KV.

    Args:
        fingerprint: the model's; stored nodes of other models are left alone.
        editor: of its KV.
        host: RAM tier.
        disk: disk tier, or None.
        open_dense: opens the index of meaning and its embedder, or None: none is used.
        max_candidates: donors aligned with a target.
        joining: tokens that go on with the word before them (see `words`); None: unknown.
        only_exact: see `ReuseScheduler`.

    Attributes:
        reuse: finds them and plans with them.
        states: of the model's recurrent layers.
        shared: shares them with other replicas; None: nobody does.
    """

    def __init__(
        self,
        fingerprint: str,
        editor: KVEditor,
        host: HostTier,
        disk: DiskTier | None = None,
        open_dense: Callable[[], Opened] | None = None,
        max_candidates: int = 4,
        joining: np.ndarray | None = None,
        only_exact: Decline | None = None,
        packed: bool = False,
    ) -> None:
        self.store = TieredStore(host, disk, self.forget)
        self.states = StateStore(self.store)
        self.worker = ReuseWorker(self.store, editor, packed)
        self.reuse = ReuseScheduler(self.store.host_bytes, max_candidates)
        self.reuse.catalogue.joining = joining
        self.reuse.catalogue.each_axis = editor.each_axis
        self.reuse.only_exact = only_exact
        if only_exact is Decline.RECURRENT_LAYERS:
            self.reuse.states = self.states
        self.counters = self.reuse.counters
        self.tree = self.reuse.catalogue.tree
        self.shared: SharedDonors | None = None
        if disk is not None and disk.num_corrupt:
            self.counters["damaged_at_start"] = disk.num_corrupt
        for reason, count in disk.left_alone.items() if disk is not None else ():
            self.counters[f"{reason}_at_start"] = count
        known = self._restore(fingerprint)
        if open_dense is not None:
            self.reuse.semantic = SemanticIndex(
                open_dense, known, self.store.update_embedding, self.counters
            )

    # -- a new request ----------------------------------------------------------------------

    def load(
        self,
        plan: ReusePlan,
        ns: str,
        k: torch.Tensor,
        v: torch.Tensor,
        positions: np.ndarray | None,
    ) -> None:
        """Write what a plan keeps into a slot, see `ReuseWorker.load`."""
        self.worker.load(self.reuse.catalogue.pieces(plan), ns, k, v, positions)

    def likely_answer(self, plan: ReusePlan, target: np.ndarray) -> np.ndarray:
        """``[A]`` int64: what the target of a plan may be answered, see `answers.likely_answer`;
        empty: nobody knows."""
        donor = self.tree.get(plan.edited_from or "")
        return np.empty(0, np.int64) if donor is None else likely_answer(donor, plan, target)

    def nodes(self) -> list[Node]:
        """All donors as they are now."""
        return self.reuse.catalogue.nodes()

    # -- a finished request -----------------------------------------------------------------

    def save(
        self,
        keys: np.ndarray,
        ns: str,
        plan: ReusePlan,
        k: torch.Tensor,
        v: torch.Tensor,
        text: str,
        attention: np.ndarray | None = None,
        positions: np.ndarray | None = None,
        media: tuple[Segment, ...] = (),
        over: bool = True,
        reads: np.ndarray | None = None,
    ) -> str | None:
        """Take up a request as a donor, see `ReuseScheduler.save`.

        Args:
            k: ``[num_layers, num_kv_heads, >= N, head_dim]`` its keys; copied.
            v: its values; copied.

        Returns:
            The new node's id, or None if it did not become a donor.
        """
        node = self.reuse.save(keys, ns, plan, text, attention, positions, media, over, reads)
        if node is not None:
            report = self.worker.save(node, k, v, "now" if over else "borrowed")
            if report.not_saved and not over:
                self.reuse.forget(node.node_id)  # it will be tried again
            else:
                self.reuse.reported(report)
                if over:
                    self._publish(node)
        self._carry_out()
        return node.node_id if node is not None and node.node_id in self.tree else None

    def extend(
        self,
        node_id: str,
        keys: np.ndarray,
        k: torch.Tensor,
        v: torch.Tensor,
        positions: np.ndarray | None = None,
    ) -> bool:
        """Take up what was computed behind a node; False: the node is gone, or was not grown.

        Args:
            keys: ``[N]`` uint64 of all, the node's first.
            k: ``[num_layers, num_kv_heads, >= N, head_dim]`` all keys; copied.
            v: the values; copied.
            positions: ``[3, N]`` rotary positions; None: the index.
        """
        node = self.tree.get(node_id)
        if node is None:
            return False
        done = self._replace(extended(node, keys, positions), k, v)
        self._carry_out()
        return done

    def heal(
        self, node_id: str, k: torch.Tensor, v: torch.Tensor, attention: np.ndarray | None = None
    ) -> bool:
        """Take the KV of a request that was computed in full for that of its node; False: the node
        is gone.

        Args:
            k: ``[num_layers, num_kv_heads, >= N, head_dim]`` the keys of all that it holds; copied.
            v: its values; copied.
            attention: ``[P]`` float32, how much the prompt's last position looked at each.
        """
        node = self.tree.get(node_id)
        if node is None or node.exact_len == len(node):
            return False
        if not self._replace(healed(node, self.tree, attention), k, v):
            return False
        self.counters["healed"] += 1
        self._carry_out()
        return True

    def _replace(self, node: Node, k: torch.Tensor, v: torch.Tensor) -> bool:
        """Keep a node instead of the one of its id; False: that is gone."""
        try:
            if not self.worker.replace(node, k, v):
                return False
        except KVUnavailableError:  # it went meanwhile
            return False
        if not self.reuse.catalogue.replace(node):
            self.store.delete(node.node_id)  # it was deleted meanwhile, and is back by this
            return False
        self._publish(node)
        return True

    def _publish(self, node: Node) -> None:
        if self.shared is not None:
            self.shared.publish(node.node_id, node.namespace)

    def stored(self, node_id: str, ns: str) -> StoredNode:
        """A donor with its KV. Raises KVUnavailableError."""
        return self.store.get(node_id, ns)

    def adopt(self, node: Node, kv: NodeKV) -> bool:
        """Take up a donor that another replica made, or more of it than was here, for RAM only;
        False: there was no room for it."""
        self.store.put(StoredNode(node, kv), "never")
        self.reuse.adopted(node)
        here = self.store.resident(node.node_id) is not None
        if not here:
            self.forget(node.node_id)
        self._carry_out()
        return here

    def forget(self, node_id: str) -> None:
        """The store no longer holds a node: out of the tree and all indexes."""
        self.reuse.forget(node_id)
        if self.shared is not None:
            self.shared.forget(node_id)

    def delete(self, node_id: str) -> None:
        """Delete a donor everywhere, and the states that hold its tokens; of other replicas, where
        it was not taken over yet."""
        shared = self.shared
        ours = shared is not None and shared.made_here(node_id)
        if (node := self.tree.get(node_id)) is not None:
            self.states.forget(node.namespace, node.wide_keys)
        self.store.delete(node_id)
        if shared is not None and ours and node is not None:
            # Not before: whoever borrows from it meanwhile would publish it again.
            shared.withdraw(node_id, node.namespace)
        self.forget(node_id)

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until every donor is searchable and durable; False if time ran out."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        done = self.reuse.semantic is None or self.reuse.semantic.flush(timeout_s)
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        if self.shared is not None:
            done = self.shared.flush(left) and done
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
        return self.store.flush(left) and done

    def close(self) -> None:
        """Flush and stop the background threads."""
        if self.shared is not None:
            self.shared.close()
        self.reuse.close()
        self.store.close()

    # -- inside -----------------------------------------------------------------------------

    def _carry_out(self) -> None:
        self.worker.carry_out(*self.reuse.orders())
        # What is known of donors takes from the budget of their KV.
        self.store.reserve(self.reuse.catalogue.num_bytes)

    def _restore(self, fingerprint: str) -> list[IndexRecord]:
        """Take up what an earlier process left in the store; returns what has a vector."""
        embedded = []
        report = Report()
        # A family is told by its oldest.
        for node, embedding in _parents_first(self.store.records()):
            if node.namespace.startswith(f"{fingerprint}-"):
                report.restored.append(node)
                if embedding is not None:
                    embedded.append(
                        IndexRecord(node.node_id, node.namespace, node.wide_keys, embedding)
                    )
        self.reuse.reported(report)
        self._carry_out()
        return [record for record in embedded if record.node_id in self.tree]


def _parents_first(found: Iterable[_Record]) -> list[_Record]:
    """Stored nodes in the order they were made, also where the clock went backwards meanwhile."""
    records = {node.node_id: (node, embedding) for node, embedding in found}
    done: set[str] = set()
    ordered: list[_Record] = []
    for node, _ in sorted(records.values(), key=lambda record: record[0].created_s):
        line: list[_Record] = []
        node_id: str | None = node.node_id
        while node_id in records and node_id not in done:
            done.add(node_id)
            line.append(records[node_id])
            node_id = records[node_id][0].parent
        ordered += reversed(line)
    return ordered
