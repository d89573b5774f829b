"""Which models are served with reuse: tiny random ones of many architectures, run and compared."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as hf_logging

from kvshare_mm.attention import ATTENTION_NAME
from kvshare_mm.kernels.ragged import RaggedQueries
from kvshare_mm.models.loader import LoadedModel
from kvshare_mm.models.shape import KVShape
from kvshare_mm.models.support import check_support
from kvshare_mm.native.plain import PlainRunner
from kvshare_mm.native.slots import SlotRunner
from kvshare_mm.reuse.rotary import rerotate

ATOL = 1e-4
MAX_LEN = 64
SHAPE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ROPE_64 = {"rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
MLA = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 4,
}
WINDOW = {"sliding_window": 8}
MOE = {
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}

# name: model type, options, and for supported ones whether pairs of channels are neighbours.
SUPPORTED: dict[str, tuple[str, dict[str, Any], bool]] = {
    "llama": ("llama", {}, False),
    "llama, linear": ("llama",
     {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}, False),
    "llama 3": ("llama",
     {"rope_parameters": {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0,
      **ROPE_64}}, False),
    "llama, yarn": ("llama", {"rope_parameters": {"rope_type": "yarn", **ROPE_64}}, False),
    "qwen2": ("qwen2", {}, False),
    "qwen3": ("qwen3", {"head_dim": 16}, False),
    "mistral without a window": ("mistral", {"sliding_window": None}, False),
    "mistral, window as long as the context": ("mistral", {"sliding_window": 512}, False),
    "phi (part of the channels)": ("phi", {}, False),
    "gpt-neox (part of the channels)": ("gpt_neox", {}, False),
    "cohere (neighbours)": ("cohere", {}, True),
    "glm (neighbours, part)": ("glm", {"head_dim": 16}, True),
    "gemma": ("gemma", {"head_dim": 16}, False),
    "mixtral": ("mixtral", {"num_local_experts": 4}, False),
    # Windows: of every layer, of some, with a rotation of their own, or without any.
    "mistral": ("mistral", {"sliding_window": 8}, False),
    "ministral": ("ministral", {"sliding_window": 8, "head_dim": 16}, False),
    "phi-3": ("phi3", {"sliding_window": 8}, False),
    "starcoder-2": ("starcoder2", {"sliding_window": 8}, False),
    "qwen2, windows": ("qwen2",
     {"use_sliding_window": True, "max_window_layers": 2, **WINDOW}, False),
    "olmo-3": ("olmo3", WINDOW, False),
    "gemma-2 (capped scores)": ("gemma2", {"head_dim": 16, **WINDOW}, False),
    "vault-gemma": ("vaultgemma", {"head_dim": 16, **WINDOW}, False),
    "gemma-3 (two rotations)": ("gemma3_text",
     {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention"] * 2, **WINDOW},
      False),
    "cohere-2 (no rotation in full layers)": ("cohere2", {"head_dim": 16, **WINDOW}, True),
    "exaone-4": ("exaone4", {"sliding_window_pattern": 4, **WINDOW}, False),
    "afmoe": ("afmoe", {"head_dim": 16, **WINDOW}, False),
    "cwm": ("cwm", {"head_dim": 16, **WINDOW}, False),
    "gpt-oss (sinks)": ("gpt_oss",
     {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, **WINDOW}, False),
    # Full layers scale a query by its token index, beyond 8 here.
    "llama-4 (chunks)": ("llama4_text",
     {"head_dim": 16, "attention_chunk_size": 8, "num_local_experts": 2,
      "intermediate_size_mlp": 96, "floor_scale": 8, "attn_scale": 0.5,
      "no_rope_layers": [1, 1, 1, 0]}, True),
    "ministral-3": ("ministral3", {"head_dim": 16}, False),
    "smollm-3 (no rotation in every fourth layer)": ("smollm3", {}, False),
    # What is cached is the latent, and one rotated key for all heads.
    "deepseek-v2": ("deepseek_v2", MLA, True),
    "deepseek-v3": ("deepseek_v3", MLA, False),
    "glm-4 moe lite": ("glm4_moe_lite", MLA, False),
    "minicpm-3": ("minicpm3", MLA, False),
    "youtu": ("youtu", MLA, False),
    # Their layers pass no keywords on to their attention.
    "stablelm": ("stablelm", {}, False),
    "nemotron": ("nemotron", {}, False),
    "qwen2 moe": ("qwen2_moe", {**MOE, "shared_expert_intermediate_size": 32}, False),
    "qwen3 moe": ("qwen3_moe", {"head_dim": 16, **MOE}, False),
    "olmo": ("olmo", {}, False),
    "olmo-2": ("olmo2", {}, False),
    "olmoe": ("olmoe", MOE, False),
    "flex-olmo": ("flex_olmo", MOE, False),
    # Its attention is not told of its window.
    "phi moe": ("phimoe", {"num_local_experts": 4, "sliding_window": 512}, False),
    "glm-4": ("glm4", {"head_dim": 16}, True),
    "glm-4 moe": ("glm4_moe",
     {"head_dim": 16, "n_routed_experts": 4, "first_k_dense_replace": 1, **MOE}, False),
    "granite": ("granite", {}, False),
    "granite moe": ("granitemoe", {"num_local_experts": 4}, False),
    "ernie-4.5": ("ernie4_5", {"head_dim": 16}, True),
    "ernie-4.5 moe": ("ernie4_5_moe", {"moe_num_experts": 4, "moe_k": 2}, True),
    "seed-oss": ("seed_oss", {"head_dim": 16}, False),
    "minimax m2": ("minimax_m2", {"head_dim": 16, **MOE}, False),
    "helium": ("helium", {"head_dim": 16}, True),
    "apertus": ("apertus", {}, False),
    "arcee": ("arcee", {}, False),
    "bitnet": ("bitnet", {}, False),
    "nanochat (turns the other way)": ("nanochat", {}, False),
}  # fmt: skip
UNSUPPORTED: dict[str, tuple[str, dict[str, Any], str]] = {
    "gpt-2 (learned positions)": ("gpt2", {}, "rotary"),
    "bloom (ALiBi)": ("bloom", {}, "rotary"),
    "mpt (ALiBi)": ("mpt", {"d_model": 64, "n_heads": 4, "n_layers": 4}, "rotary"),
    "falcon with ALiBi": ("falcon", {"alibi": True}, "PartialAttention"),
    "falcon": ("falcon", {"alibi": False, "num_kv_heads": 2}, "PartialAttention"),
    "gpt-j": ("gptj", {"n_embd": 64, "n_layer": 4, "n_head": 4, "rotary_dim": 8}, "rotary"),
    "llama, dynamic NTK": ("llama",
     {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
      "dynamic"),
    "phi-3, longrope": ("phi3",
     {"rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0,
      "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "factor": 8.0,
      "original_max_position_embeddings": 64}}, "longrope"),
    "mamba": ("mamba", {"state_size": 8}, "recurrent"),
    "mamba-2": ("mamba2",
     {"state_size": 8, "num_heads": 8, "head_dim": 16, "n_groups": 1}, "recur"),
    "bamba (mamba and attention)": ("bamba",
     {"mamba_n_heads": 8, "mamba_d_state": 16, "attn_layer_indices": [1]}, "recurrent"),
    "recurrent gemma": ("recurrent_gemma", {}, "rotary"),
    "qwen3-next": ("qwen3_next", {"head_dim": 16}, "recurrent"),
    "hunyuan (normalises rotated keys)": ("hunyuan_v1_dense", {"head_dim": 16}, "rotary"),
    "doge (dynamic mask)": ("doge", {}, "logits"),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def quiet() -> None:
    hf_logging.set_verbosity_error()


def _build(kind: str, options: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    config = AutoConfig.for_model(kind, **{**SHAPE, **options})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        # Away from what initialisation makes equal: biases of 0, norms of 1, even attention.
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.08)
    return model.to(dtype).eval().requires_grad_(False)


def _loaded(model: Any, support: Any, eos_token_ids: frozenset[int] = frozenset()) -> LoadedModel:
    return LoadedModel(
        name="tiny",
        model=model,
        tokenizer=None,  # type: ignore[arg-type]
        device=torch.device("cpu"),
        dtype=torch.float32,
        context_len=512,
        eos_token_ids=eos_token_ids,
        fingerprint="tiny",
        rotary=support.rotary,
        kv_shape=support.kv_shape,
        unsupported=support.reason,
        states=support.states,
    )


def _ids(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, 128, n)


@torch.inference_mode()
def _generate(model: Any, ids: np.ndarray, num_tokens: int) -> list[int]:
    batch = torch.from_numpy(ids)[None]
    out = model.generate(
        batch,
        attention_mask=torch.ones_like(batch),
        max_new_tokens=num_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    answer: list[int] = out[0, len(ids) :].tolist()
    return answer


def _answer(runner: Any, slot: int, ids: np.ndarray, num_tokens: int) -> list[int]:
    tokens = [int(runner.prefill(slot, ids, np.arange(len(ids))).argmax())]
    while len(tokens) < num_tokens:
        logits = runner.decode([slot], [tokens[-1]], [len(ids) + len(tokens) - 1])
        tokens.append(int(logits[0].argmax()))
    return tokens


def _num_hooks(model: Any) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


@pytest.mark.parametrize("name", SUPPORTED)
def test_supported_models_are_run_right(name: str) -> None:
    kind, options, interleaved = SUPPORTED[name]
    model = _build(kind, options)
    reference, hooks = copy.deepcopy(model), _num_hooks(model)
    support = check_support(model)
    assert support.reason is None
    assert model.config._attn_implementation == ATTENTION_NAME
    assert _num_hooks(model) == hooks
    assert support.rotary is not None and support.rotary.interleaved is interleaved
    shape = support.kv_shape
    assert shape is not None and shape.num_layers == 4

    # Any positions, over exact KV of the others and garbage everywhere else.
    n, slot = 40, 1
    ids = _ids(n)
    runner = SlotRunner(_loaded(model, support), 3, MAX_LEN, chunk=16)
    with torch.inference_mode():
        want = reference(input_ids=torch.from_numpy(ids)[None], use_cache=False).logits[0, -1]
    assert torch.allclose(runner.prefill(slot, ids, np.arange(n)), want, atol=ATOL)
    k, v = runner.slot_kv(slot)
    assert k.shape == (4, shape.num_kv_heads, MAX_LEN, shape.key_dim)
    assert v.shape == (4, shape.num_kv_heads, MAX_LEN, shape.value_dim)
    exact = k[:, :, :n].clone(), v[:, :, :n].clone()
    compute = np.append(np.sort(np.random.default_rng(1).choice(n - 1, 15, replace=False)), n - 1)
    for tensor in (k, v):
        tensor[:, :, compute] = float("nan")
        tensor[:, :, n:] = float("nan")
    assert torch.allclose(runner.prefill(slot, ids, compute), want, atol=ATOL)
    assert torch.allclose(k[:, :, :n], exact[0], atol=ATOL)
    assert torch.allclose(v[:, :, :n], exact[1], atol=ATOL)

    # A key of any layer, moved, is the key of the other position.
    elsewhere = SlotRunner(_loaded(model, support), 1, MAX_LEN, chunk=MAX_LEN)
    index = torch.arange(n)
    batch = RaggedQueries.in_slots([0], [index])
    with torch.inference_mode(), elsewhere._cache.forward(batch):
        model(
            input_ids=torch.from_numpy(ids)[None],
            position_ids=index[None] + 17,
            past_key_values=elsewhere._cache,
            use_cache=True,
        )
    rotated = int(support.rotary.of_values)
    moved = rerotate(exact[rotated], torch.full((n,), 17), support.rotary)
    assert torch.allclose(moved, elsewhere.slot_kv(0)[rotated][:, :, :n], atol=ATOL)
    assert _answer(runner, 2, ids[:9], 8) == _generate(reference, ids[:9], 8)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_other_models_are_declined_in_words_and_served_whole(name: str) -> None:
    kind, options, words = UNSUPPORTED[name]
    model = _build(kind, options)
    reference, hooks = copy.deepcopy(model), _num_hooks(model)
    before = model.config._attn_implementation
    support = check_support(model)
    assert support.reason is not None and words in support.reason
    assert " " in support.reason and len(support.reason) < 300
    assert support.rotary is None and support.kv_shape is None
    assert model.config._attn_implementation == before != ATTENTION_NAME
    assert _num_hooks(model) == hooks

    # Beyond the window, in two slots in turns, and once more in a slot that was used.
    runner = PlainRunner(_loaded(model, support), 2)
    prompts = [_ids(70, 1), _ids(5, 2)]
    want = [_generate(reference, ids, 6) for ids in prompts]
    tokens = [
        [int(runner.prefill(slot, ids, np.arange(len(ids))).argmax())]
        for slot, ids in enumerate(prompts)
    ]
    for step in range(5):
        rows_ = runner.decode([1, 0], [tokens[1][-1], tokens[0][-1]], [5 + step, 70 + step])
        for slot, row in zip((1, 0), rows_, strict=True):
            tokens[slot].append(int(row.argmax()))
    assert tokens == want
    runner.release(0)
    assert _answer(runner, 0, prompts[1], 6) == want[1]


def test_runners_refuse_what_they_cannot_run() -> None:
    model = _build("gpt2", {})
    loaded = _loaded(model, check_support(model))
    with pytest.raises(ValueError, match="whole prompts"):
        PlainRunner(loaded, 1).prefill(0, _ids(10), np.arange(5, 10))
    with pytest.raises(ValueError, match="PartialAttention"):
        SlotRunner(loaded, 1, 64, 64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "qwen3", "cohere (neighbours)", "llama, yarn"])
def test_half_precision_is_no_reason(name: str, dtype: torch.dtype) -> None:
    kind, options, interleaved = SUPPORTED[name]
    support = check_support(_build(kind, options, dtype))
    assert support.reason is None
    assert support.rotary is not None and support.rotary.interleaved is interleaved
    assert support.rotary.inv_freq.dtype == torch.float32
    # And hides none: a layer without rotation is seen.
    layers = check_support(_build("smollm3", {}, dtype)).rotary
    assert layers is not None and layers.layers == (0, 0, 0, 1)
    assert not layers.inv_freq[1].any()


def test_windows_are_those_of_the_config_again() -> None:
    """The proof makes them shorter, to see them."""
    model = _build("gemma3_text", SUPPORTED["gemma-3 (two rotations)"][1] | {"sliding_window": 9})
    before = [getattr(m, "sliding_window", None) for m in model.modules()]
    rotary = check_support(model).rotary
    assert model.config.sliding_window == 9
    assert [getattr(m, "sliding_window", None) for m in model.modules()] == before
    assert rotary is not None and rotary.layers == (1, 0, 1, 0)


def test_a_window_that_attention_is_not_told_of_is_noticed() -> None:
    class Blind:
        def __getattr__(self, name: str) -> Any:
            return None if name == "sliding_window" else getattr(model.config, name)

    model = _build("mistral", {"sliding_window": 256})
    for layer in model.model.layers:
        layer.self_attn.config = Blind()
    reason = check_support(model).reason
    assert reason is not None and "logits" in reason


def test_layers_that_use_the_kv_of_others_hold_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is stored: what memory held before would leak, or be no number."""
    options = {
        "head_dim": 16,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "vocab_size_per_layer_input": 128,
        "activation_sparsity_pattern": [0.0] * 4,
        **WINDOW,
    }
    model = _build("gemma3n_text", options)
    reference = copy.deepcopy(model)
    support = check_support(model)
    assert support.reason is None
    empty = torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan if "dtype" in k else 0)
    )
    runner = SlotRunner(_loaded(model, support), 1, MAX_LEN, chunk=16)
    monkeypatch.undo()
    ids = _ids(40)
    logits = runner.prefill(0, ids, np.arange(40))
    with torch.inference_mode():
        want = reference(input_ids=torch.from_numpy(ids)[None], use_cache=False).logits[0, -1]
    assert torch.allclose(logits, want, atol=ATOL)
    for kv in runner.slot_kv(0):
        assert kv[:2, :, :40].any() and not kv[2:].any()


