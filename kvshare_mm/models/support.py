"""Can a model's KV be moved to other positions? Declared by its config, then proved by running it.

The proof needs no list of architectures: a few forwards over a few tokens show that
PartialAttention gives the model's own logits, and that in every layer a key computed at one
position, re-rotated, is the key computed at the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from kvshare_mm.attention import ATTENTION_NAME, SlotCache
from kvshare_mm.kernels.ragged import RaggedQueries
from kvshare_mm.reuse.rotary import SUPPORTED_ROPE_TYPES, RotarySpec, rerotate

_PROBE_TOKENS = 12
_PROBE_SHIFT = 37


@dataclass(frozen=True, slots=True)
class KVShape:
    """Shape of one position's KV: ``[num_layers, num_kv_heads, key_dim or value_dim]``."""

    num_layers: int
    num_kv_heads: int
    key_dim: int
    value_dim: int

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        per_layer = self.num_kv_heads * (self.key_dim + self.value_dim)
        return self.num_layers * per_layer * dtype.itemsize


@dataclass(frozen=True, slots=True)
class Support:
    """What `check_support` found; `reason` is None if KV can be reused."""

    reason: str | None = None
    rotary: RotarySpec | None = None
    kv_shape: KVShape | None = None


class _FirstLayerDone(Exception):
    """Ends a forward early: the first layer's K and V are known."""


class _FirstLayer(SlotCache):
    """Takes the first layer's K/V and ends the forward."""

    def __init__(self) -> None:
        super().__init__(torch.empty(0), torch.empty(0))

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *_: Any,
        **__: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.k, self.v = key_states, value_states
        raise _FirstLayerDone


def check_support(model: Any, attention: str = ATTENTION_NAME) -> Support:
    """Find out whether `model` can run under PartialAttention and its keys be re-rotated.

    On success the model's attention implementation is PartialAttention; otherwise it is as before.

    Args:
        attention: PartialAttention's name on a backend, see `attention.attention_name`. The proof
            runs on that backend.
    """
    reason = declared_obstacle(model.config)
    if reason:
        return Support(reason)
    inv_freq = _inv_freq(model)
    if inv_freq is None:
        return Support("no rotary position embedding was found in it")
    before = model.config._attn_implementation
    device = model.device
    try:
        vocab = int(model.config.vocab_size)
        ids = torch.arange(3, 3 + _PROBE_TOKENS, device=device).remainder(vocab)[None]
        positions = _rotary_positions(model.config, device)
        with torch.inference_mode():
            expected = model(
                input_ids=ids, position_ids=_position_ids(positions), use_cache=False
            ).logits[0, -1]
            model.set_attn_implementation(attention)
            support = _prove(model, ids, positions, expected, RotarySpec(inv_freq))
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
        support = Support(f"it does not run under PartialAttention ({error})")
    if support.reason:
        model.set_attn_implementation(before)
    return support


def declared_obstacle(config: Any) -> str | None:
    """The reason that the configuration itself gives against reuse, if any."""
    rope = getattr(config, "rope_parameters", None) or {}
    if any(isinstance(v, dict) for v in rope.values()):
        return "its layers use different rotary embeddings"
    rope_type = rope.get("rope_type", "default")
    if rope_type not in SUPPORTED_ROPE_TYPES:
        return f"rotary type {rope_type!r} depends on the sequence length"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None)
    limit = getattr(config, "max_position_embeddings", None) or 0
    if kinds - {"full_attention"} or (window and window < limit):
        return "it has sliding-window or recurrent layers"
    if getattr(config, "kv_lora_rank", None):
        return "its KV is compressed (multi-head latent attention)"
    return None


def _inv_freq(model: Any) -> torch.Tensor | None:
    for module in model.modules():
        inv_freq = getattr(module, "inv_freq", None)
        if isinstance(inv_freq, torch.Tensor) and inv_freq.ndim == 1:
            return inv_freq.detach().float()
    return None


def _rotary_positions(config: Any, device: torch.device) -> torch.Tensor:
    """Rotary positions of the probe: ``[1, n]``, or ``[3, n]`` with axes that go different ways."""
    index = torch.arange(_PROBE_TOKENS, device=device)
    if not (getattr(config, "rope_parameters", None) or {}).get("mrope_section"):
        return index[None]
    return torch.stack((index, 2 * index % 7, 3 * index % 11))


