"""How vLLM's model rotates its keys: read off its own rotary embedding, then proved on it."""

from __future__ import annotations

from typing import Any

import torch

from kvshare_mm.reuse.rotary import RotarySpec, rerotate

_PROBE_TOKENS = 12
_PROBE_SHIFT = 37


def rotary_spec(model: Any) -> RotarySpec:
    """The rotation that all layers of a model share.

    Raises:
        ValueError: there is none, there are several, or keys do not follow it.
    """
    found = {id(m): m for m in model.modules() if hasattr(m, "_compute_cos_sin_cache")}
    if len(found) != 1:
        raise ValueError(f"the model has {len(found)} different rotary embeddings, not one")
    rotary = next(iter(found.values()))
    # Row 1 holds cosine and sine of each pair's angle per position; a factor on both cancels.
    cos, sin = rotary._compute_cos_sin_cache()[1].double().chunk(2)
    spec = RotarySpec(torch.atan2(sin, cos).float()[None], not rotary.is_neox_style)
    _prove(rotary, spec)
    return spec


def _prove(rotary: Any, spec: RotarySpec) -> None:
    """Raises ValueError unless a key that is turned on is the key at the other position."""
    cache = rotary.cos_sin_cache
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(_PROBE_TOKENS, rotary.head_size, generator=generator).to(cache)
    positions = torch.arange(_PROBE_TOKENS, device=cache.device)
    shift = torch.full((_PROBE_TOKENS,), _PROBE_SHIFT)

    def rotated(positions: torch.Tensor) -> torch.Tensor:
        # In place on some platforms; one query head and one key head.
        _, turned = rotary(positions, key.clone(), key.clone())
        return torch.as_tensor(turned)

    with torch.inference_mode():
        target = rotated(positions + _PROBE_SHIFT)
        error = (rerotate(rotated(positions), shift, spec) - target).float().abs().max()
    tolerance = 1e-3 if key.dtype == torch.float32 else 5e-2
    if not error <= tolerance * target.float().abs().max():
        raise ValueError("the model's keys do not follow its rotary embedding")
