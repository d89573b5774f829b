"""The pool of donors: finds them for a new request, reads their KV, takes up finished requests.

This is where the catalogue, the index of meaning and the store meet. Nothing in here may fail a
request: every failure is counted with its reason and the request is computed in full.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

import numpy as np
import torch

from kvshare_mm.catalogue import Catalogue, Found
from kvshare_mm.delta_tree import Node, Piece
from kvshare_mm.identity import text_identity
from kvshare_mm.index.base import IndexRecord
from kvshare_mm.index.semantic import Opened, SemanticIndex
from kvshare_mm.plan import PlannerOptions, ReusePlan
from kvshare_mm.store.base import NodeKV, StoredNode
from kvshare_mm.store.disk import DiskTier
from kvshare_mm.store.host import HostTier
from kvshare_mm.store.tiered import TieredStore
from kvshare_mm.stream import Segment

# Of donors on disk something is known even where RAM is for nothing else.
_LEAST_KNOWN_BYTES = 1 << 20

__all__ = ["DonorPool", "Found", "namespace", "owned_rows"]


def namespace(fingerprint: str, salt: str) -> str:
    """The namespace of a model's requests under one salt, which its sender chooses."""
    return f"{fingerprint}-{text_identity(salt)}"


class DonorPool:
    """Donors of one model.

    Args:
        fingerprint: the model's; stored nodes of other models are left alone.
        host: RAM tier.
        disk: disk tier, or None.
        open_dense: opens the index of meaning and its embedder, or None: none is used.
        max_candidates: donors aligned with a target.
        joining: tokens that go on with the word before them (see `words`); None: unknown.
    """

    def __init__(
        self,
        fingerprint: str,
        host: HostTier,
        disk: DiskTier | None = None,
        open_dense: Callable[[], Opened] | None = None,
        max_candidates: int = 4,
        joining: np.ndarray | None = None,
    ) -> None:
        self.counters: Counter[str] = Counter()
        self.store = TieredStore(host, disk, self.forget)
        self.catalogue = Catalogue(self.counters, max_candidates)
        self.catalogue.joining = joining
        self.tree = self.catalogue.tree
        self._fingerprint = fingerprint
        known = self._restore()
        self._make_room()
        if disk is not None and disk.num_corrupt:
            self.counters["damaged_at_start"] = disk.num_corrupt
        self._semantic: SemanticIndex | None = None
        if open_dense is not None:
            self._semantic = SemanticIndex(
                open_dense, known, self.store.update_embedding, self.counters
            )

    # -- a new request ----------------------------------------------------------------------

    def find(
        self,
        keys: np.ndarray,
        ns: str,
        options: PlannerOptions,
        similar: tuple[str, ...] = (),
        positions: np.ndarray | None = None,
        pictures: np.ndarray | None = None,
    ) -> Found:
        """Plan the reuse of stored requests for a prompt.

        Args:
            keys: ``[N]`` uint64 alignment keys.
            ns: the request's namespace; donors of others are never looked at.
            options: when reuse is worth it.
            similar: ids that a dense search brought in time, if any.
            positions: ``[3, N]`` rotary positions; None: the index.
            pictures: ``[N]`` bool: positions that are pictures; None: none are.
        """
        return self.catalogue.find(keys, ns, options, similar, positions, pictures)

    def similar(self, text: str, ns: str) -> tuple[str, ...]:
        """Donors that mean something similar; takes as long as embedding a prompt does."""
        if self._semantic is None:
            return ()
        return self._semantic.search(ns, text, self.catalogue.max_candidates)

    def pieces(self, plan: ReusePlan) -> list[Piece]:
        """Who owns the KV of a plan's kept runs. Raises KVUnavailableError("evicted")."""
        return self.catalogue.pieces(plan)

    def read(self, node_id: str, ns: str) -> StoredNode:
        """A donor's KV, its namespace checked once more. Raises KVUnavailableError."""
        return self.store.get(node_id, ns)

    def nodes(self) -> list[Node]:
        """All donors as they are now."""
        return self.catalogue.nodes()

    # -- a finished request -----------------------------------------------------------------

    def capture(
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
    ) -> str | None:
        """Take up a finished request as a donor.

        Args:
            keys: ``[N]`` keys of prompt and answer, as far as KV was computed.
            ns: its namespace.
            plan: what it was served with.
            k: ``[num_layers, num_kv_heads, >= N, head_dim]`` its keys; copied.
            v: its values; copied.
            text: what the dense index shall find it by.
            attention: ``[P]`` float32, how much the prompt's last position looked at each.
            positions: ``[3, N]`` rotary positions; None: the index.
            media: where its pictures and clips are.

        Returns:
            The new node's id, or None if there is nothing to gain from storing it.
        """
        node = self.catalogue.derive(keys, ns, plan, attention, positions, media)
        if node is None:
            return None
        if (twin := self.catalogue.twin(node)) is not None:
            # Stored again with each repetition, it would push others out.
            self.store.touch(twin)
            self.counters["capture_known"] += 1
            return None
        kv = NodeKV(owned_rows(k, node), owned_rows(v, node))
        self.store.put(StoredNode(node, kv))
        self.catalogue.add(node)
        if self.store.resident(node.node_id) is None:
            # It never fitted, and `forget` came before there was anything to forget.
            self.forget(node.node_id)
            self.counters["capture_too_large"] += 1
            return None
        self.counters["captured"] += 1
        if self._semantic is not None:
            self._semantic.add(IndexRecord(node.node_id, ns, node.alignment_keys), text)
        self._make_room()
        return node.node_id

    def forget(self, node_id: str) -> None:
        """The store no longer holds a node: out of the tree and all indexes."""
        if not self.catalogue.remove(node_id):
            return
        self.counters["forgotten"] += 1
        if self._semantic is not None:
            self._semantic.remove(node_id)

    def delete(self, node_id: str) -> None:
        """Delete a donor everywhere."""
        self.store.delete(node_id)
        self.forget(node_id)

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until every donor is searchable and durable; False if time ran out."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        done = self._semantic is None or self._semantic.flush(timeout_s)
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        return self.store.flush(left) and done

    def close(self) -> None:
        """Flush and stop the background threads."""
        if self._semantic is not None:
            self._semantic.close()
        self.store.close()

    # -- inside -----------------------------------------------------------------------------

    def _make_room(self) -> None:
        """What is known of donors counts in the budget of RAM: it takes from that of their KV, and
        from the half on the oldest donors go, from disk too."""
        for node_id in self.catalogue.beyond(max(_LEAST_KNOWN_BYTES, self.store.host_bytes // 2)):
            self.counters["forgotten_for_room"] += 1
            self.delete(node_id)
        self.store.reserve(self.catalogue.num_bytes)

    def _restore(self) -> list[IndexRecord]:
        """Take up what an earlier process left in the store; returns what has a vector."""
        embedded = []
        for node, embedding in self.store.records():
            if node.namespace.startswith(f"{self._fingerprint}-"):
                self.catalogue.add(node)
                self.counters["restored"] += 1
                if embedding is not None:
                    embedded.append(
                        IndexRecord(node.node_id, node.namespace, node.alignment_keys, embedding)
                    )
        return embedded


def owned_rows(tensor: torch.Tensor, node: Node) -> torch.Tensor:
    """The rows a node owns of ``[layers, heads, >= N, dim]``, copied to the CPU."""
    parts = [tensor[:, :, s.start : s.end] for s in node.own]
    return torch.cat(parts, dim=2).cpu().contiguous()
