"""Model runners: the forward passes of the engine, over slots.

`SlotRunner` runs PartialAttention and is what similar reuse needs. What it cannot run is served
with transformers' own cache: by `plain.PlainRunner` whole prompts only, by `states.StateRunner`
what follows an identical beginning.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch

from kvshare_mm.attention import Recorder, SlotCache, TailAttention
from kvshare_mm.kernels.ragged import RaggedQueries
from kvshare_mm.models.loader import LoadedModel
from kvshare_mm.native.inputs import (
    MediaInputs,
    decode_positions,
    fitting,
    followed_by,
    model_inputs,
    seen,
)
from kvshare_mm.reads import PROBE, Heads, reading_heads

logger = logging.getLogger(__name__)


# So many times smaller is a chunk beside answers that takes a forward of its own.
SMALLER = 4


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """Positions of a prompt that one forward computes, see `ModelRunner.prefill`."""

    slot: int
    token_ids: np.ndarray
    compute: np.ndarray
    tail: TailAttention | None = None
    media: MediaInputs | None = None
    reads: Recorder | None = None


class ModelRunner(Protocol):
    """Prefill and decode over numbered slots.

    Attributes:
        num_slots: requests at a time.
        chunk: most positions of a prompt that are computed at once.
        can_draft: a decode step may compute several positions of a slot.
        moved_s: `time.perf_counter` when the model last computed something.
    """

    num_slots: int
    chunk: int
    can_draft: bool

    @property
    def moved_s(self) -> float: ...

    def prefill(
        self,
        slot: int,
        token_ids: np.ndarray,
        compute: np.ndarray,
        tail: TailAttention | None = None,
        media: MediaInputs | None = None,
        reads: Recorder | None = None,
    ) -> torch.Tensor:
        """Compute positions `compute` of a prompt; the others' KV is in the slot already.

        Args:
            token_ids: ``[N]`` the whole prompt.
            compute: ascending positions; what comes before the first is in the slot.
            tail: records where the last one looks, if this runner can tell.
            media: what it holds beyond token ids: features for all media to be computed.
            reads: is told of the attention of all of them, if this runner can tell.

        Returns:
            ``[vocab_size]`` logits of the last one computed.
        """

    def decode(
        self,
        slots: Sequence[int],
        token_ids: Sequence[int],
        positions: Sequence[int],
        rope_deltas: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """One step of several requests: ``[len(slots), vocab_size]`` logits.

        Args:
            slots: each once, or, if `can_draft`, in a row for positions that follow one another.
            positions: index of each token in its slot.
            rope_deltas: rotary position minus index of each; None: no difference.
        """

    def beside(self, context: int) -> int:
        """Most positions of a prompt, behind `context` others, that are computed at once while
        others are answered, who wait for them at every token."""

    def release(self, slot: int) -> None:
        """The slot's request is over."""


