"""How layers rotate their keys is proved on the keys. Needs no vLLM."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvshare_mm.reuse.rotary import RotarySpec, rerotate
from kvshare_mm.vllm.rotation import PROBE_TOKENS, rotary_spec

HEADS, DIM = 2, 8
ANGLES = {"near": torch.tensor([1.0, 0.3, 0.1, 0.03]), "far": torch.tensor([0.5, 0.1, 0.01, 0.001])}


class Rotary(torch.nn.Module):
    """vLLM's rotary embedding, as far as it is looked at."""

    def __init__(self, angles: torch.Tensor, neighbours: bool) -> None:
        super().__init__()
        self.is_neox_style = not neighbours
        self.spec = RotarySpec(angles[None], neighbours)

    def _compute_cos_sin_cache(self) -> torch.Tensor:
        angles = torch.arange(4.0)[:, None] * self.spec.inv_freq
        return 1.3 * torch.cat((angles.cos(), angles.sin()), -1)  # YaRN's factor


class Attention(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_kv_heads = HEADS

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return q


class Layer(torch.nn.Module):
    def __init__(self, rotary: Rotary, turns: str) -> None:
        super().__init__()
        self.rotary, self.turns, self.attn = rotary, turns, Attention()

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        k = hidden_states.view(PROBE_TOKENS, HEADS, DIM).transpose(0, 1)
        if self.turns != "not":
            k = rerotate(k, positions * (2 if self.turns == "twice" else 1), self.rotary.spec)
        v = hidden_states + positions[:, None] * (self.turns == "values too")
        k = k.transpose(0, 1).reshape(PROBE_TOKENS, -1)
        # Far from what it was, if its input were not that of before.
        return 3 * hidden_states.sin() + self.attn(k, k, v) * positions[:, None]


def spec_of(layers: list[tuple[str, str]], neighbours: bool = False) -> RotarySpec:
    torch.manual_seed(0)
    model = torch.nn.ModuleList(Layer(Rotary(ANGLES[a], neighbours), turns) for a, turns in layers)
    hidden = torch.randn(PROBE_TOKENS, HEADS * DIM)

    def run(positions: torch.Tensor) -> None:
        x = hidden
        for layer in model:
            x = layer(positions, hidden_states=x)

    hooks = sum(len(m._forward_pre_hooks) for m in model.modules())
    attention: dict[str, Any] = {str(i): layer.attn for i, layer in enumerate(model)}
    try:
        return rotary_spec(SimpleNamespace(modules=model.modules), attention, run)
    finally:
        assert sum(len(m._forward_pre_hooks) for m in model.modules()) == hooks


@pytest.mark.parametrize("neighbours", [False, True])
@pytest.mark.parametrize(
    ("layers", "names", "rows"),
    [
        ([("near", "once")] * 2, ["near"], None),
        ([("near", "once"), ("far", "once")], ["near", "far"], (0, 1)),
        ([("far", "not"), ("far", "once"), ("near", "once")], ["far", "near", None], (2, 0, 1)),
    ],
)
def test_each_layer_turns_by_its_own_angles(
    layers: list[tuple[str, str]], names: list[str | None], rows: Any, neighbours: bool
) -> None:
    spec = spec_of(layers, neighbours)
    assert (spec.layers, spec.interleaved) == (rows, neighbours)
    want = [torch.zeros(4) if name is None else ANGLES[name] for name in names]
    assert torch.allclose(spec.inv_freq, torch.stack(want), atol=1e-6)


@pytest.mark.parametrize(
    ("turns", "words"),
    [("twice", "keys of 1 do not"), ("values too", "keys of 1 do not")],
)
def test_a_layer_that_does_not_follow_is_named(turns: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        spec_of([("near", "once"), ("near", turns)])


def test_a_model_that_rotates_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="do not rotate"):
        spec_of([("near", "not")])
