"""Models that go on from a state: transformers' own cache at a position, taken apart and put
together again.

Attention layers keep KV of every token; recurrent layers a state that holds all tokens so far, and
cannot go back. So such a prompt is exact up to a position whose state was kept, and from there on
computed: nothing behind an edit can be reused.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import (
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)

from kvshare_mm.models.shape import KVShape

_PROBE_TOKENS, _PROBE_CUT = 24, 11
# What a cache may be made of: layers whose size depends on nothing but the number of tokens.
_LAYERS = (DynamicLayer, LinearAttentionLayer, LinearAttentionAndFullAttentionLayer)
_STATES = ("conv_states", "recurrent_states")

# States that are no float32, those that are: a vector each, on the CPU.
State = tuple[torch.Tensor, torch.Tensor]


class CachedModel:
    """Forwards of a model with transformers' own cache.

    Args:
        model: of any architecture. As `generate` does: recurrent models have another name for the
            cache, some make it themselves, and some count positions only if they are told.
    """

    def __init__(self, model: Any) -> None:
        accepted = inspect.signature(model.forward).parameters
        self._model = model
        own = (name for name in ("cache_params", "state") if name in accepted)
        self._cache = next(own, "past_key_values")
        self._unknown = [n for n in ("position_ids", "logits_to_keep") if n not in accepted]
        supports = getattr(model, "_supports_default_dynamic_cache", None)
        self._makes_cache = supports is not None and not supports()

    def new_cache(self) -> Any:
        """An empty cache; None: the model makes its own."""
        return None if self._makes_cache else DynamicCache(config=self._model.config)

    @torch.inference_mode()
    def __call__(self, cache: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, Any]:
        """Logits of the last row, ``[vocab_size]``, and the cache behind it.

        Args:
            inputs: keywords of the forward, see `native.inputs.model_inputs`.
        """
        given = {**inputs, "logits_to_keep": 1}
        for name in self._unknown:
            given.pop(name, None)
        output = self._model(use_cache=True, **given, **{self._cache: cache})
        return output.logits[0, -1], getattr(output, self._cache) if cache is None else cache


@dataclass(frozen=True, slots=True, eq=False)
class StateLayout:
    """How a model's cache is taken apart.

    Attributes:
        kv_shape: of one position's KV, of the layers that keep it for every token.
        template: a cache without tensors.
        attention: indices of those layers.
        states: shape and dtype of every other tensor, in order; none: any prefix can be gone on
            from.
    """

    kv_shape: KVShape
    template: Any
    attention: tuple[int, ...]
    states: tuple[tuple[torch.Size, torch.dtype], ...]

    @classmethod
    def of(cls, cache: Any) -> StateLayout:
        """Of a cache that was used. Raises ValueError: it has other parts."""
        layers: list[Any] = getattr(cache, "layers", [])
        if type(cache) is not DynamicCache or any(type(x) not in _LAYERS for x in layers):
            raise ValueError("its cache has parts that are not known here")
        attention = tuple(i for i, x in enumerate(layers) if _keys(x) is not None)
        shapes = {(layers[i].keys.shape[1], layers[i].keys.shape[3], layers[i].values.shape[3])
                  for i in attention}  # fmt: skip
        if len(shapes) > 1:
            raise ValueError("its layers keep KV of different shapes")
        states = tuple((t.shape, t.dtype) for _, _, t in _held(cache))
        template = copy.copy(cache)
        template.layers = [_emptied(layer) for layer in layers]
        shape = KVShape(len(attention), *(shapes.pop() if shapes else (1, 1, 1)))
        return cls(shape, template, attention, states)

    @property
    def num_bytes(self) -> int:
        """Bytes of a state."""
        return sum(shape.numel() * dtype.itemsize for shape, dtype in self.states)

    def kv_of(self, cache: Any, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the first `n` tokens: ``[num_layers, num_kv_heads, n, head_dim]`` each, copied."""
        layers = [cache.layers[i] for i in self.attention]
        if not layers:
            return torch.empty(0, 1, n, 1), torch.empty(0, 1, n, 1)
        k = torch.stack([layer.keys[0, :, :n] for layer in layers])
        return k, torch.stack([layer.values[0, :, :n] for layer in layers])

    def state_of(self, cache: Any) -> State:
        """A copy of what its layers hold beside that."""
        held = [t.reshape(-1) for _, _, t in _held(cache)]
        narrow, wide = ([t for t in held if (t.dtype is torch.float32) is f] for f in (False, True))
        return tuple(torch.cat(ts).cpu() if ts else torch.empty(0) for ts in (narrow, wide))  # type: ignore[return-value]

    def cache_of(self, k: torch.Tensor, v: torch.Tensor, state: State | None) -> Any:
        """A cache that goes on behind a position; raises ValueError: not a state of this model.

        Args:
            k: ``[num_layers, num_kv_heads, N, head_dim]``; `v` the same.
            state: see `state_of`; None: the model has none.
        """
        cache = copy.copy(self.template)
        cache.layers = [_emptied(layer) for layer in cache.layers]
        for i, keys, values in zip(self.attention, k, v, strict=True):
            cache.layers[i].keys, cache.layers[i].values = keys[None], values[None]
        left = list(state or (torch.empty(0), torch.empty(0)))
        for (holder, index, _), (shape, dtype) in zip(_held(cache), self.states, strict=True):
            side = int(dtype is torch.float32)
            if left[side].dtype != dtype or left[side].numel() < shape.numel():
                raise ValueError("the state is of another model")
            part, left[side] = left[side].split([shape.numel(), left[side].numel() - shape.numel()])
            holder[index] = part.reshape(shape).to(k.device, copy=True)
        if any(len(side) for side in left):
            raise ValueError("the state is of another model")
        return cache