class SlotRunner:
    """PartialAttention over preallocated slots.

    The slots' memory is reserved at once but only touched as far as requests reach, so an idle
    server holds no KV.

    Args:
        loaded: a model whose `kv_shape` is known.
        num_slots: requests that can be in flight.
        max_len: positions a slot holds.
        chunk: most positions of one forward; longer prefills run in several, which bounds the
            memory of activations, and lets others be served between them.
        drafts: see `can_draft`.
        beside: most positions of a prompt in one forward with others' answers, where it begins;
            default: a quarter of `chunk`.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        num_slots: int,
        max_len: int,
        chunk: int,
        drafts: bool = True,
        beside: int | None = None,
    ) -> None:
        shape = loaded.kv_shape
        if shape is None:
            raise ValueError(f"{loaded.name} does not run under PartialAttention")
        self.num_slots = num_slots
        self._model = loaded.model
        self._device = loaded.device
        self.chunk = chunk
        self.can_draft = drafts
        self._both_ways = loaded.family is not None and loaded.family.both_ways
        # Zeros: layers that use another's KV write none (Gemma 3n), and it is stored all the same.
        k, v = (
            _untouched_zeros(
                (shape.num_layers, num_slots, shape.num_kv_heads, max_len, dim),
                loaded.dtype,
                loaded.device,
            )
            for dim in (shape.key_dim, shape.value_dim)
        )
        latent = loaded.rotary is not None and loaded.rotary.of_values
        self._cache = SlotCache(k, v, packed=latent)
        # A latent is expanded for all requests of a forward, up to the end of the longest.
        self._can_pack = not latent
        if beside is None or not self._can_pack:
            beside = chunk // SMALLER
        self._beside = min(chunk, beside)

    @property
    def max_bytes(self) -> int:
        """Bytes that the slots take when all are full."""
        return self._cache.k.nbytes + self._cache.v.nbytes

    @property
    def moved_s(self) -> float:
        return self._cache.moved_s

    def slot_kv(self, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of a slot, ``[num_layers, num_kv_heads, max_len, head_dim]``, as views."""
        return self._cache.k[:, slot], self._cache.v[:, slot]

    @torch.inference_mode()
    def prefill(
        self,
        slot: int,
        token_ids: np.ndarray,
        compute: np.ndarray,
        tail: TailAttention | None = None,
        media: MediaInputs | None = None,
        reads: Recorder | None = None,
    ) -> torch.Tensor:
        ids = torch.from_numpy(token_ids).to(self._device)
        *parts, last = self._parts(compute, media)
        for part in parts:
            self._forward(slot, ids, part, media, reads=reads)
        logits: torch.Tensor = self._forward(slot, ids, last, media, tail, reads=reads).logits
        return logits[0, -1]

    def _parts(self, compute: np.ndarray, media: MediaInputs | None) -> Iterator[torch.Tensor]:
        whole = self._whole(media)
        while len(compute):
            length = fitting(compute, self.chunk, whole)
            yield torch.from_numpy(compute[:length]).to(self._device)
            compute = compute[length:]

    def _whole(self, media: MediaInputs | None) -> tuple[tuple[int, int], ...]:
        """``[start, end)`` of media whose positions see each other."""
        return media.spans if media is not None and self._both_ways else ()

    @torch.inference_mode()
    def forward(
        self,
        slot: int,
        token_ids: np.ndarray,
        compute: np.ndarray,
        keep: int,
        given_up: Callable[[], bool],
        tail: TailAttention | None = None,
        media: MediaInputs | None = None,
    ) -> torch.Tensor:
        """One forward over positions `compute`, in the background: see `prefill`.

        Args:
            keep: so many of the last positions' logits are wanted.
            given_up: asked before every layer; true ends it.

        Returns:
            ``[keep, vocab_size]`` logits.

        Raises:
            GivenUp: it was.
        """
        ids, index = (torch.from_numpy(a).to(self._device) for a in (token_ids, compute))
        self._cache.given_up = given_up
        try:
            logits = self._forward(slot, ids, index, media, tail, keep).logits
        finally:
            self._cache.given_up = None
        return torch.as_tensor(logits[0, -keep:])

    @torch.inference_mode()
    def decode(
        self,
        slots: Sequence[int],
        token_ids: Sequence[int],
        positions: Sequence[int],
        rope_deltas: Sequence[int] | None = None,
    ) -> torch.Tensor:
        return self._packed(None, slots, token_ids, positions, rope_deltas)

    def beside(self, context: int) -> int:
        """As many as take the time that they take where a prompt begins: attention makes each
        dearer."""
        return max(1, int(self._beside / (1 + context / self._doubled)))

    @cached_property
    def _doubled(self) -> float:
        """Tokens of context with which a position's attention is as much work as its weights."""
        embedded: int = self._model.get_input_embeddings().weight.numel()
        weights: int = sum(p.numel() for p in self._model.parameters()) - embedded
        layers, _, kv_heads, _, dim = self._cache.k.shape
        heads = getattr(self._model.config.get_text_config(), "num_attention_heads", kv_heads)
        heads = heads if isinstance(heads, int) else kv_heads
        each: int = layers * heads * (dim + self._cache.v.shape[-1])
        return max(1.0, weights / each)

    def packs(self, chunk: Chunk) -> bool:
        """Whether a chunk can be in one forward with answers."""
        return self._can_pack and not (chunk.media and chunk.media.features)

    @torch.inference_mode()
    def step(
        self,
        chunk: Chunk,
        slots: Sequence[int],
        token_ids: Sequence[int],
        positions: Sequence[int],
        rope_deltas: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """A chunk of a prompt and a decode step in one forward, which reads the weights once.

        Args:
            chunk: one that `packs`, of a slot that is not among `slots`.
            slots, token_ids, positions, rope_deltas: see `decode`.

        Returns:
            ``[1 + len(slots), vocab_size]`` logits of the chunk's last position, and of each token.
        """
        return self._packed(chunk, slots, token_ids, positions, rope_deltas)

    def _packed(
        self,
        chunk: Chunk | None,
        slots: Sequence[int],
        token_ids: Sequence[int],
        positions: Sequence[int],
        rope_deltas: Sequence[int] | None,
    ) -> torch.Tensor:
        index = torch.tensor(positions, device=self._device)
        ahead = torch.tensor(rope_deltas or [0] * len(slots), device=self._device)
        rows = [(slot, len(list(same))) for slot, same in itertools.groupby(slots)]
        pages = [slot for slot, _ in rows]
        indices = list(index.split([count for _, count in rows]))
        inputs = {
            "input_ids": torch.tensor([token_ids], device=self._device),
            "position_ids": decode_positions(index, ahead),
        }
        tail = reads = None
        if chunk is not None:
            tail, reads = chunk.tail, chunk.reads
            ids, here = (
                torch.from_numpy(a).to(self._device) for a in (chunk.token_ids, chunk.compute)
            )
            inputs = followed_by(model_inputs(self._model, ids, here, chunk.media), inputs)
            pages, indices = [chunk.slot, *pages], [here, *indices]
        batch = RaggedQueries.in_slots(pages, indices)
        keep = len(slots) + (chunk is not None)
        with self._cache.forward(batch, tail, reads):
            logits: torch.Tensor = self._model(
                **inputs, past_key_values=self._cache, use_cache=True, logits_to_keep=keep
            ).logits
        return logits[0, -keep:]  # some models give all

    def release(self, slot: int) -> None:
        """Nothing to do: the next request overwrites what it uses."""

    @cached_property
    def reading_heads(self) -> Heads:
        """Heads of the model that look up what stands before, to be watched; none if it has none,
        or they cannot be found."""
        if self._cache.k.shape[3] < 2 * PROBE:
            return {}

        def probe(ids: torch.Tensor, recorder: Recorder) -> None:
            index = torch.arange(len(ids), device=self._device)
            self._forward(0, ids.to(self._device), index, None, reads=recorder)

        try:
            with torch.inference_mode():
                return reading_heads(probe, self._model.get_input_embeddings().num_embeddings)
        except Exception as error:  # whatever a model does with random tokens: it serves without
            logger.warning("who reads what will not be known: %s", error)
            return {}

    def _forward(
        self,
        slot: int,
        ids: torch.Tensor,
        index: torch.Tensor,
        media: MediaInputs | None,
        tail: TailAttention | None = None,
        keep: int = 1,
        reads: Recorder | None = None,
    ) -> Any:
        sees = seen(index, self._whole(media))
        batch = RaggedQueries.in_slots([slot], [index], None if sees is None else [sees])
        with self._cache.forward(batch, tail, reads):
            return self._model(
                **model_inputs(self._model, ids, index, media),
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=keep,
            )


def works(runner: ModelRunner, slot: int) -> bool:
    """Whether the model still answers anybody: one token's prefill and decode, in a slot whose
    request is over."""
    try:
        runner.release(slot)
        runner.prefill(slot, np.zeros(1, np.int64), np.zeros(1, np.int64))
        runner.decode([slot], [0], [1])
    except Exception as failure:
        logger.error("the model does not answer: %s", failure)
        return False
    return True


_ALIGNMENT = 64  # bytes: what torch gives its own tensors on a CPU, a cache line


def _untouched_zeros(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Zeros; on a CPU `torch.zeros` writes them all, these take memory once they are written."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    memory = np.zeros(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return torch.from_numpy(memory[start : start + size]).view(dtype).view(shape)
