"""PartialAttention: run a model on chosen positions only, each seeing all earlier ones.

Two hooks that transformers offers to every decoder are used, so no layer is re-implemented: a
`Cache` whose `update` scatters new K/V to their token index in a slot, and an attention function
that masks by *token index*, never by order in the batch. A position computed late must not see a
later key; masking by batch order is the known mistake here.

The forward is always packed: batch size 1, the rows of one or more requests behind each other, each
request over its own slot. Decoding is the case of one row a request.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface
from transformers.cache_utils import Cache

from kvshare_mm.kernels import dispatch
from kvshare_mm.kernels.backend import BACKENDS
from kvshare_mm.kernels.ragged import RaggedQueries

ATTENTION_NAME = "kvshare"

# What models may ask of an attention function beyond scaled dot products: logit soft-capping,
# attention sinks, additive biases. Ignoring one would be wrong only a little, so not be noticed.
_CHANGES_SCORES = ("softcap", "s_aux", "position_bias")


def attention_name(backend: str) -> str:
    """Name under which PartialAttention on a backend is registered with transformers."""
    return ATTENTION_NAME if backend == "auto" else f"{ATTENTION_NAME}_{backend}"


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """The queries of one request inside a packed forward.

    Attributes:
        slot: KV slot of the request.
        index: ``[n]`` int64 ascending token indices of the queries.
        kv_len: number of keys that any of them may see: the last index plus one.
    """

    slot: int
    index: torch.Tensor
    kv_len: int


def rows(slot: int, index: torch.Tensor) -> Rows:
    """Rows for ascending token indices ``[n]``, n at least 1."""
    return Rows(slot, index, int(index[-1]) + 1)


class TailAttention:
    """Where the last row of a forward looks: what the first token is made of.

    It costs one query's scores a layer; the attention matrix is never formed.
    """

    def __init__(self) -> None:
        self._sum: torch.Tensor | None = None
        self._layers = 0

    def add(self, query: torch.Tensor, key: torch.Tensor, scale: float) -> None:
        """Take up one layer.

        Args:
            query: ``[num_heads, head_dim]`` of the last row.
            key: ``[num_kv_heads, N, head_dim]`` that it sees.
            scale: factor on the scores.
        """
        grouped = query.view(key.shape[0], -1, query.shape[-1])
        scores = torch.matmul(grouped * scale, key.transpose(1, 2))
        mass = scores.softmax(-1, dtype=torch.float32).mean((0, 1))
        self._sum = mass if self._sum is None else self._sum + mass
        self._layers += 1

    @property
    def mass(self) -> np.ndarray | None:
        """``[N]`` float32 attention on each position, mean over heads and layers: sums to 1."""
        return None if self._sum is None else (self._sum / self._layers).cpu().numpy()


class Layout:
    """Where every row of a packed forward belongs.

    Args:
        requests: whose rows follow each other.
        tail: records the attention of the last row.
    """

    def __init__(self, requests: Sequence[Rows], tail: TailAttention | None = None) -> None:
        self.requests = tuple(requests)
        self.tail = tail
        self.index = torch.cat([r.index for r in requests])
        self.slots = torch.cat([torch.full_like(r.index, r.slot) for r in requests])

    @cached_property
    def batch(self) -> RaggedQueries:
        """The rows as the kernels take them: a slot is the one page of its request."""
        slots = torch.tensor([[r.slot] for r in self.requests], device=self.index.device)
        return RaggedQueries(
            [r.index for r in self.requests], slots, [r.kv_len for r in self.requests]
        )


class SlotCache(Cache):
    """K/V of all slots, preallocated; `layout` says where the next forward writes.

    Attributes:
        keys: ``[num_layers, num_slots, num_kv_heads, max_len, head_dim]``.
        values: the same (head_dim may differ).
        moved_s: `time.perf_counter` of the last layer.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__(layers=[])
        self.moved_s = 0.0
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
        self.moved_s = time.perf_counter()
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
    backend: str = "auto",
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of packed rows over their slots, masked by token index.

    Args:
        query: ``[1, num_heads, n, head_dim]``.
        key, value: ``[num_slots, num_kv_heads, max_len, head_dim]`` as `SlotCache.update` returns.
        kvshare_layout: passed through the model's forward as a keyword.
        backend: what computes it, see `kernels.dispatch`.

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
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = dispatch.partial_attention(
        query[0].transpose(0, 1), key, value, kvshare_layout.batch, scale, backend
    )
    if kvshare_layout.tail is not None:
        last = kvshare_layout.requests[-1]
        kvshare_layout.tail.add(query[0, :, -1], key[last.slot, :, : last.kv_len], scale)
    return out[None], None


for _backend in BACKENDS:
    AttentionInterface.register(
        attention_name(_backend), partial(partial_attention, backend=_backend)
    )
