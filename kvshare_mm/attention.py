"""PartialAttention: run a model on chosen positions only, each seeing all earlier ones.

Two hooks that transformers offers to every decoder are used, so no layer is re-implemented: a
`Cache` whose `update` scatters new K/V to their token index in a slot, and an attention function
that masks by *token index*, never by order in the batch. A position computed late must not see a
later key; masking by batch order is the known mistake here.

The forward is always packed: batch size 1, the rows of one or more requests behind each other, each
request over its own slot. Decoding is the case of one row per request.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
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


class TailAttention:
    """Where the last row of a forward looks: what the first token is made of.

    It costs one query's scores per layer; the attention matrix is never formed.
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


class GivenUp(Exception):
    """A forward that was not finished; what it wrote can be written again."""


class SlotCache(Cache):
    """K/V of all slots, preallocated; `batch` says where the next forward writes.

    Attributes:
        k: ``[num_layers, num_slots, num_kv_heads, max_len, head_dim]``.
        v: the same (head_dim may differ).
        moved_s: `time.perf_counter` of the last layer.
        given_up: asked before every layer of a forward that may be; None: it may not.
    """

    def __init__(self, k: torch.Tensor, v: torch.Tensor) -> None:
        super().__init__(layers=[])
        self.moved_s = 0.0
        self.k = k
        self.v = v
        self.batch: RaggedQueries | None = None
        self.given_up: Callable[[], bool] | None = None

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *_: Any,
        **__: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scatter ``[1, num_kv_heads, n, head_dim]`` to the batch's slots and indices."""
        batch = self.batch
        if batch is None or batch.pages is None:
            raise RuntimeError("SlotCache.batch must be set before a forward, with slots")
        if self.given_up is not None and self.given_up():
            raise GivenUp
        self.moved_s = time.perf_counter()
        k, v = self.k[layer_idx], self.v[layer_idx]
        slots, index = batch.rows
        if batch.num_requests == 1:
            slot = batch.pages[0]
            k[slot].index_copy_(1, index, key_states[0])
            v[slot].index_copy_(1, index, value_states[0])
        else:
            k[slots, :, index] = key_states[0].transpose(0, 1)
            v[slots, :, index] = value_states[0].transpose(0, 1)
        return k, v

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
    kvshare_batch: RaggedQueries | None = None,
    kvshare_tail: TailAttention | None = None,
    backend: str = "auto",
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of packed rows over their slots, masked by token index.

    Args:
        query: ``[1, num_heads, n, head_dim]``.
        key, value: ``[num_slots, num_kv_heads, max_len, head_dim]`` as `SlotCache.update` returns.
        kvshare_batch: the rows; passed through the model's forward as a keyword.
        kvshare_tail: records the attention of the last row; passed so too.
        backend: what computes it, see `kernels.dispatch`.

    Returns:
        ``[1, n, num_heads, head_dim]`` and None.
    """
    if kvshare_batch is None:
        raise RuntimeError(
            f"{type(module).__name__} does not pass keywords on to its attention function"
        )
    for name in _CHANGES_SCORES:
        if options.get(name) is not None:
            raise RuntimeError(f"{type(module).__name__} changes attention scores ({name})")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = dispatch.partial_attention(
        query[0].transpose(0, 1), key, value, kvshare_batch, scale, backend
    )
    if kvshare_tail is not None and kvshare_batch.pages is not None:
        seen = key[kvshare_batch.pages[-1], :, : kvshare_batch.kv_lens[-1]]
        kvshare_tail.add(query[0, :, -1], seen, scale)
    return out[None], None


for _backend in BACKENDS:
    AttentionInterface.register(
        attention_name(_backend), partial(partial_attention, backend=_backend)
    )
