"""Can a model's KV be moved to other positions? Declared by its config, then proved by running it.

The proof needs no list of architectures: a few forwards over a few tokens show that
PartialAttention gives the model's own logits, and that in every layer a key computed at one
position, re-rotated, is the key computed at the other.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from kvshare_mm.attention import ATTENTION_NAME, SlotCache
from kvshare_mm.kernels.ragged import RaggedQueries
from kvshare_mm.models.shape import KVShape
from kvshare_mm.models.states import StateLayout, prove_states
from kvshare_mm.reuse.rotary import SUPPORTED_ROPE_TYPES, RotarySpec, rerotate

_PROBE_TOKENS = 12
_PROBE_SHIFT = 37
_PROBE_TURN = (5, 11, 17)
_PROBE_WINDOW = 5
RECURRENT = "it has recurrent layers"
_ATTENTION_KINDS = {"full_attention", "sliding_attention", "chunked_attention"}

# K and V of a layer at one position, and at another: ``[1, num_kv_heads, n, head_dim]`` each.
_Pair = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Support:
    """What `check_support` found; `reason` is None if KV can be moved.

    Attributes:
        states: how one whose KV cannot be moved goes on behind an identical beginning; None: not.
    """

    reason: str | None = None
    rotary: RotarySpec | None = None
    kv_shape: KVShape | None = None
    states: StateLayout | None = None


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
    if reason := _of_length(model.config):
        return Support(reason)  # of a beginning, too: the probe is too short to see it
    reason = declared_obstacle(model.config)
    if not reason and not _rotations(model):
        reason = "no rotary position embedding was found in it"
    support = Support(reason) if reason else _movable(model, attention)
    if not support.reason:
        return support
    states = prove_states(model)
    if isinstance(states, str):
        return Support(f"{support.reason}; no exact prefixes either: {states}")
    return Support(support.reason, states=states)


def _movable(model: Any, attention: str) -> Support:
    before = model.config._attn_implementation
    device = model.device
    try:
        vocab = int(model.config.vocab_size)
        ids = torch.arange(3, 3 + _PROBE_TOKENS, device=device).remainder(vocab)[None]
        positions = _rotary_positions(model.config, device)
        with torch.inference_mode(), _small_windows(model):
            expected = model(
                input_ids=ids, position_ids=_position_ids(positions), use_cache=False
            ).logits[0, -1]
            model.set_attn_implementation(attention)
            support = _prove(model, ids, positions, expected)
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
        support = Support(f"it does not run under PartialAttention ({error})")
    if support.reason:
        model.set_attn_implementation(before)
    return support


def declared_obstacle(config: Any) -> str | None:
    """The reason that the configuration itself gives against moving KV, if any."""
    if reason := _of_length(config):
        return reason
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return RECURRENT if kinds - _ATTENTION_KINDS else None


def _of_length(config: Any) -> str | None:
    """The reason against any reuse, if keys depend on how long the prompt is."""
    rope = getattr(config, "rope_parameters", None) or {}
    for kind in [v for v in rope.values() if isinstance(v, dict)] or [rope]:
        rope_type = kind.get("rope_type", "default")
        if rope_type not in SUPPORTED_ROPE_TYPES:
            return f"rotary type {rope_type!r} depends on the sequence length"
    return None


def windows(config: Any) -> bool:
    """Whether some layer of a model does not see all that is before."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None)
    limit = getattr(config, "max_position_embeddings", None) or 0
    return bool(kinds - {"full_attention"} or (window and window < limit))


@contextmanager
def _small_windows(model: Any) -> Iterator[None]:
    """The model's windows and chunks are shorter than the probe, which would not see them else;
    but for those as long as its context, which change nothing."""
    before, limit = [], getattr(model.config, "max_position_embeddings", None) or sys.maxsize
    for owner in (model.config, *model.modules()):
        for name in ("sliding_window", "attention_chunk_size"):
            value = vars(owner).get(name)
            if isinstance(value, int) and _PROBE_WINDOW < value < limit:
                before.append((owner, name, value))
                setattr(owner, name, _PROBE_WINDOW)
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def _rotations(model: Any) -> list[torch.Tensor]:
    """The different ``[rotary_dim / 2]`` angles per position that a model has."""
    found: list[torch.Tensor] = []
    for module in model.modules():
        for name, value in {**vars(module), **module._buffers}.items():
            if not (name.endswith("inv_freq") and isinstance(value, torch.Tensor)):
                continue
            angles = value.detach().float()
            if angles.ndim == 1 and not any(torch.equal(angles, other) for other in found):
                found.append(angles)
    return found


def _rotary_positions(config: Any, device: torch.device) -> torch.Tensor:
    """Rotary positions of the probe: ``[1, n]``, or ``[3, n]`` with axes that go different ways."""
    index = torch.arange(_PROBE_TOKENS, device=device)
    if not (getattr(config, "rope_parameters", None) or {}).get("mrope_section"):
        return index[None]
    return torch.stack((index, 2 * index % 7, 3 * index % 11))


def _axes(config: Any, spec: RotarySpec) -> tuple[int, ...] | None:
    """On which axis each pair turns, as the configuration has it; None: it has one axis, or they
    take turns."""
    rope = getattr(config, "rope_parameters", None) or {}
    sections = rope.get("mrope_section") or ()
    axes = tuple(axis for axis, count in enumerate(sections) for _ in range(count))
    whole = len(sections) == 3 and 2 * len(axes) == spec.rotary_dim
    return axes if whole and not rope.get("mrope_interleaved") else None


