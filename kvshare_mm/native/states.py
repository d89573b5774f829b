"""Models that go on from states: whole prompts, or what is behind a prefix whose state was kept."""

from __future__ import annotations

import itertools

import numpy as np
import torch

from kvshare_mm.attention import Recorder, TailAttention
from kvshare_mm.models.loader import LoadedModel
from kvshare_mm.models.states import State
from kvshare_mm.native.inputs import MediaInputs
from kvshare_mm.native.plain import PlainRunner
from kvshare_mm.native.slots import SMALLER

# A state that saves fewer tokens than that, beside the one before it, is not worth its room.
_LEAST_TOKENS = 16


class StateRunner(PlainRunner):
    """Transformers' own cache, taken up where a state was kept.

    A state takes megabytes, so few are kept of a request: behind the first token that ends a turn
    (the system prompt, in most templates), where it leaves another request, before the last token
    of the prompt, and at the end of the answer.

    Args:
        loaded: a model whose `states` are known.
        num_slots: requests at a time.
        chunk: most positions of one forward.
    """

    def __init__(self, loaded: LoadedModel, num_slots: int, chunk: int) -> None:
        super().__init__(loaded, num_slots)
        if loaded.states is None:
            raise ValueError(f"{loaded.name} does not go on from states")
        self.layout = loaded.states
        self.chunk = chunk
        self._dtype = loaded.dtype
        self._ends = list(loaded.eos_token_ids)
        self._kept: dict[int, dict[int, State | None]] = {}

    def begin(self, slot: int, token_ids: np.ndarray, start: int, parted: int) -> None:
        """A prompt comes whose states shall be kept.

        Args:
            start: so much of it is taken from another request.
            parted: where it leaves the stored request that begins like it; 0: none does.
        """
        parted -= parted % _LEAST_TOKENS  # the next one may leave it a token sooner
        ended = np.flatnonzero(np.isin(token_ids, self._ends))
        kept: dict[int, State | None] = {}
        for stop in sorted({parted, len(token_ids) - 1, *(ended[:1] + 1).tolist()}):
            if self.layout.states and stop >= start + _LEAST_TOKENS:
                kept[stop] = None
                start = stop
        self._kept[slot] = kept

    def resume(self, slot: int, k: torch.Tensor, v: torch.Tensor, state: State | None) -> None:
        """Put a prefix into a slot, see `StateLayout.cache_of`."""
        with torch.inference_mode():
            self._caches[slot] = self.layout.cache_of(k, v, state)
        self._lengths[slot] = k.shape[2]

    def prefill(
        self,
        slot: int,
        token_ids: np.ndarray,
        compute: np.ndarray,
        tail: TailAttention | None = None,
        media: MediaInputs | None = None,
        reads: Recorder | None = None,
    ) -> torch.Tensor:
        start, end = int(compute[0]), int(compute[-1]) + 1
        if len(compute) != end - start or start not in (0, self._lengths.get(slot)):
            raise ValueError("what is computed must follow what is in the slot")
        if start == 0:
            self._empty(slot)
        kept = self._kept.get(slot, {})
        cuts = {start, end, *range(start, end, self.chunk), *(n for n in kept if start < n < end)}
        for low, high in itertools.pairwise(sorted(cuts)):
            logits = self._compute(slot, token_ids, np.arange(low, high), media)
            if high in kept:
                kept[high] = self.layout.state_of(self._caches[slot])
        return logits

    def slot_kv(self, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of a slot, ``[num_layers, num_kv_heads, N, head_dim]``, copied."""
        return self.layout.kv_of(self._caches[slot], self._lengths[slot])

    def empty_kv(self, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Room for the KV of `n` positions, see `resume`."""
        shape = self.layout.kv_shape
        k, v = (
            torch.empty(
                shape.num_layers, shape.num_kv_heads, n, dim, dtype=self._dtype, device=self._device
            )
            for dim in (shape.key_dim, shape.value_dim)
        )
        return k, v

    def states(self, slot: int, over: bool) -> list[tuple[int, State]]:
        """States of a slot that were kept and not asked for yet, by the length of their prefix.

        Args:
            over: its answer is complete; that of all that was computed is among them.
        """
        kept = self._kept.get(slot)
        if kept is None:
            return []
        if over and self.layout.states and self._lengths[slot] >= _LEAST_TOKENS:
            kept[self._lengths[slot]] = self.layout.state_of(self._caches[slot])
        found = [(n, state) for n, state in kept.items() if state is not None]
        kept.clear()
        return found

    def beside(self, context: int) -> int:
        return max(1, self.chunk // SMALLER)

    def release(self, slot: int) -> None:
        super().release(slot)
        self._kept.pop(slot, None)