def _position_ids(positions: torch.Tensor) -> torch.Tensor:
    """As models take them: ``[1, n]``, or ``[3, 1, n]``."""
    return positions if len(positions) == 1 else positions[:, None]


def _prove(
    model: Any, ids: torch.Tensor, positions: torch.Tensor, expected: torch.Tensor, spec: RotarySpec
) -> Support:
    n = ids.shape[1]
    index = torch.arange(n, device=ids.device)
    first = _first_layer(model, ids, positions)
    moved = _first_layer(model, ids, positions + _PROBE_SHIFT)
    shape = KVShape(
        num_layers=model.config.num_hidden_layers,
        num_kv_heads=first.k.shape[1],
        key_dim=first.k.shape[3],
        value_dim=first.v.shape[3],
    )
    tolerance = 1e-3 if first.k.dtype == torch.float32 else 5e-2
    scale = first.k.float().abs().max().clamp(min=1e-6)
    shift = torch.full((n,), _PROBE_SHIFT)
    for candidate in (spec, replace(spec, interleaved=True)):
        error = (rerotate(first.k, shift, candidate) - moved.k).float().abs().max()
        if error <= tolerance * scale:
            spec = candidate
            break
    else:
        return Support("its keys do not follow its rotary embedding")
    heads, layers = shape.num_kv_heads, shape.num_layers
    # Two slots: an attention that ignores the layout sees both and fails.
    cache = SlotCache(
        first.k.new_zeros(layers, 2, heads, n, shape.key_dim),
        first.v.new_zeros(layers, 2, heads, n, shape.value_dim),
    )
    # Every layer: some models rotate only in most of theirs. With the same inputs in both forwards,
    # or the rounding of the layers below would drown the difference.
    with _same_inputs(model):
        _fill(model, ids, cache, 0, index, positions)
        _fill(model, ids, cache, 1, index, positions + _PROBE_SHIFT)
    for layer, (base, target) in enumerate(zip(cache.k[:, 0], cache.k[:, 1], strict=True)):
        error = (rerotate(base, shift, spec) - target).float().abs().max()
        if not error <= tolerance * target.float().abs().max():
            return Support(f"the keys of its layer {layer} do not follow its rotary embedding")
    # The last position is computed by itself, so that the keys it needs come from the slot.
    _fill(model, ids, cache, 0, index[:-1], positions)
    logits = _fill(model, ids, cache, 0, index[-1:], positions)
    error = (logits - expected).float().abs().max()
    if not error <= 2 * tolerance * expected.float().abs().max():
        return Support("PartialAttention does not reproduce its logits")
    return Support(None, spec, shape)


@contextmanager
def _same_inputs(model: Any) -> Iterator[None]:
    """Every layer's attention gets the hidden states that it got the first time."""
    seen: dict[Any, Any] = {}

    def replay(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (seen.setdefault(module, args[0]), *args[1:]), kwargs
        if "hidden_states" in kwargs:
            states = seen.setdefault(module, kwargs["hidden_states"])
            return args, {**kwargs, "hidden_states": states}
        return None

    hooks = [
        module.register_forward_pre_hook(replay, with_kwargs=True)
        for module in model.modules()
        if hasattr(module, "layer_idx")
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _fill(
    model: Any,
    ids: torch.Tensor,
    cache: SlotCache,
    slot: int,
    index: torch.Tensor,
    positions: torch.Tensor,
) -> Any:
    """Compute tokens `index` of `ids` into a slot, turned as `positions` say; the last logits."""
    cache.batch = RaggedQueries.in_slots([slot], [index])
    return model(
        input_ids=ids[:, index],
        position_ids=_position_ids(positions[:, index]),
        past_key_values=cache,
        use_cache=True,
        kvshare_batch=cache.batch,
    ).logits[0, -1]


def _first_layer(model: Any, ids: torch.Tensor, positions: torch.Tensor) -> _FirstLayer:
    cache = _FirstLayer()
    cache.batch = RaggedQueries.in_slots([0], [torch.arange(ids.shape[1])])
    try:
        model(
            input_ids=ids,
            position_ids=_position_ids(positions),
            past_key_values=cache,
            use_cache=True,
            kvshare_batch=cache.batch,
        )
    except _FirstLayerDone:
        return cache
    raise ValueError("its layers do not use transformers' cache")
