"""Builds the two sides from vLLM's configuration."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from kvshare_mm.index.semantic import SemanticIndex
from kvshare_mm.reuse.editor import KVEditor
from kvshare_mm.reuse.words import joining_tokens
from kvshare_mm.reuse.worker import ReuseWorker
from kvshare_mm.store.disk import DiskTier
from kvshare_mm.store.host import HostTier
from kvshare_mm.store.tiered import TieredStore
from kvshare_mm.vllm import compat
from kvshare_mm.vllm.forward import PartialForward
from kvshare_mm.vllm.gate import deployment_obstacle, shares_media
from kvshare_mm.vllm.latents import LatentPages
from kvshare_mm.vllm.options import ConnectorOptions
from kvshare_mm.vllm.pages import PageLayout
from kvshare_mm.vllm.rotation import rotary_spec
from kvshare_mm.vllm.scheduler_side import SchedulerSide
from kvshare_mm.vllm.worker_side import WorkerSide

logger = logging.getLogger(__name__)


def build_scheduler(
    vllm_config: Any, kv_cache_config: Any, options: ConnectorOptions
) -> SchedulerSide:
    """The scheduler side."""
    positions = compat.media_positions(vllm_config) if shares_media(vllm_config) else None
    scheduler = SchedulerSide(
        options,
        options.core.fingerprint(compat.fingerprint(vllm_config)),
        int(kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size),
        int(vllm_config.parallel_config.world_size),
        positions,
    )
    if positions is not None:
        compat.keep_media(vllm_config)
    scheduler.obstacle = deployment_obstacle(vllm_config, kv_cache_config)
    if scheduler.obstacle is not None:
        logger.warning("KVShare is off: %s", scheduler.obstacle)
        return scheduler
    if not vllm_config.model_config.skip_tokenizer_init:
        from vllm.tokenizers import cached_tokenizer_from_config

        tokenizer = cached_tokenizer_from_config(vllm_config.model_config)
        scheduler.tokenizer = tokenizer
        scheduler.reuse.catalogue.joining = joining_tokens(tokenizer)
        if options.core.embedder:
            from kvshare_mm.assemble import open_dense

            opened = open_dense(options.core, scheduler.fingerprint)
            scheduler.reuse.semantic = SemanticIndex(
                opened, [], lambda node_id, embedding: True, scheduler.counters
            )
    scheduler.open_audits()
    return scheduler


def build_runner(
    vllm_config: Any, kv_cache_config: Any, kv_caches: dict[str, Any], options: ConnectorOptions
) -> WorkerSide:
    """The worker side of this rank.

    Raises:
        ValueError: this model, or its attention backend, cannot be served so.
        StoreError: the store folder cannot be used.
    """
    if (reason := deployment_obstacle(vllm_config, kv_cache_config)) is not None:
        raise ValueError(reason)
    model = compat.model()
    if model is None:
        raise ValueError("the worker's model was not found; is the plugin `kvshare` disabled?")
    known = vllm_config.compilation_config.static_forward_context
    group = kv_cache_config.kv_cache_groups[0]
    layers = {name: known[name] for name in group.layer_names if name in kv_caches}
    if any(getattr(x, "kv_sharing_target_layer_name", None) for x in known.values()):
        raise ValueError("some of its layers use another's KV")
    model_config = vllm_config.model_config
    forward = PartialForward(
        vllm_config, model, layers, group.kv_cache_spec, bool(model_config.uses_mrope)
    )
    if (whole := compat.whole_model()) is not model:
        forward.prove(whole)
    first = next(iter(layers.values()))
    pages = LatentPages(first) if compat.is_latent(first) else PageLayout(first)
    rotary = rotary_spec(model, layers, forward.probe)
    parallel = vllm_config.parallel_config
    ranks = int(parallel.world_size)
    disk = None
    if options.core.store_dir is not None:
        fingerprint = options.core.fingerprint(compat.fingerprint(vllm_config))
        name = f"vllm-{fingerprint[:16]}-{parallel.rank}of{ranks}"
        disk = DiskTier(options.core.store_dir / name, options.core.disk_bytes // ranks)
    gone: deque[str] = deque()
    store = TieredStore(HostTier(options.core.host_budget() // ranks), disk, gone.append)
    return WorkerSide(
        layers,
        pages,
        forward,
        ReuseWorker(store, KVEditor(rotary), options.core.packed),
        gone,
        _agreement(ranks),
        compat.logits,
        options.recompute_per_step,
    )


def _agreement(ranks: int) -> Callable[[bool], bool]:
    if ranks == 1:
        return bool
    from vllm.distributed.parallel_state import get_tp_group

    group = get_tp_group().cpu_group

    def agree(yes: bool) -> bool:
        vote = torch.tensor([int(yes)])
        torch.distributed.all_reduce(vote, torch.distributed.ReduceOp.MIN, group=group)
        return bool(vote.item())

    return agree
