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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface
from transformers.cache_utils import Cache

from kvshare_mm.kernels import dispatch
from kvshare_mm.kernels.backend import BACKENDS
from kvshare_mm.kernels.ragged import RaggedQueries
from kvshare_mm.kernels.scoring import PLAIN, Scoring

ATTENTION_NAME = "kvshare"

# What models may ask of an attention function and does not get. Ignoring it would be wrong only a
# little, so not be noticed.
_UNSUPPORTED = ("position_bias", "indices", "compressed_kv")


def attention_name(backend: str) -> str:
    """Name under which PartialAttention on a backend is registered with transformers."""
    return ATTENTION_NAME if backend == "auto" else f"{ATTENTION_NAME}_{backend}"


class TailAttention:
    """Where the last rows of a prompt look: what the first token is made of.

    It costs their scores in every layer; the attention matrix is never formed.

    Args:
        rows: so many, whose tokens follow one another.
    """

    def __init__(self, rows: int = 1) -> None:
        self._rows = rows
        self._sum: torch.Tensor | None = None
        self._layers = 0

    def add(
        self, query: torch.Tensor, key: torch.Tensor, scale: float, scoring: Scoring = PLAIN
    ) -> None:
        """Take up one layer.

        Args:
            query: ``[num_heads, n, head_dim]`` of a prompt's rows; fewer are all taken.
            key: ``[num_kv_heads, N, head_dim]`` up to the last one's own.
            scale: factor on the scores.
            scoring: windows, sinks and capped scores of the layer.
        """
        query, n = query[:, -self._rows :], key.shape[1]
        rows = query.shape[1]
        grouped = query.reshape(key.shape[0], -1, query.shape[-1])
        scores = torch.matmul(grouped * scale, key.transpose(1, 2)).float()
        scores = scores.view(key.shape[0], -1, rows, n)
        if scoring.softcap is not None:
            scores = torch.tanh(scores / scoring.softcap) * scoring.softcap
        for row, index in enumerate(range(n - rows, n)):
            scores[..., row, : scoring.first_key(index)] = float("-inf")
            scores[..., row, index + 1 :] = float("-inf")
        if scoring.sinks is not None:
            sinks = scoring.sinks.view(*scores.shape[:2], 1, 1).float()
            scores = torch.cat((scores, sinks.expand(-1, -1, rows, -1)), -1)
        mass = scores.softmax(-1)[..., :n].mean((0, 1, 2))
        self._sum = mass if self._sum is None else self._sum + mass
        self._layers += 1

    @property
    def mass(self) -> np.ndarray | None:
        """``[N]`` float32 attention on each position, mean over rows, heads and layers: sums to 1,
        or to what attention sinks leave."""
        return None if self._sum is None else (self._sum / self._layers).cpu().numpy()


class GivenUp(Exception):
    """A forward that was not finished; what it wrote can be written again."""


Recorder = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, float, Scoring], None]
"""Is told of the attention of a forward's rows, layer by layer: see `reads.Reads.add`."""


# The rows of the running forward, and who records the attention of its first request: of the last
# rows, and of all. Not keywords: some models do not pass a forward's on to their attention.
_running: ContextVar[tuple[RaggedQueries, TailAttention | None, Recorder | None] | None] = (
    ContextVar("kvshare_running", default=None)
)


class SlotCache(Cache):
    """K/V of all slots, preallocated.

    Args:
        k: ``[num_layers, num_slots, num_kv_heads, max_len, head_dim]``.
        v: the same (head_dim may differ).
        packed: attention gets the K/V of a forward's requests alone. For models that expand what
            they cache (multi-head latent attention): they would expand all slots.

    Attributes:
        moved_s: `time.perf_counter` of the last layer.
        given_up: asked before every layer of a forward that may be; None: it may not.
    """

    def __init__(self, k: torch.Tensor, v: torch.Tensor, packed: bool = False) -> None:
        super().__init__(layers=[])
        self.moved_s = 0.0
        self.k = k
        self.v = v
        self.given_up: Callable[[], bool] | None = None
        self._packed = packed
        self._batch: RaggedQueries | None = None

    @contextmanager
    def forward(
        self,
        batch: RaggedQueries,
        tail: TailAttention | None = None,
        reads: Recorder | None = None,
    ) -> Iterator[None]:
        """The model's forward inside computes the rows of `batch`, whose requests have slots.

        Args:
            tail: records the attention of the first request's last rows.
            reads: told of every layer's attention of the first request.
        """
        self._batch = batch
        token = _running.set((batch.packed() if self._packed else batch, tail, reads))
        try:
            yield
        finally:
            _running.reset(token)

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *_: Any,
        **__: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scatter ``[1, num_kv_heads, n, head_dim]`` to the batch's slots and indices."""
        batch = self._batch
        if batch is None or batch.pages is None:
            raise RuntimeError("SlotCache.forward must be entered before a forward, with slots")
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
        if not self._packed:
            return k, v
        pages, n = batch.pages, batch.max_kv_len
        which = slice(pages[0], pages[0] + 1) if len(pages) == 1 else pages
        return k[which, :, :n], v[which, :, :n]

    def get_seq_length(self, layer_idx: int | None = None) -> Any:
        """What a layer adds to a row's number to get its token index (Llama 4): a tensor, as rows
        need not follow each other."""
        if layer_idx is None or self._batch is None:
            return 0
        index = self._batch.index
        return index - torch.arange(len(index), device=index.device)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0


def partial_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    backend: str = "auto",
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of packed rows over their slots, masked by token index.

    Args:
        query: ``[1, num_heads, n, head_dim]``.
        key, value: ``[num_slots, num_kv_heads, max_len, head_dim]`` as `SlotCache.update` returns.
        sliding_window, softcap, s_aux: see `Scoring`.
        backend: what computes it, see `kernels.dispatch`.

    Returns:
        ``[1, n, num_heads, head_dim]`` and None.
    """
    running = _running.get()
    if running is None:
        raise RuntimeError("PartialAttention runs inside SlotCache.forward only")
    for name in _UNSUPPORTED:
        if options.get(name) is not None:
            raise RuntimeError(f"{type(module).__name__} changes attention scores ({name})")
    batch, tail, reads = running
    scoring = Scoring(sliding_window, _chunk(module), softcap, s_aux)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = dispatch.partial_attention(
        query[0].transpose(0, 1), key, value, batch, scale, backend, scoring
    )
    if (tail is not None or reads is not None) and batch.pages is not None:
        seen, rows = key[batch.pages[0], :, : batch.kv_lens[0]], batch.lengths[0]
        if tail is not None:
            tail.add(query[0, :, :rows], seen, scale, scoring)
        if reads is not None:
            layer: Any = module.layer_idx
            first, index = query[0, :, :rows], batch.index[:rows]
            if batch.sees is not None:
                # Shares are counted up to a row's own key: nobody asks what a picture's rows read.
                alone = batch.sees[:rows] == index
                first, index = first[:, alone], index[alone]
            reads(layer, first, seen, index, scale, scoring)
    return out.contiguous()[None], None  # some models view it, others reshape


def _chunk(module: torch.nn.Module) -> int | None:
    """The chunk of a layer with chunked attention: models say it with their mask alone."""
    config, layer = getattr(module, "config", None), getattr(module, "layer_idx", None)
    kinds = getattr(config, "layer_types", None)
    if not kinds or layer is None or kinds[layer] != "chunked_attention":
        return None
    return int(config.attention_chunk_size)  # type: ignore[union-attr]


for _backend in BACKENDS:
    AttentionInterface.register(
        attention_name(_backend), partial(partial_attention, backend=_backend)
    )
