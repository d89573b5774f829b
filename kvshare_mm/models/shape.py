"""What KV of a position looks like."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvshare_mm.kernels.q8 import packed_width


@dataclass(frozen=True, slots=True)
class KVShape:
    """Shape of one position's KV: ``[num_layers, num_kv_heads, key_dim or value_dim]``."""

    num_layers: int
    num_kv_heads: int
    key_dim: int
    value_dim: int

    def bytes_per_token(self, dtype: torch.dtype, packed: bool = False) -> int:
        """What a store needs for it: of `dtype`, or packed to eight bits."""
        dims = self.key_dim, self.value_dim
        size = sum(packed_width(d) if packed else d * dtype.itemsize for d in dims)
        return self.num_layers * self.num_kv_heads * size
