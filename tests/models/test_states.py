"""Models that go on from states: tiny random ones of many architectures, resumed and compared."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from kvshare_mm.models.states import CachedModel
from kvshare_mm.models.support import check_support
from kvshare_mm.native.plain import PlainRunner
from kvshare_mm.native.states import StateRunner

from .test_support import ATOL, MOE, UNSUPPORTED, _answer, _build, _generate, _ids, _loaded

HALF = {"layer_types": ["linear_attention", "full_attention"] * 2}
DELTA_NET = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "head_dim": 16,
    **HALF,
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_state": 16}
MAMBA_MOE = {"shared_expert_intermediate_size": 32, **MOE}
CONV = {"layer_types": ["conv", "full_attention"] * 2}

# name: model type, options. What is special stands behind the name.
RECURRENT: dict[str, tuple[str, dict[str, Any]]] = {
    "bamba (Mamba 2)": ("bamba", {**MAMBA, "attn_layer_indices": [1]}),
    "falcon-h1 (Mamba 2 beside attention)": (
        "falcon_h1",
        {**MAMBA, "mamba_d_ssm": 128, "mamba_d_head": 16, "head_dim": 16},
    ),
    "granite 4 (Mamba 2)": (
        "granitemoehybrid",
        {
            **MAMBA,
            "layer_types": ["mamba", "attention"] * 2,
            "num_local_experts": 4,
            "shared_intermediate_size": 32,
        },
    ),
    "lfm2 (convolutions)": ("lfm2", CONV),
    "lfm2 moe (convolutions)": ("lfm2_moe", {**CONV, **MOE}),
    "mamba-2 (Mamba 2 alone)": (
        "mamba2",
        {"state_size": 8, "num_heads": 8, "head_dim": 16, "n_groups": 1},
    ),
    "nemotron-h (Mamba 2)": (
        "nemotron_h",
        {
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "ssm_state_size": 16,
            "n_groups": 1,
            "hybrid_override_pattern": "M*M-",
            "head_dim": 16,
        },
    ),
    "olmo hybrid (gated DeltaNet)": ("olmo_hybrid", {**DELTA_NET, "linear_num_value_heads": 2}),
    "qwen3.5 (gated DeltaNet)": ("qwen3_5_text", DELTA_NET),
    "qwen3.5 moe (gated DeltaNet)": ("qwen3_5_moe_text", {**DELTA_NET, **MAMBA_MOE}),
    "qwen3-next (gated DeltaNet)": ("qwen3_next", {**DELTA_NET, **MAMBA_MOE}),
    "zamba-2 (Mamba 2)": (
        "zamba2",
        {
            "mamba_d_state": 8,
            "mamba_headdim": 16,
            "mamba_ngroups": 1,
            "n_mamba_heads": 8,
            "layers_block_type": ["mamba", "hybrid"] * 2,
            "hybrid_layer_ids": [1, 3],
            "num_mem_blocks": 1,
            "use_mamba_kernels": False,
            "adapter_rank": 8,
        },
    ),
    "zaya (convolutions in attention)": ("zaya", {}),
}
# Their KV cannot be moved, and yet gone on from.
STILL: dict[str, tuple[str, dict[str, Any]]] = {
    name: UNSUPPORTED[name][:2]
    for name in (
        "gpt-2 (learned positions)",
        "bloom (ALiBi)",
        "mpt (ALiBi)",
        "falcon",
        "gpt-j",
        "hunyuan (normalises rotated keys)",
        "doge (dynamic mask)",
    )
}
CONTINUED = {**RECURRENT, **STILL}
# With several tokens at once transformers computes them as if nothing were before, or its cache
# is no list of layers.
WHOLE: dict[str, tuple[str, dict[str, Any], str]] = {
    "mamba (Mamba 1 alone)": ("mamba", {"state_size": 8}, "several tokens"),
    "falcon mamba (Mamba 1 alone)": ("falcon_mamba", {"state_size": 8}, "several tokens"),
    "jamba (Mamba 1)": (
        "jamba",
        {
            "mamba_d_state": 8,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 2,
            "use_mamba_kernels": False,
        },
        "several tokens",
    ),
    "minimax (lightning attention)": (
        "minimax",
        {**HALF, "head_dim": 16, "block_size": 8, "num_local_experts": 4},
        "parts that are not known",
    ),
    "recurrent gemma": ("recurrent_gemma", {}, "exact prefixes either"),
    "llama, dynamic NTK": (*UNSUPPORTED["llama, dynamic NTK"][:2], "sequence length"),
}


def _runner(model: Any, chunk: int = 16) -> StateRunner:
    support = check_support(model)
    assert support.reason is not None and support.rotary is None and support.kv_shape is None
    assert support.states is not None
    loaded = _loaded(model, support, eos_token_ids=frozenset({2}))
    return StateRunner(loaded, 3, chunk)


def _kept(runner: StateRunner, slot: int, over: bool = False) -> dict[int, Any]:
    return dict(runner.states(slot, over))


@pytest.mark.parametrize("name", CONTINUED)
def test_what_follows_a_kept_state_is_exact(name: str) -> None:
    model = _build(*CONTINUED[name])
    reference = copy.deepcopy(model)
    runner = _runner(model)
    layout = runner.layout
    assert bool(layout.states) is (name in RECURRENT)
    assert bool(layout.num_bytes) is (name in RECURRENT)

    n = 70
    ids = _ids(n)
    ids[29] = 2  # a turn ends
    want = _generate(reference, ids, 6)
    forward = CachedModel(reference)
    whole, _ = forward(forward.new_cache(), _inputs(ids))
    scale = ATOL * float(whole.abs().max())
    runner.begin(0, ids, 0, parted=63)
    assert _answer(runner, 0, ids, 6) == want
    states = _kept(runner, 0, over=True)
    k, v = runner.slot_kv(0)
    assert k.shape[2] == v.shape[2] == n + 5
    if name in STILL:
        assert not states
        states = dict.fromkeys((1, 17, 48, n - 1))
    else:
        assert sorted(states) == [30, 48, n - 1, n + 5]
    runner.release(0)

    for at, state in states.items():
        if at >= n:
            continue
        # Beside another request in a slot that was used, in chunks, and twice from one state.
        runner.prefill(2, _ids(50, 3), np.arange(50))
        for _ in range(2):
            runner.resume(1, k[:, :, :at].clone(), v[:, :, :at].clone(), state)
            assert torch.allclose(runner.prefill(1, ids, np.arange(at, n)), whole, atol=scale)
        runner.resume(1, k[:, :, :at].clone(), v[:, :, :at].clone(), state)
        tokens = [int(runner.prefill(1, ids, np.arange(at, n)).argmax())]
        for step in range(5):
            tokens.append(int(runner.decode([1], [tokens[-1]], [n + step])[0].argmax()))
        assert tokens == want
        with pytest.raises(ValueError, match="must follow"):
            runner.prefill(1, ids, np.array([at]))


def _inputs(ids: np.ndarray) -> dict[str, Any]:
    return {"input_ids": torch.from_numpy(ids)[None], "position_ids": torch.arange(len(ids))[None]}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["qwen3.5 (gated DeltaNet)", "granite 4 (Mamba 2)", "gpt-j"])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    """States are float32 beside KV that is not."""
    kind, options = CONTINUED[name]
    runner = _runner(_build(kind, options, dtype))
    runner._dtype = dtype
    ids = _ids(40)
    runner.begin(0, ids, 0, 0)
    want = runner.prefill(0, ids, np.arange(40))
    k, v = (t[:, :, :39] for t in runner.slot_kv(0))
    assert k.dtype == v.dtype == runner.empty_kv(1)[0].dtype == dtype
    state = _kept(runner, 0).get(39)
    if state is not None:
        assert sum(t.nbytes for t in state) == runner.layout.num_bytes
    runner.resume(1, k, v, state)
    got = runner.prefill(1, ids, np.arange(39, 40))
    assert torch.allclose(got, want, atol=0.05 * float(want.abs().max()))


@pytest.mark.parametrize("name", WHOLE)
def test_others_are_declined_in_words_and_served_whole(name: str) -> None:
    kind, options, words = WHOLE[name]
    model = _build(kind, options)
    reference = copy.deepcopy(model)
    support = check_support(model)
    assert support.states is None
    assert support.reason is not None and words in support.reason and len(support.reason) < 300
    runner = PlainRunner(_loaded(model, support), 2)
    for slot, ids in enumerate((_ids(40, 1), _ids(5, 2))):
        assert _answer(runner, slot, ids, 6) == _generate(reference, ids, 6)
    with pytest.raises(ValueError, match="does not go on"):
        StateRunner(_loaded(model, support), 1, 16)


def test_a_state_of_another_model_is_refused() -> None:
    runner = _runner(_build(*RECURRENT["lfm2 (convolutions)"]))
    other = _runner(_build("lfm2", {**CONV, "hidden_size": 32}))
    ids = _ids(20)
    for each in (runner, other):
        each.begin(0, ids, 0, 0)
        each.prefill(0, ids, np.arange(20))
    state = _kept(other, 0)[19]
    for wrong in (state, (*state[:1], torch.cat([state[1]] * 9)), None):
        with pytest.raises(ValueError, match="another model"):
            runner.resume(1, *runner.slot_kv(0), wrong)


def test_a_decode_step_that_is_repeated_changes_nothing() -> None:
    """It failed for another request: a state has no way back."""
    runner = _runner(_build(*RECURRENT["qwen3.5 (gated DeltaNet)"]))
    ids = _ids(20)
    token = int(runner.prefill(0, ids, np.arange(20)).argmax())
    first = runner.decode([0], [token], [20])
    with pytest.raises(KeyError):
        runner.decode([0, 1], [token, token], [20, 20])
    assert torch.equal(runner.decode([0], [token], [20]), first)
    state = runner.layout.state_of(runner._caches[0])
    assert runner.slot_kv(0)[0].shape[2] == 21
    again = _runner(_build(*RECURRENT["qwen3.5 (gated DeltaNet)"]))
    again.prefill(0, np.append(ids, token), np.arange(21))
    for mine, other in zip(state, again.layout.state_of(again._caches[0]), strict=True):
        assert torch.allclose(mine, other, atol=ATOL)
