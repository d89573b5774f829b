"""How far reused KV drifted, measured with a forward of its own, as CacheBlend does."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from kvshare_mm.attention import SlotCache
from kvshare_mm.kernels.ragged import RaggedQueries
from kvshare_mm.models.loader import LoadedModel
from kvshare_mm.native.inputs import MediaInputs, model_inputs


@torch.inference_mode()
def value_deviation(
    loaded: LoadedModel,
    slot: tuple[torch.Tensor, torch.Tensor],
    token_ids: np.ndarray,
    start: int,
    layer: int,
    media: MediaInputs | None = None,
) -> np.ndarray:
    """How far a slot's V is from what its context gives, at an early layer.

    Runs the first layers over positions ``[start, N)``; those before must be in the slot. A model
    with fewer layers is measured at its last one.

    Args:
        slot: K and V, ``[num_layers, num_kv_heads, >= N, head_dim]``; left as they are.

    Returns:
        ``[N]`` float32 L2 norms over heads and channels; 0 before `start`.
    """
    k, v = slot
    layer = min(layer, len(k) - 1)
    cache = _DeviationCache(k, v, len(token_ids), layer)
    ids = torch.from_numpy(token_ids).to(loaded.device)
    index = torch.arange(start, len(token_ids), device=loaded.device)
    batch = RaggedQueries.in_slots([0], [index])
    deviation = np.zeros(len(token_ids), np.float32)
    try:
        with cache.forward(batch):
            loaded.model(
                **model_inputs(loaded.model, ids, index, media),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
    except _Measured as measured:
        deviation[start:] = measured.deviation.float().cpu().numpy()
    return deviation


class _Measured(Exception):
    """Ends a forward early: the deviation is known."""

    def __init__(self, deviation: torch.Tensor) -> None:
        super().__init__()
        self.deviation = deviation


class _DeviationCache(SlotCache):
    """A copy of one slot's first layers; compares V at `layer` and ends the forward there."""

    def __init__(self, k: torch.Tensor, v: torch.Tensor, length: int, layer: int) -> None:
        super().__init__(
            k[:layer, None, :, :length].clone(),
            v[:layer, None, :, :length].clone(),
        )
        self._layer = layer
        self._edited = v[layer, :, :length]

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if layer_idx < self._layer:
            return super().update(key_states, value_states, layer_idx)
        n = value_states.shape[2]
        difference = value_states[0] - self._edited[:, -n:]
        raise _Measured(difference.float().pow(2).sum((0, 2)).sqrt())