def _position_ids(positions: torch.Tensor) -> torch.Tensor:
    """As models take them: ``[1, n]``, or ``[3, 1, n]``."""
    return positions if len(positions) == 1 else positions[:, None]


def _prove(
    model: Any, ids: torch.Tensor, positions: torch.Tensor, expected: torch.Tensor
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
    heads, layers = shape.num_kv_heads, shape.num_layers
    # Two slots: an attention that ignores the layout sees both and fails.
    cache = SlotCache(
        first.k.new_zeros(layers, 2, heads, n, shape.key_dim),
        first.v.new_zeros(layers, 2, heads, n, shape.value_dim),
        packed=getattr(model.config, "kv_lora_rank", None) is not None,
    )
    # Every layer: some models rotate only in most of theirs. With the same inputs in both forwards,
    # or the rounding of the layers below would drown the difference.
    with _same_inputs(model):
        _forward(model, ids, cache, 0, index, positions)
        _forward(model, ids, cache, 1, index, positions + _PROBE_SHIFT)
    # The first layer once more, with the inputs that it got: positions may be in the embeddings.
    pairs = [(first.k, first.v, moved.k, moved.v)]
    pairs += [(k[:1], v[:1], k[1:], v[1:]) for k, v in zip(cache.k, cache.v, strict=True)]
    spec, known = _rotary_spec(_rotations(model), pairs, tolerance)
    if spec is None:
        return Support(
            f"the keys of its layer {max(0, known - 1)} do not follow its rotary embedding"
        )
    axes = _axes(model.config, spec)
    if axes is not None:
        apart = torch.tensor(_PROBE_TURN, device=ids.device)
        turned = _first_layer(model, ids, positions + apart[:, None])
        pair, each = (first.k, first.v, turned.k, turned.v), replace(spec, axes=axes)
        spec = each if _moves(pair, apart.expand(n, 3), each, tolerance) else spec
    # The last position is computed by itself, so that the keys it needs come from the slot.
    _forward(model, ids, cache, 0, index[:-1], positions)
    last = _forward(model, ids, cache, 0, index[-1:], positions)
    error = (last.logits[0, -1] - expected).float().abs().max()
    if not error <= 2 * tolerance * expected.float().abs().max():
        return Support("PartialAttention does not reproduce its logits")
    return Support(None, spec, shape)


def _rotary_spec(
    rotations: list[torch.Tensor], pairs: list[_Pair], tolerance: float
) -> tuple[RotarySpec | None, int]:
    """How keys move, from pairs of the same layer's KV at two positions; or None, and how many
    pairs the best guess explains.

    Args:
        pairs: the first layer's, then every layer's.
    """
    shift = torch.full((_PROBE_TOKENS,), _PROBE_SHIFT)
    best = 0
    for dim in {len(angles): None for angles in rotations}:
        table = [angles for angles in rotations if len(angles) == dim]
        table += [-angles for angles in table]  # some turn the other way
        table.append(torch.zeros_like(table[0]))  # a layer without rotation
        for of_values, interleaved in itertools.product((False, True), repeat=2):
            rows: list[int] = []
            for pair in pairs:
                specs = (RotarySpec(t[None], interleaved, None, of_values) for t in table)
                fits = (_moves(pair, shift, spec, tolerance) for spec in specs)
                row = next((row for row, fit in enumerate(fits) if fit), None)
                if row is None:
                    break
                rows.append(row)
            best = max(best, len(rows))
            if len(rows) < len(pairs) or set(rows) == {len(table) - 1}:
                continue
            layers = rows[1:]
            used = sorted(set(layers))
            which = None if len(used) == 1 else tuple(used.index(row) for row in layers)
            angles = torch.stack([table[row] for row in used])
            return RotarySpec(angles, interleaved, which, of_values), len(pairs)
    return None, best


def _moves(pair: _Pair, shift: torch.Tensor, spec: RotarySpec, tolerance: float) -> bool:
    """Whether KV at one position, moved, is that of the other."""
    k, v, moved_k, moved_v = pair
    rotated, target, still, same = (
        (v, moved_v, k, moved_k) if spec.of_values else (k, moved_k, v, moved_v)
    )
    if spec.rotary_dim > rotated.shape[-1]:
        return False
    return _close(rerotate(rotated, shift, spec), target, tolerance) and _close(
        still, same, tolerance
    )


def _close(x: torch.Tensor, y: torch.Tensor, tolerance: float) -> bool:
    return bool((x - y).float().abs().max() <= tolerance * y.float().abs().max().clamp(min=1e-6))


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


def _first_layer(model: Any, ids: torch.Tensor, positions: torch.Tensor) -> _FirstLayer:
    cache = _FirstLayer()
    try:
        _forward(model, ids, cache, 0, torch.arange(ids.shape[1], device=ids.device), positions)
    except _FirstLayerDone:
        return cache
    raise ValueError("its layers do not use transformers' cache")


def _forward(
    model: Any,
    ids: torch.Tensor,
    cache: SlotCache,
    slot: int,
    index: torch.Tensor,
    positions: torch.Tensor,
) -> Any:
    """Compute tokens `index` of `ids` into a slot, turned as `positions` say."""
    with cache.forward(RaggedQueries.in_slots([slot], [index])):
        return model(
            input_ids=ids[:, index],
            position_ids=_position_ids(positions[:, index]),
            past_key_values=cache,
            use_cache=True,
        )
