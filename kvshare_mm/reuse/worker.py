"""Holds the KV of donors: edits it into what a request computes in, and keeps finished requests."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from kvshare_mm.errors import KVUnavailableError
from kvshare_mm.kernels.q8 import packed_width
from kvshare_mm.node import Node, Piece
from kvshare_mm.reuse.editor import KVEditor, Placement
from kvshare_mm.reuse.orders import Report
from kvshare_mm.store.base import NodeKV, StoredNode
from kvshare_mm.store.tiered import Lasting, TieredStore

logger = logging.getLogger(__name__)


class ReuseWorker:
    """Carries out what a `ReuseScheduler` decides: natively in its process, inside vLLM in each
    rank's.

    Args:
        store: the donors' KV, or this rank's share of it.
        editor: re-rotates donors' keys.
        packed: keep K and V in eight bits.
    """

    def __init__(self, store: TieredStore, editor: KVEditor, packed: bool = False) -> None:
        self.store = store
        self._editor = editor
        self._packed = packed

    def load(
        self,
        pieces: Sequence[Piece],
        ns: str,
        k: torch.Tensor,
        v: torch.Tensor,
        positions: np.ndarray | None,
        rows: np.ndarray | None = None,
    ) -> None:
        """Write donors' KV where a request computes. All is read before the first byte is written.

        Args:
            pieces: who owns the KV of what is kept, in the request's coordinates.
            ns: the request's namespace; a donor of another one is refused.
            k: ``[num_layers, num_kv_heads, >= N, head_dim]``, written.
            v: the same.
            positions: ``[3, N]`` rotary positions of the request; None: the index.
            rows: see `KVEditor.edit`.

        Raises:
            KVUnavailableError: a donor cannot be had, or is not of this model.
        """
        layers, heads, _, dim = k.shape
        placement = self.place(pieces, ns, (layers, heads, dim), positions, rows)
        self.write(placement, k, v)

    def place(
        self,
        pieces: Sequence[Piece],
        ns: str,
        shape: tuple[int, int, int],
        positions: np.ndarray | None,
        rows: np.ndarray | None = None,
    ) -> Placement:
        """Read the donors of `pieces`: all of `load` that can fail.

        Args:
            shape: layers, KV heads and head dim of the model.

        Others, and errors: see `load`.
        """

        def read(node_id: str) -> StoredNode:
            stored = self.store.get(node_id, ns)
            layers, heads, _, width = stored.kv.k.shape
            dim = packed_width(shape[2]) if stored.kv.k.dtype == torch.int8 else shape[2]
            if (layers, heads, width) != (*shape[:2], dim):
                raise KVUnavailableError("corrupt", f"node {node_id} is not of this model")
            return stored

        return self._editor.place(pieces, read, positions, rows)

    def write(self, placement: Placement, k: torch.Tensor, v: torch.Tensor, first: int = 0) -> None:
        """Write what was placed; see `KVEditor.write`."""
        with torch.inference_mode():
            self._editor.write(placement, k, v, first)

    def save(
        self, node: Node, k: torch.Tensor, v: torch.Tensor, lasting: Lasting = "now"
    ) -> Report:
        """Keep what a node owns of a request's KV, and tell what became of that.

        Args:
            k: ``[num_layers, num_kv_heads, >= N, head_dim]``; copied.
            v: the same.
            lasting: see `TieredStore.put`.
        """
        node_id = node.node_id
        try:
            self.store.put(StoredNode(node, self._owned(node, k, v)), lasting)
        except Exception:
            # A cache problem is never a request's problem.
            logger.exception("%s could not be stored", node_id)
            return Report(not_saved={node_id: "failed"})
        if self.store.resident(node_id) is None:
            return Report(not_saved={node_id: "too_large"})
        return Report(stored={node_id: 1})

    def replace(self, node: Node, k: torch.Tensor, v: torch.Tensor) -> bool:
        """Keep other KV, of which more may be its own, for a node that is stored; False: there was
        no room for it, and it is gone.

        Args: see `save`.

        Raises:
            KVUnavailableError: it is not stored any more.
            NotFiniteError: the KV is no numbers; the node stays as it was.
        """
        before = self.store.get(node.node_id, node.namespace)
        self.store.put(replace(before, node=node, kv=self._owned(node, k, v)))
        return self.store.resident(node.node_id) is not None

    def _owned(self, node: Node, k: torch.Tensor, v: torch.Tensor) -> NodeKV:
        """The rows that a node owns of ``[layers, heads, >= N, dim]``, copied to the CPU."""
        k, v = (torch.cat([x[:, :, s.start : s.end] for s in node.own], dim=2) for x in (k, v))
        packed = self._packed and k.itemsize > 1  # float8 has eight bits already
        return NodeKV.packed(k, v) if packed else NodeKV(k.cpu(), v.cpu())

    def carry_out(self, touched: Sequence[str], dropped: Sequence[str]) -> None:
        """Nodes that were asked for again, and nodes to be deleted."""
        for node_id in touched:
            self.store.touch(node_id)
        for node_id in dropped:
            self.store.delete(node_id)
