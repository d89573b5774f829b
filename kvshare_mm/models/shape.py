"""What KV of a position looks like."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class KVShape:
    """Shape of one position's KV: ``[num_layers, num_kv_heads, key_dim or value_dim]``."""

    num_layers: int
    num_kv_heads: int
    key_dim: int
    value_dim: int

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        per_layer = self.num_kv_heads * (self.key_dim + self.value_dim)
        return self.num_layers * per_layer * dtype.itemsize
