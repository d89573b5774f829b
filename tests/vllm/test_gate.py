"""What is declined, in words; and a vLLM that is not known is left alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.config import KVTransferConfig, MultiModalConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)
from vllm.v1.request import Request

from kvshare_mm.errors import ConfigError
from kvshare_mm.vllm import compat, kv_transfer_config
from kvshare_mm.vllm.connector import KVShareConnector
from kvshare_mm.vllm.gate import deployment_obstacle, request_obstacle, shares_media
from kvshare_mm.vllm.meta import Orders
from kvshare_mm.vllm.options import ConnectorOptions

pytestmark = pytest.mark.vllm

SPEC = FullAttentionSpec(block_size=32, num_kv_heads=2, head_size=32, dtype=torch.float32)
WINDOW = SlidingWindowSpec(
    block_size=32, num_kv_heads=2, head_size=32, dtype=torch.float32, sliding_window=64
)
LATENT = MLAAttentionSpec(block_size=16, num_kv_heads=1, head_size=576, dtype=torch.float32)
OTHER = SimpleNamespace(block_size=32)
CACHES = KVCacheConfig(
    num_blocks=8, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["l0"], SPEC)]
)


@pytest.fixture(scope="module")
def config(random_model: Callable[[str], Path]) -> Any:
    made = EngineArgs(
        model=str(random_model("llama")),
        dtype="float32",
        enforce_eager=True,
        kv_transfer_config=KVTransferConfig(**kv_transfer_config()),
    )
    return made.create_engine_config()


@pytest.mark.parametrize("spec", [SPEC, replace(SPEC, sliding_window=64), LATENT])
def test_kv_of_all_tokens_is_shared(config: Any, spec: Any) -> None:
    caches = replace(CACHES, kv_cache_groups=[KVCacheGroupSpec(["l0"], spec)])
    assert deployment_obstacle(config, caches) is None


@pytest.mark.parametrize(
    ("part", "change", "named"),
    [
        ("parallel_config", {"pipeline_parallel_size": 2}, "pipeline"),
        ("parallel_config", {"decode_context_parallel_size": 2}, "context parallel"),
        ("parallel_config", {"data_parallel_size": 2, "is_moe_model": True}, "mixture of experts"),
        ("model_config", {"runner_type": "pooling"}, "generate text"),
        ("model_config", {"is_encoder_decoder": True}, "generate text"),
        ("model_config", {"hf_text_config": SimpleNamespace(index_topk=64)}, "indexer"),
        ("cache_config", {"cache_dtype": "int8_per_token_head"}, "int8"),
        ("cache_config", {"cache_dtype": "fp8_e5m2"}, "fp8_e5m2"),
        ("speculative_config", {"method": "eagle"}, "eagle"),
    ],
)
def test_deployments_declined(config: Any, part: str, change: dict[str, Any], named: str) -> None:
    def view(real: Any, **changed: Any) -> Any:
        known = {n: getattr(real, n) for n in dir(real) if not n.startswith("_")} if real else {}
        return SimpleNamespace(**{**known, **changed})

    names = ("parallel_config", "model_config", "cache_config", "speculative_config")
    parts = {name: getattr(config, name) for name in names}
    if part == "model_config":
        model = config.model_config
        kept = ("runner_type", "is_encoder_decoder", "hf_text_config")
        parts[part] = SimpleNamespace(**{**{k: getattr(model, k) for k in kept}, **change})
    else:
        parts[part] = view(parts[part], **change)
    reason = deployment_obstacle(SimpleNamespace(**parts), CACHES)
    assert reason is not None and named in reason


def test_float8_of_heads_is_shared_and_of_latents_is_not(
    config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config.cache_config, "cache_dtype", "fp8")
    assert deployment_obstacle(config, CACHES) is None
    latents = replace(CACHES, kv_cache_groups=[KVCacheGroupSpec(["l0"], LATENT)])
    reason = deployment_obstacle(config, latents)
    assert reason is not None and "fp8" in reason


@pytest.mark.parametrize(
    ("specs", "named"),
    [
        ([SPEC, WINDOW], "--disable-hybrid-kv-cache-manager"),
        ([SPEC, OTHER], "different kinds"),
        ([WINDOW], "all of its layers have windows"),
        ([replace(SPEC, non_causal=True)], "causal"),
        ([OTHER], "full attention"),
    ],
)
def test_caches_declined(config: Any, specs: list[Any], named: str) -> None:
    groups = [KVCacheGroupSpec([f"l{i}"], spec) for i, spec in enumerate(specs)]
    reason = deployment_obstacle(config, replace(CACHES, kv_cache_groups=groups))
    assert reason is not None and named in reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"lora_request": object()}, "lora"),
        ({"prompt_embeds": object()}, "prompt_embeds"),
        ({"pooling_params": object()}, "pooling"),
        ({"skip_reading_prefix_cache": True}, "prompt_logprobs"),
        ({"resumable": True}, "streaming_input"),
    ],
)
def test_requests_declined(change: dict[str, Any], reason: str | None) -> None:
    request = Request("r", [5, 6, 7], SamplingParams(), None)
    for name, value in change.items():
        setattr(request, name, value)
    assert request_obstacle(request) == reason


@pytest.mark.parametrize(
    ("change", "shared"),
    [
        ({}, True),
        ({"multimodal_config": None}, False),
        ({"multimodal_config": MultiModalConfig(video_pruning_rate=0.5)}, False),
        ({"is_mm_prefix_lm": True}, False),
    ],
)
def test_whose_media_are_shared(change: dict[str, Any], shared: bool) -> None:
    model = {"multimodal_config": MultiModalConfig(), "is_mm_prefix_lm": False, **change}
    assert shares_media(SimpleNamespace(model_config=SimpleNamespace(**model))) == shared


def test_another_vllm_is_left_alone(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat.importlib.metadata, "version", lambda name: "0.99.0")
    reason = compat.unsupported()
    assert reason is not None and "0.99.0" in reason
    request = Request("r", list(range(3, 90)), SamplingParams(), None)
    scheduler = KVShareConnector(config, KVConnectorRole.SCHEDULER, CACHES)
    scheduler.on_new_request(request)
    assert scheduler.get_num_new_matched_tokens(request, 0) == (0, False)
    assert scheduler.build_connector_meta(None) == Orders()
    assert not scheduler.has_pending_push_work()
    assert scheduler.request_finished_all_groups(request, ([],)) == (False, None)
    worker = KVShareConnector(config, KVConnectorRole.WORKER, CACHES)
    worker.register_kv_caches({})
    worker.bind_connector_metadata(Orders())
    worker.wait_for_save()
    assert not worker.get_transfer_results(set()).finished_recving
    for side in (scheduler, worker):
        assert side.get_kv_connector_stats() is None
        side.shutdown()


def test_wrong_options_stop_the_start(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    extra = config.kv_transfer_config.kv_connector_extra_config
    monkeypatch.setitem(extra, "sharring", "off")
    with pytest.raises(ConfigError, match="sharring"):
        KVShareConnector(config, KVConnectorRole.SCHEDULER, CACHES)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("lookup_deadlin_s", "did you mean lookup_deadline_s?"),
        ("max_divergense", "did you mean max_divergence?"),
        ("prefill_chunks", "there is no such option$"),  # of the native engine alone
    ],
)
def test_a_hint_names_an_option_of_the_connector(given: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=meant.replace("?", r"\?")):
        ConnectorOptions.of({given: 1})
