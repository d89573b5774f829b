"""What benchmarks run on: a model with slots and donors, without the engine's threads."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import transformers

from kvshare_mm.apps.bench.methods import Method
from kvshare_mm.config import KVShareConfig
from kvshare_mm.donors import DonorPool, namespace
from kvshare_mm.editor import KVEditor
from kvshare_mm.engine.prefill import Prefiller, PrefillResult
from kvshare_mm.engine.runner import SlotRunner
from kvshare_mm.errors import ModelLoadError
from kvshare_mm.models.loader import LoadedModel, load_model
from kvshare_mm.repair import make_policy
from kvshare_mm.store.disk import DiskTier
from kvshare_mm.store.host import HostTier
from kvshare_mm.stream import SegmentStream


@dataclass(frozen=True, slots=True)
class Served:
    """One prefill as a benchmark sees it."""

    result: PrefillResult
    ttft: float


class Rig:
    """One slot, one model, one pool of donors.

    Args:
        config: options of the model and of reuse.
        folder: where donors go on disk, or None.

    Raises:
        ModelLoadError: the model cannot be loaded, or its KV cannot be reused.
    """

    def __init__(self, config: KVShareConfig, folder: Path | None = None) -> None:
        self.loaded: LoadedModel = load_model(
            config.model, dtype=config.dtype, device=config.device
        )
        if self.loaded.unsupported:
            raise ModelLoadError(f"nothing to measure: {self.loaded.unsupported}")
        self.max_len = min(config.max_model_len or 8192, self.loaded.context_len)
        self.runner = SlotRunner(self.loaded, 1, self.max_len, config.prefill_chunk)
        disk = DiskTier(folder, config.disk_bytes) if folder else None
        self.donors = DonorPool(
            self.loaded.fingerprint,
            HostTier(config.host_bytes),
            disk,
            max_candidates=config.max_candidates,
        )
        self.prefiller = Prefiller(
            self.runner,
            self.donors,
            KVEditor(self.loaded.rotary),
            config.planner,
            make_policy(config.repair),
        )

    def namespace(self, salt: str) -> str:
        return namespace(self.loaded.fingerprint, salt)

    def serve(self, stream: SegmentStream, ns: str, method: Method) -> Served:
        """Prefill into the slot; ttft ends when the first token is known."""
        start = time.perf_counter()
        result = self.prefiller.prefill(0, stream, ns, sharing=method.sharing, policy=method.policy)
        int(result.logits.argmax())
        return Served(result, time.perf_counter() - start)

    def capture(self, stream: SegmentStream, ns: str, result: PrefillResult) -> str | None:
        """Make what is in the slot a donor."""
        keys, values = self.runner.slot_kv(0)
        return self.donors.capture(stream.keys, ns, result.plan, keys, values, "")

    def decode(self, stream: SegmentStream, logits: torch.Tensor, max_tokens: int) -> list[int]:
        """Greedy answer that continues the slot, end token included."""
        tokens = [int(logits.argmax())]
        while len(tokens) < max_tokens and tokens[-1] not in self.loaded.eos_token_ids:
            at = len(stream) + len(tokens) - 1
            if at >= self.max_len:
                break
            tokens.append(int(self.runner.decode([0], [tokens[-1]], [at])[0].argmax()))
        return tokens

    def close(self) -> None:
        self.donors.close()


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def kl_divergence(full: torch.Tensor, other: torch.Tensor) -> float:
    """KL(full || other) in nats of two logit vectors ``[vocab_size]``."""
    p, q = full.double().log_softmax(-1), other.double().log_softmax(-1)
    return max(0.0, float((p.exp() * (p - q)).sum()))


def spread(values: list[float]) -> dict[str, float]:
    """Mean, median and 90th percentile."""
    array = np.array(values)
    return {
        "mean": float(array.mean()),
        "p50": float(np.median(array)),
        "p90": float(np.quantile(array, 0.9)),
    }