def prove_states(model: Any) -> StateLayout | str:
    """How a model's cache is taken apart, or why it cannot be.

    A prompt that goes on from a kept state, several tokens at a time, must give the logits of one
    that is computed whole.
    """
    try:
        forward = CachedModel(model)
        vocab = int(model.config.vocab_size)
        ids = torch.arange(3, 3 + 7 * _PROBE_TOKENS, 7, device=model.device).remainder(vocab)

        def run(cache: Any, start: int, end: int) -> tuple[torch.Tensor, Any]:
            at = torch.arange(start, end, device=ids.device)[None]
            return forward(cache, {"input_ids": ids[None, start:end], "position_ids": at})

        want, whole = run(forward.new_cache(), 0, _PROBE_TOKENS)
        _, cache = run(forward.new_cache(), 0, _PROBE_CUT)
        layout = StateLayout.of(cache)
        if StateLayout.of(whole).states != layout.states:
            return "its states grow with the prompt"
        with torch.inference_mode():
            resumed = layout.cache_of(*layout.kv_of(cache, _PROBE_CUT), layout.state_of(cache))
        run(resumed, _PROBE_CUT, _PROBE_TOKENS - 1)
        got, _ = run(resumed, _PROBE_TOKENS - 1, _PROBE_TOKENS)
    except Exception as error:  # of any architecture's own code
        return (str(error).splitlines() or [type(error).__name__])[0][:200]
    tolerance = 1e-4 if want.dtype == torch.float32 else 5e-2
    if not (got - want).float().abs().max() <= tolerance * want.float().abs().max():
        return "it does not go on from a state with several tokens at once"
    return layout


def state_bytes(layer: Any) -> int:
    """Bytes of what a layer of a cache holds for all tokens together."""
    held = (t for name in _STATES for t in getattr(layer, name, {}).values() if t is not None)
    return sum(t.nbytes for t in held)


def _keys(layer: Any) -> Any:
    keys = getattr(layer, "keys", None)
    return keys if isinstance(keys, torch.Tensor) and keys.numel() else None


def _held(cache: Any) -> Iterator[tuple[dict[int, Any], int, Any]]:
    """Where each state of a cache is, and what stands there: a tensor, or in a template `True`."""
    for layer in cache.layers:
        for name in _STATES:
            holder = getattr(layer, name, {})
            yield from ((holder, i, t) for i, t in holder.items() if t is not None)


def _emptied(layer: Any) -> Any:
    """The same layer with no tensors in it."""
    empty = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, torch.Tensor):
            setattr(empty, name, None)
        elif isinstance(value, dict):
            kept = {i: None if x is None else True for i, x in value.items()}
            setattr(empty, name, kept if name in _STATES else dict(value))
    return empty
