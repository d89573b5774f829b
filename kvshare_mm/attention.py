"""PartialAttention: run a model on chosen positions only, each seeing all earlier ones.

Two hooks that transformers offers to every decoder are used, so no layer is re-implemented: a
`Cache` whose `update` scatters new K/V to their token index in a slot, and an attention function
that masks by *token index*, never by order in the batch. A position computed late must not see a
later key; masking by batch order is the known mistake here.

The forward is always packed: batch size 1, the rows of one or more requests behind each other, each
request over its own slot. Decoding is the case of one row a request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.cache_utils import Cache

ATTENTION_NAME = "kvshare"

# What models may ask of an attention function beyond scaled dot products: logit soft-capping,
# attention sinks, additive biases. Ignoring one would be wrong only a little, so not be noticed.
_CHANGES_SCORES = ("softcap", "s_aux", "position_bias")


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """The queries of one request inside a packed forward.

    Attributes:
        slot: KV slot of the request.
        index: ``[n]`` int64 ascending token indices of the queries.
        kv_len: number of keys that any of them may see: the last index plus one.
        mask: ``[n, kv_len]`` additive float mask, or None if `causal` or if every query sees all.
        causal: the queries are all positions from 0 on.
    """

    slot: int
    index: torch.Tensor
    kv_len: int
    mask: torch.Tensor | None
    causal: bool


def rows(slot: int, index: torch.Tensor, dtype: torch.dtype) -> Rows:
    """Rows for ascending token indices ``[n]``, with the cheapest mask that is right."""
    n, kv_len = len(index), int(index[-1]) + 1
    causal = n == kv_len
    mask = None
    if n > 1 and not causal:
        hidden = torch.arange(kv_len, device=index.device)[None] > index[:, None]
        mask = torch.zeros(n, kv_len, dtype=dtype, device=index.device)
        mask.masked_fill_(hidden, float("-inf"))
    return Rows(slot, index, kv_len, mask, causal)


class Layout:
    """Where every row of a packed forward belongs."""

    def __init__(self, requests: Sequence[Rows]) -> None:
        self.requests = tuple(requests)
        self.index = torch.cat([r.index for r in requests])
        self.slots = torch.cat([torch.full_like(r.index, r.slot) for r in requests])


class SlotCache(Cache):
    """K/V of all slots, preallocated; `layout` says where the next forward writes.

    Attributes:
        keys: ``[num_layers, num_slots, num_kv_heads, max_len, head_dim]``.
        values: the same (head_dim may differ).
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__(layers=[])
        self.keys = keys
        self.values = values
        self.layout: Layout | None = None

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *_: Any,
        **__: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scatter ``[1, num_kv_heads, n, head_dim]`` to the layout's slots and indices."""
        layout = self.layout
        if layout is None:
            raise RuntimeError("SlotCache.layout must be set before a forward")
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        if len(layout.requests) == 1:
            slot = layout.requests[0].slot
            keys[slot].index_copy_(1, layout.index, key_states[0])
            values[slot].index_copy_(1, layout.index, value_states[0])
        else:
            keys[layout.slots, :, layout.index] = key_states[0].transpose(0, 1)
            values[layout.slots, :, layout.index] = value_states[0].transpose(0, 1)
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0


def partial_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    kvshare_layout: Layout | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of packed rows over their slots, masked by token index.

    Args:
        query: ``[1, num_heads, n, head_dim]``.
        key, value: ``[num_slots, num_kv_heads, max_len, head_dim]`` as `SlotCache.update` returns.
        kvshare_layout: passed through the model's forward as a keyword.

    Returns:
        ``[1, n, num_heads, head_dim]`` and None.
    """
    if kvshare_layout is None:
        raise RuntimeError(
            f"{type(module).__name__} does not pass keywords on to its attention function"
        )
    for name in _CHANGES_SCORES:
        if options.get(name) is not None:
            raise RuntimeError(f"{type(module).__name__} changes attention scores ({name})")
    outputs = []
    at = 0
    for r in kvshare_layout.requests:
        n = len(r.index)
        outputs.append(
            F.scaled_dot_product_attention(
                query[:, :, at : at + n],
                key[r.slot : r.slot + 1, :, : r.kv_len],
                value[r.slot : r.slot + 1, :, : r.kv_len],
                attn_mask=r.mask,
                is_causal=r.causal and n > 1,
                scale=scaling,
                enable_gqa=True,
            )
        )
        at += n
    out = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
    return out.transpose(1, 2), None


AttentionInterface.register(ATTENTION_NAME, partial_attention)
