"""Models that PartialAttention cannot run: whole prompts, each request over a cache of its own."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from kvshare_mm.attention import Recorder, TailAttention
from kvshare_mm.models.loader import LoadedModel
from kvshare_mm.models.states import CachedModel
from kvshare_mm.native.inputs import MediaInputs, model_inputs


class PlainRunner:
    """Whole prompts with transformers' own cache, one request after the other."""

    def __init__(self, loaded: LoadedModel, num_slots: int) -> None:
        self.num_slots = num_slots
        self.can_draft = False
        self.chunk = sys.maxsize  # some of these models cannot go on with half a prompt
        self._model = loaded.model
        self._forward = CachedModel(loaded.model)
        self._device = loaded.device
        self._caches: dict[int, Any] = {}
        self._lengths: dict[int, int] = {}
        self._logits: dict[int, torch.Tensor] = {}
        self._broken: set[int] = set()
        self.moved_s = 0.0

    def prefill(
        self,
        slot: int,
        token_ids: np.ndarray,
        compute: np.ndarray,
        tail: TailAttention | None = None,
        media: MediaInputs | None = None,
        reads: Recorder | None = None,
    ) -> torch.Tensor:
        if len(compute) != len(token_ids):
            raise ValueError("this model computes whole prompts only")
        self._empty(slot)
        return self._compute(slot, token_ids, compute, media)

    def decode(
        self,
        slots: Sequence[int],
        token_ids: Sequence[int],
        positions: Sequence[int],
        rope_deltas: Sequence[int] | None = None,
    ) -> torch.Tensor:
        logits = []
        for slot, token, position, rope_delta in zip(
            slots, token_ids, positions, rope_deltas or [0] * len(slots), strict=True
        ):
            if slot in self._broken:
                raise RuntimeError("a forward failed here, and its states cannot go back")
            # A step that failed for another slot is repeated.
            if self._lengths[slot] == position:
                at = torch.tensor([[position + rope_delta]], device=self._device)
                token_id = torch.tensor([[token]], device=self._device)
                self._step(slot, {"input_ids": token_id, "position_ids": at}, position + 1)
            logits.append(self._logits[slot])
        return torch.stack(logits)

    def beside(self, context: int) -> int:
        return self.chunk

    def release(self, slot: int) -> None:
        for known in (self._caches, self._lengths, self._logits):
            known.pop(slot, None)
        self._broken.discard(slot)

    def _empty(self, slot: int) -> None:
        self._broken.discard(slot)
        self._caches[slot] = self._forward.new_cache()

    @torch.inference_mode()
    def _compute(
        self, slot: int, token_ids: np.ndarray, compute: np.ndarray, media: MediaInputs | None
    ) -> torch.Tensor:
        ids, index = (torch.from_numpy(a).to(self._device) for a in (token_ids, compute))
        inputs = model_inputs(self._model, ids, index, media)
        return self._step(slot, inputs, int(compute[-1]) + 1)

    def _step(self, slot: int, inputs: dict[str, Any], length: int) -> torch.Tensor:
        """The slot holds `length` positions then."""
        try:
            logits, self._caches[slot] = self._forward(self._caches[slot], inputs)
        except BaseException:
            self._broken.add(slot)  # some of its layers have taken the tokens
            raise
        self._lengths[slot], self._logits[slot] = length, logits
        self.moved_s = time.perf_counter()
        return logits
