"""PartialAttention over vLLM's own model and pages.

Each contiguous run of positions to compute is a row of its own in the batch, over the same block
table, with the run's end as its sequence length. To the attention backend these are requests that
continue; so every position sees all earlier ones, kept or computed, and no later one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata

from kvshare_mm.attention import TailAttention
from kvshare_mm.kernels.scoring import Scoring
from kvshare_mm.node import Span
from kvshare_mm.vllm.pages import Pages
from kvshare_mm.vllm.rotation import PROBE_TOKENS
from kvshare_mm.vllm.watch import watching


class Part(NamedTuple):
    """Positions of one request to compute.

    Attributes:
        spans: ascending and disjoint; all that is before them has its KV already.
        token_ids: ``[N]`` of the request.
        positions: ``[N]`` or ``[3, N]`` rotary positions; None: the index.
        block_ids: the request's blocks.
    """

    spans: Sequence[Span]
    token_ids: np.ndarray
    positions: np.ndarray | None
    block_ids: Sequence[int]


class PartialForward:
    """Runs a model on chosen positions of requests.

    Args:
        vllm_config: the engine's.
        model: vLLM's model, or the language part of one.
        layers: its attention layers by name, in order, caches bound.
        spec: the KV cache spec of their group.
        three_axes: its rotary positions are ``[3, n]``.
    """

    def __init__(
        self,
        vllm_config: Any,
        model: Any,
        layers: dict[str, Any],
        spec: Any,
        three_axes: bool = False,
    ) -> None:
        self._config = vllm_config
        self._model = model
        self._layers = layers
        self._three_axes = three_axes
        first = next(iter(layers.values()))
        self._device = first.kv_cache.device
        self._block_size = int(spec.block_size)
        # Kernels may address finer blocks than the scheduler does.
        self._split = self._block_size // int(first.kv_cache.shape[-2])
        # As vLLM's runner groups them: chunked layers have a backend of their own.
        alike: dict[Any, list[str]] = {}
        for name, layer in layers.items():
            alike.setdefault((layer.attn_backend.full_cls_name(), layer.num_heads), []).append(name)
        # The runner's builders hold the batch of the step that is under way.
        self._builders = []
        for names in alike.values():
            kind = layers[names[0]].attn_backend.get_builder_cls()
            self._builders.append((names, kind(spec, names, vllm_config, self._device)))

    def slots(self, spans: Sequence[Span], block_ids: Sequence[int]) -> torch.Tensor:
        """``[n]`` int64 slots of positions, in order."""
        position = _positions(spans)
        table = np.asarray(block_ids, np.int64)
        slots = table[position // self._block_size] * self._block_size
        return torch.from_numpy(slots + position % self._block_size).to(self._device)

    def table(self, block_ids: Sequence[int]) -> torch.Tensor:
        """``[n]`` int32 blocks as the layers' caches count them."""
        table = torch.tensor(block_ids, dtype=torch.int32)
        if self._split > 1:
            table = (table[:, None] * self._split + torch.arange(self._split)).flatten().int()
        return table.to(self._device)

    def run(
        self, parts: Sequence[Part], keep: bool = True, model: Callable[..., Any] | None = None
    ) -> torch.Tensor:
        """Compute the KV of `parts`, of different requests, in one forward.

        Args:
            keep: whether what is computed goes into their blocks; else it is lost, and what is
                there seen.
            model: computes it instead of the model.

        Returns:
            ``[n, hidden_size]`` hidden states, in order if there is one span.
        """
        # Some backends want single tokens, which are decodes to them, before longer runs.
        rows = sorted(
            ((span, part) for part in parts for span in part.spans), key=lambda row: row[0].length
        )
        index = _positions([span for span, _ in rows])
        lengths = torch.tensor([span.length for span, _ in rows], dtype=torch.int32)
        starts = torch.zeros(len(rows) + 1, dtype=torch.int32)
        starts[1:] = lengths.cumsum(0)
        ends = torch.tensor([span.end for span, _ in rows], dtype=torch.int32)
        slots = torch.cat([self.slots([span], part.block_ids) for span, part in rows])
        if not keep:
            slots = torch.zeros_like(slots)  # vLLM's null block, which nobody reads
        tables = [self.table(part.block_ids) for _, part in rows]
        where = np.concatenate([self._where(*row) for row in rows], axis=-1)
        places = torch.from_numpy(where).to(self._device)
        common = CommonAttentionMetadata(
            query_start_loc=starts.to(self._device),
            query_start_loc_cpu=starts,
            seq_lens=ends.to(self._device),
            num_reqs=len(rows),
            num_actual_tokens=len(index),
            max_query_len=int(lengths.max()),
            max_seq_len=int(ends.max()),
            block_table_tensor=pad_sequence(tables, batch_first=True),
            slot_mapping=slots,
            causal=True,
            positions=torch.from_numpy(index).to(self._device),
            seq_lens_cpu_upper_bound=ends,
        )
        metadata = {}
        for names, builder in self._builders:
            metadata.update(dict.fromkeys(names, builder.build(0, common)))
        ids = np.concatenate([part.token_ids[span.start : span.end] for span, part in rows])
        with (
            torch.inference_mode(),
            set_forward_context(
                metadata,
                self._config,
                num_tokens=len(index),
                slot_mapping=dict.fromkeys(self._layers, slots),
                skip_compiled=True,
            ),
        ):
            hidden: torch.Tensor = (model or self._model)(
                input_ids=torch.from_numpy(ids).to(self._device), positions=places
            )
        return hidden

    def _where(self, span: Span, part: Part) -> np.ndarray:
        """Rotary positions as the model takes them."""
        where = np.arange(span.start, span.end)
        if part.positions is not None:
            where = part.positions[..., span.start : span.end]
        return np.tile(where, (3, 1)) if self._three_axes and where.ndim == 1 else where

    def probe(
        self, positions: torch.Tensor, model: Callable[..., Any] | None = None
    ) -> torch.Tensor:
        """Compute tokens that mean nothing, in no request's blocks, at ``[n]`` rotary positions."""
        n = len(positions)
        blocks = [0] * -(-n // self._block_size)
        part = Part([Span(0, n)], np.arange(3, 3 + n), positions.numpy(), blocks)
        return self.run([part], keep=False, model=model)

    def prove(self, whole: Any) -> None:
        """That the model answers text as the `whole` multimodal one does, of which it is a part.

        Raises:
            ValueError: it does not.
        """

        def through(input_ids: torch.Tensor, positions: torch.Tensor) -> Any:
            embeds = whole.embed_input_ids(input_ids)
            return whole(input_ids=None, positions=positions, inputs_embeds=embeds)

        positions = torch.arange(PROBE_TOKENS)
        alone, expected = (self.probe(positions, model) for model in (None, through))
        tolerance = 1e-3 if expected.dtype == torch.float32 else 1e-1
        if not float((alone - expected).abs().max()) <= tolerance * float(expected.abs().max()):
            raise ValueError("the language part does not answer as the whole model does")

    def looked_at(
        self,
        last: int,
        token_id: int,
        place: np.ndarray | None,
        block_ids: Sequence[int],
        kv: Sequence[tuple[torch.Tensor, torch.Tensor]],
        pages: Pages,
    ) -> np.ndarray:
        """What position `last` attends to: ``[last + 1]`` float32, mean over heads and layers.

        Costs a forward of one token.

        Args:
            place: ``[3]`` its rotary position; None: the index.
            kv: K and V of each layer, ``[num_kv_heads, >= last + 1, dim]``.
            pages: those that they are of.
        """
        tail = TailAttention()
        of_layers = dict(zip(self._layers, kv, strict=True))

        def see(name: str, query: torch.Tensor, *_: torch.Tensor) -> None:
            layer, (k, v) = self._layers[name], (x[:, : last + 1] for x in of_layers[name])
            query, key = pages.scored(layer, query, k, v)
            tail.add(query, key, layer.impl.scale, _scoring(layer))

        ids = np.zeros(last + 1, np.int64)
        ids[last] = token_id
        where = None
        if place is not None:
            where = np.zeros((3, last + 1), np.int64)
            where[:, last] = place
        with torch.inference_mode(), watching(self._layers, see):
            self.run([Part([Span(last, last + 1)], ids, where, block_ids)], keep=False)
        mass = tail.mass
        if mass is None:
            raise RuntimeError("the model did not call its attention layers")
        return mass


def _scoring(layer: Any) -> Scoring:
    """What a layer of vLLM's does to its scores."""
    return Scoring(
        layer.sliding_window,
        getattr(layer, "attention_chunk_size", None),
        getattr(layer.impl, "logits_soft_cap", None) or None,
        getattr(layer.impl, "sinks", None),
    )


def _positions(spans: Sequence[Span]) -> np.ndarray:
    return np.concatenate([np.arange(s.start, s.end) for s in spans])
