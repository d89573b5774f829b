"""Re-rotation against transformers' own embeddings: a moved key is the key computed there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CohereConfig, GlmConfig, LlamaConfig, PhiConfig
from transformers.models.cohere import modeling_cohere as cohere
from transformers.models.glm import modeling_glm as glm
from transformers.models.llama import modeling_llama as llama
from transformers.models.phi import modeling_phi as phi

from kvshare_mm.reuse.rotary import RotarySpec, rerotate

HEAD_DIM = 32
ROPE: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "long base": {"rope_type": "default", "rope_theta": 1e6},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn with an attention factor": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "attention_factor": 2.5,
        "original_max_position_embeddings": 64,
    },
}
COMMON = {
    "hidden_size": 2 * HEAD_DIM,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


OTHERS: dict[str, tuple[Any, Any, Any, bool]] = {
    "half of the channels": (
        phi,
        phi.PhiRotaryEmbedding,
        PhiConfig(**COMMON, partial_rotary_factor=0.5),
        False,
    ),
    "interleaved": (cohere, cohere.CohereRotaryEmbedding, CohereConfig(**COMMON), True),
    "half of the channels, interleaved": (
        glm,
        glm.GlmRotaryEmbedding,
        GlmConfig(**COMMON, head_dim=HEAD_DIM, partial_rotary_factor=0.5, pad_token_id=0),
        True,
    ),
}


def _model(name: str) -> tuple[Any, Callable[..., Any], RotarySpec]:
    """A model's rotation, how it applies it, and what we say of it."""
    if name in OTHERS:
        module, rotation, config, interleaved = OTHERS[name]
    else:
        module, rotation, interleaved = llama, llama.LlamaRotaryEmbedding, False
        config = LlamaConfig(**COMMON, rope_parameters=ROPE[name])
    rotary = rotation(config)
    return rotary, module.apply_rotary_pos_emb, RotarySpec(rotary.inv_freq[None], interleaved)


def _rotated(rotary: Any, apply: Callable[..., Any], k: torch.Tensor, at: torch.Tensor) -> Any:
    """``k [1, heads, n, dim]`` as the model would cache it at positions `at`."""
    cos, sin = rotary(k, at[None])
    dim = cos.shape[-1]
    moved = apply(k[..., :dim], k[..., :dim], cos, sin)[1]
    return torch.cat((moved, k[..., dim:]), dim=-1)


def _raw(n: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n)
    return torch.randn(1, 2, n, HEAD_DIM, generator=generator).to(dtype)


@pytest.mark.parametrize("name", [*ROPE, *OTHERS])
def test_moved_key_is_the_key_computed_there(name: str) -> None:
    rotary, apply, spec = _model(name)
    assert spec.rotary_dim == HEAD_DIM // (2 if name.startswith("half") else 1)
    assert name != "yarn with an attention factor" or rotary.attention_scaling == 2.5
    k, start = _raw(60), torch.arange(100, 160)
    before = _rotated(rotary, apply, k, start)
    for shift in (torch.arange(-100, 140, 4), torch.full((60,), -100), torch.full((60,), 90)):
        want = _rotated(rotary, apply, k, start + shift)
        moved = rerotate(before, shift, spec)
        assert torch.allclose(moved, want, atol=1e-4)
        assert torch.equal(moved[..., spec.rotary_dim :], k[..., spec.rotary_dim :])
        other = replace(spec, interleaved=not spec.interleaved)
        assert not torch.allclose(rerotate(before, shift, other), want, atol=1e-1)


def test_far_positions() -> None:
    rotary, apply, spec = _model("default")
    k, start = _raw(8), torch.arange(8)
    before = _rotated(rotary, apply, k, start)
    shift = torch.full((8,), 8000)
    # transformers multiplies angles in float32: at 8000 they are good to about 5e-4.
    assert torch.allclose(
        rerotate(before, shift, spec), _rotated(rotary, apply, k, start + shift), atol=5e-3
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    _, _, spec = _model("default")
    k, shift = _raw(40, dtype), torch.arange(-20, 20)
    moved = rerotate(k, shift, spec)
    assert moved.dtype == dtype
    assert torch.equal(moved, rerotate(k.float(), shift, spec).to(dtype))


def test_float8_is_rounded_once_and_stays_in_its_range() -> None:
    _, _, spec = _model("default")
    k = (200 * _raw(40)).clamp(-448, 448).to(torch.float8_e4m3fn)
    shift = torch.arange(-20, 20)
    moved, want = rerotate(k, shift, spec), rerotate(k.float(), shift, spec)
    assert want.abs().max() > 448  # what was near its limit turns beyond it
    want = want.clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(moved.view(torch.uint8), want.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("interleaved", [False, True])
def test_zero_shift_changes_no_bit(dtype: torch.dtype, interleaved: bool) -> None:
    spec = RotarySpec(_model("default")[2].inv_freq, interleaved)
    k = _raw(12, dtype)
    before = k.clone()
    moved = rerotate(k, torch.zeros(12, dtype=torch.int64), spec)
    assert torch.equal(moved, k)
    assert moved.data_ptr() != k.data_ptr()
    assert torch.equal(k, before)


def test_each_axis_turns_its_own_pairs() -> None:
    whole = replace(_model("default")[2], axes=(0, 0, 1, 2) * (HEAD_DIM // 8))
    k, shift = (
        _raw(12),
        torch.stack((torch.arange(-6, 6), torch.arange(12), torch.full((12,), -9)), 1),
    )
    one_by_one = k
    for axis in range(3):
        mine = torch.tensor([of == axis for of in whole.axes or ()])
        spec = RotarySpec(torch.where(mine, whole.inv_freq, 0))
        one_by_one = rerotate(one_by_one, shift[:, axis], spec)
    moved = rerotate(k, shift, whole)
    assert torch.allclose(moved, one_by_one, atol=1e-5)
    assert not torch.allclose(moved, rerotate(k, shift[:, 0], whole), atol=0.1)
    alike = shift[:, :1].expand(-1, 3)
    assert torch.equal(rerotate(k, alike, whole), rerotate(k, shift[:, 0], whole))


@settings(max_examples=40)
@given(
    a=st.integers(-3000, 3000),
    b=st.integers(-3000, 3000),
    name=st.sampled_from(sorted(ROPE)),
    interleaved=st.booleans(),
    dim=st.sampled_from([HEAD_DIM, HEAD_DIM + 6]),
)
def test_moves_add_up(a: int, b: int, name: str, interleaved: bool, dim: int) -> None:
    spec = RotarySpec(_model(name)[2].inv_freq, interleaved)
    k = torch.randn(2, 3, 5, dim, generator=torch.Generator().manual_seed(dim))
    shift_a, shift_b = torch.full((5,), a), torch.full((5,), b)
    twice = rerotate(rerotate(k, shift_a, spec), shift_b, spec)
    once = rerotate(k, shift_a + shift_b, spec)
    assert torch.allclose(twice, once, atol=1e-5)
    # A rotation keeps lengths, also of every pair.
    assert torch.allclose(once.norm(dim=-1), k.norm(dim=-1), atol=1e-4)
