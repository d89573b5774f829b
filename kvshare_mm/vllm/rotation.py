"""How each layer of vLLM's model rotates its keys: guessed from the model's rotary embeddings, then
proved on the keys themselves.

A few tokens are computed at two positions, from the same hidden states in every layer. A layer's
keys must be moved by one of the model's rotations, or by none.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from kvshare_mm.reuse.rotary import RotarySpec, rerotate
from kvshare_mm.vllm.watch import watching

PROBE_TOKENS = 12
_PROBE_SHIFT = 37

# K and V of every layer, or latents and their rotated keys: ``[num_kv_heads, PROBE_TOKENS, dim]``.
_KV = list[tuple[torch.Tensor, torch.Tensor]]


def rotary_spec(
    model: Any, layers: Mapping[str, Any], run: Callable[[torch.Tensor], object]
) -> RotarySpec:
    """The rotation of each layer.

    Args:
        model: vLLM's.
        layers: its attention layers by name, in order.
        run: computes `PROBE_TOKENS` tokens at ``[PROBE_TOKENS]`` int64 rotary positions.

    Raises:
        ValueError: there is none, or some layer's keys do not follow it.
    """
    positions = torch.arange(PROBE_TOKENS)
    with _same_inputs(model, layers):
        before, after = (_computed(layers, run, positions + n) for n in (0, _PROBE_SHIFT))
    best: list[int] = []
    for (interleaved, table), of_values in itertools.product(_rotations(model), (False, True)):
        specs = [RotarySpec(angles[None], interleaved, None, of_values) for angles in table]
        rows: list[int] = []
        for kv in zip(before, after, strict=True):
            errors = [_off(*kv, spec) for spec in specs]
            row = min(range(len(errors)), key=errors.__getitem__)
            if not errors[row] <= (1e-3 if kv[0][0].dtype == torch.float32 else 5e-2):
                break
            rows.append(row)
        best = max(best, rows, key=len)
        used = sorted(set(rows))
        if len(rows) == len(layers) and used != [len(table) - 1]:
            which = None if len(used) == 1 else tuple(used.index(row) for row in rows)
            return RotarySpec(table[used], interleaved, which, of_values)
    if len(best) == len(layers):
        raise ValueError("the model's layers do not rotate their keys")
    name = list(layers)[len(best)]
    raise ValueError(f"the keys of {name} do not follow the model's rotary embedding")


def _rotations(model: Any) -> list[tuple[bool, torch.Tensor]]:
    """Ways that the model may rotate in: whether neighbours are pairs, and the different
    ``[n, rotary_dim / 2]`` angles per position, the last of them none."""
    ways: dict[tuple[bool, int], list[torch.Tensor]] = {}

    def add(angles: torch.Tensor, *styles: bool) -> None:
        for style in styles:
            known = ways.setdefault((style, len(angles)), [])
            if not any(torch.equal(angles, other) for other in known):
                known.append(angles)

    for module in model.modules():
        if hasattr(module, "_compute_cos_sin_cache"):
            # Row 1 holds cosine and sine of each pair's angle; a factor on both cancels.
            row = torch.as_tensor(module._compute_cos_sin_cache()[1]).cpu()
            cos, sin = (row.real, row.imag) if row.is_complex() else row.chunk(2)
            angles = torch.atan2(sin.double(), cos.double()).float()
            add(angles, not getattr(module, "is_neox_style", False))
        else:  # transformers', which does not say which channels are pairs
            for name, value in module.named_buffers(recurse=False):
                if name.endswith("inv_freq") and value.ndim == 1:
                    add(value.detach().float().cpu(), False, True)
    return [
        (interleaved, torch.stack([*table, torch.zeros(width)]))
        for (interleaved, width), table in ways.items()
    ]


def _computed(
    layers: Mapping[str, Any], run: Callable[[torch.Tensor], object], positions: torch.Tensor
) -> _KV:
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def see(name: str, query: torch.Tensor, *kv: torch.Tensor) -> None:
        heads = layers[name].num_kv_heads
        k, v = (x.reshape(PROBE_TOKENS, heads, -1).transpose(0, 1).cpu() for x in kv)
        seen[name] = k.clone(), v.clone()

    with watching(layers, see):
        run(positions)
    if len(seen) != len(layers):
        raise ValueError("the model did not call its attention layers")
    return [seen[name] for name in layers]


@contextmanager
def _same_inputs(model: Any, layers: Mapping[str, Any]) -> Iterator[None]:
    """What is around a layer's attention gets the hidden states that it got the first time: or the
    rounding of the layers below would drown the difference."""
    inner = {id(layer) for layer in layers.values()}
    around = [
        m
        for m in model.modules()
        if hasattr(m, "layer_idx") or any(id(child) in inner for child in m.children())
    ]
    first: dict[Any, torch.Tensor] = {}

    def replay(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def same(name: Any, x: Any) -> Any:
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                return first.setdefault((module, name), x.clone())
            return x

        return tuple(same(*x) for x in enumerate(args)), {n: same(n, x) for n, x in kwargs.items()}

    hooks = [m.register_forward_pre_hook(replay, with_kwargs=True) for m in around]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _off(
    before: tuple[torch.Tensor, torch.Tensor],
    after: tuple[torch.Tensor, torch.Tensor],
    spec: RotarySpec,
) -> float:
    """How far K and V, moved, are from those of the other position: the largest difference, as a
    share of the largest number."""
    turned, still = (1, 0) if spec.of_values else (0, 1)
    if spec.rotary_dim > before[turned].shape[-1]:
        return float("inf")
    moved = rerotate(before[turned], torch.full((PROBE_TOKENS,), _PROBE_SHIFT), spec)
    return max(
        float((x - y).float().abs().max() / y.float().abs().max().clamp(min=1e-6))
        for x, y in ((moved, after[turned]), (before[still], after[still]))
    )
