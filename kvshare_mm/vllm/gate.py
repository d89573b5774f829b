"""What KVShare declines inside vLLM: a deployment at its start, or a request, with the reason."""

from __future__ import annotations

from typing import Any

from kvshare_mm.models.support import declared_obstacle
from kvshare_mm.vllm.compat import FLOAT8

# Drafters that keep no KV of their own.
_FREE_DRAFTERS = frozenset({"ngram", "ngram_gpu", "suffix"})

_KEPT_WHOLE = frozenset({"FullAttentionSpec", "MLAAttentionSpec"})
_WINDOWED = frozenset({"SlidingWindowSpec", "ChunkedLocalAttentionSpec"})
# Layers with windows keep the KV of all tokens then: gaps are computed over it, and donors made.
KEEP_ALL = "--disable-hybrid-kv-cache-manager"


def deployment_obstacle(vllm_config: Any, kv_cache_config: Any) -> str | None:
    """Why KV cannot be shared in this deployment, or None."""
    parallel = vllm_config.parallel_config
    for name, words in (
        ("pipeline_parallel_size", "pipeline parallelism"),
        ("decode_context_parallel_size", "decode context parallelism"),
        ("prefill_context_parallel_size", "prefill context parallelism"),
    ):
        if int(getattr(parallel, name, 1) or 1) > 1:
            return f"{words} is not supported"
    if parallel.data_parallel_size > 1 and getattr(parallel, "is_moe_model", False):
        return "data parallelism of a mixture of experts is not supported"
    model = vllm_config.model_config
    if model.runner_type != "generate" or model.is_encoder_decoder:
        return "only decoders that generate text are supported"
    if (reason := declared_obstacle(model.hf_text_config)) is not None:
        return reason
    if getattr(model.hf_text_config, "index_topk", None) is not None:
        return "its attention sees what an indexer chooses, which keeps a cache of its own"
    groups = kv_cache_config.kv_cache_groups
    kinds = {type(group.kv_cache_spec).__name__ for group in groups}
    if len(groups) != 1:
        if kinds <= _KEPT_WHOLE | _WINDOWED:
            return f"vLLM drops KV behind its windows, unless it is started with {KEEP_ALL}"
        return "its layers have different kinds of KV cache"
    if kinds <= _WINDOWED:
        return "all of its layers have windows, and vLLM drops the KV behind them"
    if not kinds <= _KEPT_WHOLE:
        return f"its KV cache is a {kinds.pop()}, not full attention's"
    if groups[0].kv_cache_spec.non_causal:
        return "its attention is not causal"
    known = {"auto", "bfloat16", "float16", "float32"}
    if kinds == {"FullAttentionSpec"}:
        known |= FLOAT8
    if vllm_config.cache_config.cache_dtype not in known:
        return f"KV of dtype {vllm_config.cache_config.cache_dtype} is not supported"
    drafter = vllm_config.speculative_config
    if drafter is not None and drafter.method not in _FREE_DRAFTERS:
        return f"speculative decoding by {drafter.method} keeps KV of its own"
    return None


def shares_media(vllm_config: Any) -> bool:
    """Whether requests with media are shared: not where a picture's tokens see those behind them,
    or some of a video's are left out."""
    model = vllm_config.model_config
    media = model.multimodal_config
    return not (media is None or media.is_multimodal_pruning_enabled() or model.is_mm_prefix_lm)


def request_obstacle(request: Any) -> str | None:
    """Why a request takes no part in reuse, neither as target nor as donor, or None; media are
    judged where they are read."""
    if request.lora_request is not None:
        return "lora"
    if request.prompt_embeds is not None or request.prompt_token_ids is None:
        return "prompt_embeds"
    if request.pooling_params is not None:
        return "pooling"
    if request.skip_reading_prefix_cache:
        return "prompt_logprobs"
    if request.resumable:
        return "streaming_input"
    return None