def test_weights_decide_and_not_the_architecture() -> None:
    """HunYuan normalises keys after rotating them: harmless until its norm has been trained."""
    fresh = _build("hunyuan_v1_dense", {"head_dim": 16})
    for name, parameter in fresh.named_parameters():
        if "key_layernorm" in name:
            parameter.fill_(1.0)
    assert check_support(fresh).reason is None
    trained = check_support(_build("hunyuan_v1_dense", {"head_dim": 16})).reason
    assert trained is not None and "rotary" in trained


def test_a_model_that_fails_in_any_way_is_declined() -> None:
    model = _build("llama", {})

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("needs a kernel that is not there")

    model.model.layers[2].self_attn.forward = broken
    support = check_support(model)
    assert support.reason is not None and "kernel" in support.reason


def test_a_config_without_a_vocabulary_is_declined() -> None:
    model = _build("llama", {})
    model.config = copy.deepcopy(model.config)
    del model.config.vocab_size
    support = check_support(model)
    assert support.reason is not None


def test_a_vocabulary_smaller_than_the_probe() -> None:
    assert check_support(_build("llama", {"vocab_size": 5})).reason is None


def test_one_layer() -> None:
    model = _build("llama", {"num_hidden_layers": 1})
    support = check_support(model)
    assert support.kv_shape == KVShape(1, 2, 16, 16)
