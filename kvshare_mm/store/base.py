"""What the store keeps for one DELTA-tree node, and the check that it holds numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from kvshare_mm.errors import NotFiniteError
from kvshare_mm.kernels.q8 import exponents_of, pack, scales_of
from kvshare_mm.node import Node


@dataclass(frozen=True, slots=True)
class NodeKV:
    """K and V of the positions a node owns, in the order of `Node.own`.

    Attributes:
        k: ``[num_layers, num_kv_heads, num_owned, head_dim]``, rotated at the node's positions;
            int8 and as wide as `q8.pack` makes it, where eight bits are kept.
        v: the same (head_dim may differ from k's).
        k_exponents: ``[num_layers, num_kv_heads, head_dim]`` int8 that k was packed with.
    """

    k: torch.Tensor
    v: torch.Tensor
    k_exponents: torch.Tensor | None = None

    @classmethod
    def packed(cls, k: torch.Tensor, v: torch.Tensor) -> NodeKV:
        """K and V in eight bits, on the CPU."""
        exponents = exponents_of(k)
        # Packed where they are: less is copied from a GPU.
        return cls(pack(k, exponents).cpu(), pack(v).cpu(), exponents.cpu())

    @property
    def num_bytes(self) -> int:
        more = 0 if self.k_exponents is None else self.k_exponents.nbytes
        return self.k.nbytes + self.v.nbytes + more


@dataclass(frozen=True, slots=True)
class StoredNode:
    """A node with what is needed to serve and to index it again after a restart.

    Attributes:
        node: the tree node (keys, owned runs, pieces, parent, exact length, namespace).
        kv: owned KV, on the CPU and contiguous.
        embedding: ``[dim]`` float32 search vector, or None while it is not computed.
    """

    node: Node
    kv: NodeKV
    embedding: np.ndarray | None = None


def check_finite(node: Node, embedding: np.ndarray | None, kv: NodeKV | None = None) -> None:
    """Refuse a node with numbers that are none: they would spread to every request that reuses it.

    K and V are read once, about 2 ms for 22 MiB of float32 on one core.

    Args:
        node: its `attention` is looked at.
        embedding: its search vector, if it has one.
        kv: its K and V, on the CPU; None: they are not looked at.

    Raises:
        NotFiniteError: a NaN or an infinity among them.
    """
    for name, vector in (("attention", node.attention), ("embedding", embedding)):
        if vector is not None and not np.isfinite(vector).all():
            raise _not_finite(node, name)
    # Infinite drift is that of KV which nobody may trust.
    if math.isnan(node.risk) or (node.drift is not None and np.isnan(node.drift).any()):
        raise _not_finite(node, "drift")
    for name, tensor in (("K", kv.k), ("V", kv.v)) if kv is not None else ():
        if tensor.dtype == torch.float8_e4m3fn:  # has no infinities, and one NaN of each sign
            bits = (layer.view(torch.uint8) for layer in tensor)
            if any(bool(((layer & 0x7F) == 0x7F).any()) for layer in bits):
                raise _not_finite(node, name)
            continue
        numbers = scales_of(tensor) if tensor.dtype == torch.int8 else tensor
        # The extremes: a NaN becomes both, and they do not overflow as a sum would.
        if numbers.numel() and not all(math.isfinite(x) for x in torch.aminmax(numbers)):
            raise _not_finite(node, name)


def _not_finite(node: Node, name: str) -> NotFiniteError:
    return NotFiniteError(
        f"node {node.node_id}: its {name} holds NaN or an infinity; what is no number is not stored"
    )
