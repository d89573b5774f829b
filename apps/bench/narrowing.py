"""CacheBlend as published (arXiv 2405.16444): what is computed again shrinks from layer to layer.

The engine computes one set of positions in all layers. Here a forward of the bench runs everything
behind the exact prefix through the first layers and goes on, layer by layer, with those positions
whose V is furthest from the reused one. What it leaves in the slot is new where a layer computed it
and the donor's elsewhere; the last position is computed once more over that.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import nn

from kvshare_mm.apps.bench.policies import Narrowing
from kvshare_mm.apps.bench.work import decoder_layers
from kvshare_mm.attention import SlotCache
from kvshare_mm.kernels.ragged import RaggedQueries
from kvshare_mm.models.loader import LoadedModel
from kvshare_mm.native.inputs import model_inputs
from kvshare_mm.native.prefill import Prefill
from kvshare_mm.native.slots import SlotRunner


def narrow(prefill: Prefill, policy: Narrowing, loaded: LoadedModel) -> None:
    """Do all of a prefill but its last position; what its plan repairs then ran through all layers.

    Args:
        prefill: not begun yet. What its plan computes runs through all layers in any case.
    """
    plan = prefill.plan
    if not plan.num_reused:
        return
    assert isinstance(prefill.runner, SlotRunner)
    everything = plan.with_repair(np.arange(plan.num_tokens)).compute
    ids, index = (
        torch.from_numpy(a).to(loaded.device) for a in (prefill.stream.token_ids, everything)
    )
    inputs = model_inputs(loaded.model, ids, index, prefill.media.inputs(everything))
    cache = _NarrowingCache(*prefill.runner.slot_kv(prefill.slot), index, plan.compute, policy)
    prefill.plan = plan.with_repair(cache.run(loaded.model, inputs))
    prefill.done = len(prefill.plan.compute) - 1


class _NarrowingCache(SlotCache):
    """One slot, whose forward goes on with fewer rows behind a layer that drops some.

    Args:
        k, v: ``[num_layers, num_kv_heads, max_len, head_dim]`` of the slot.
        index: ``[n]`` token index of the rows to begin with.
        always: token indices that are never dropped.
        policy: how many others are kept.
    """

    def __init__(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        index: torch.Tensor,
        always: np.ndarray,
        policy: Narrowing,
    ) -> None:
        super().__init__(k[:, None], v[:, None])
        self._index = index
        self._always = torch.isin(index, torch.from_numpy(always).to(index.device))
        self._rows = torch.arange(len(index), device=index.device)  # of `index`, still running
        self._counts = policy.counts(len(k), int((~self._always).sum()))
        self._entered = ExitStack()

    @torch.inference_mode()
    def run(self, model: nn.Module, inputs: dict[str, Any]) -> np.ndarray:
        """The forward; token indices of the rows that ran through all layers."""
        hooks = [
            # Before those that count what a layer computes.
            layer.register_forward_pre_hook(self._narrow, with_kwargs=True, prepend=True)
            for layer in decoder_layers(model, len(self.k))
        ]
        try:
            with self._entered:
                self._enter()
                model(**inputs, past_key_values=self, use_cache=True, logits_to_keep=1)
        finally:
            for hook in hooks:
                hook.remove()
        return self._index[self._rows].cpu().numpy()

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        reused = self.v[layer_idx, 0][:, self._index[self._rows]]
        drift = (value_states[0] - reused).float().pow(2).sum((0, 2))
        drift[self._always[self._rows]] = torch.inf
        self._drift = drift
        return super().update(key_states, value_states, layer_idx)

    def _enter(self) -> None:
        batch = RaggedQueries.in_slots([0], [self._index[self._rows]])
        self._entered.enter_context(self.forward(batch))

    def _narrow(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Before a layer: drop rows, and give it what belongs to the others."""
        keep = int(self._always.sum()) + next(self._counts)
        hidden, *others = args
        if keep < len(self._rows):
            kept = self._drift.topk(keep).indices.sort().values
            self._rows, hidden = self._rows[kept], hidden[:, kept]
            self._enter()
        places = dict(kwargs)
        if kwargs.get("position_ids") is not None:
            places["position_ids"] = kwargs["position_ids"][..., self._rows]
        if kwargs.get("position_embeddings") is not None:
            turns = kwargs["position_embeddings"]
            places["position_embeddings"] = tuple(turn[..., self._rows, :] for turn in turns)
        return (hidden, *others), places
