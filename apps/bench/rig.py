"""What benchmarks run on: a model with slots and donors, without the engine's threads."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import transformers

from kvshare_mm import __version__
from kvshare_mm.apps.bench.methods import Method
from kvshare_mm.apps.bench.work import LayerCounter
from kvshare_mm.assemble import media_support
from kvshare_mm.config import KVShareConfig
from kvshare_mm.donors import DonorPool
from kvshare_mm.editor import KVEditor
from kvshare_mm.engine.encoder import MediaEncoder
from kvshare_mm.engine.prefill import Prefiller, PrefillResult
from kvshare_mm.engine.runner import SlotRunner
from kvshare_mm.errors import ModelLoadError
from kvshare_mm.models.loader import LoadedModel, load_model
from kvshare_mm.reuse.scheduler import namespace
from kvshare_mm.store.disk import DiskTier
from kvshare_mm.store.host import HostTier
from kvshare_mm.stream import SegmentStream
from kvshare_mm.words import joining_tokens


@dataclass(frozen=True, slots=True)
class Served:
    """One prefill as a benchmark sees it.

    Attributes:
        slot: where its KV is.
        result: what the engine was told.
        ttft: seconds until the first token was known.
        work: positions run through the model, in whole passes; a repair policy's probe counts.
    """

    slot: int
    result: PrefillResult
    ttft: float
    work: float


class Rig:
    """A model with slots and a pool of donors.

    Args:
        config: options of the model and of reuse.
        folder: where donors go on disk, or None.
        num_slots: requests that are held at once, to be compared or decoded together.

    Raises:
        ModelLoadError: the model cannot be loaded, or its KV cannot be reused.
    """

    def __init__(
        self, config: KVShareConfig, folder: Path | None = None, num_slots: int = 1
    ) -> None:
        self.loaded: LoadedModel = load_model(
            config.model,
            dtype=config.dtype,
            device=config.device,
            attention_backend=config.attention_backend,
        )
        if self.loaded.unsupported or self.loaded.kv_shape is None:
            raise ModelLoadError(f"nothing to measure: {self.loaded.unsupported}")
        self.config = config
        self.num_slots = num_slots
        self.max_len = min(config.max_model_len or 8192, self.loaded.context_len)
        self.runner = SlotRunner(self.loaded, num_slots, self.max_len, config.prefill_chunk)
        disk = DiskTier(folder, config.disk_bytes) if folder else None
        self.donors = DonorPool(
            self.loaded.fingerprint,
            KVEditor(self.loaded.rotary, self.loaded.attention_backend),
            HostTier(config.host_bytes),
            disk,
            max_candidates=config.max_candidates,
            joining=joining_tokens(self.loaded.tokenizer),
        )
        self.media = media_support(self.loaded, config)
        self.encoder = MediaEncoder(self.loaded, self.donors.store) if self.loaded.family else None
        self.prefiller = Prefiller(
            self.runner,
            self.donors,
            config.planner,
            config.policy,
            self.encoder,
        )
        self._counter = LayerCounter(self.loaded.model, self.loaded.kv_shape.num_layers)

    @property
    def settings(self) -> list[Any]:
        """What decides the rig's results, JSON-ready: for journals."""
        return [
            __version__,
            self.loaded.fingerprint,
            self.config.model_dump(mode="json"),
            repr(self.config.policy),
        ]

    def namespace(self, salt: str) -> str:
        return namespace(self.loaded.fingerprint, salt)

    def serve(self, stream: SegmentStream, ns: str, method: Method, slot: int = 0) -> Served:
        """Prefill into a slot; ttft ends when the first token is known."""
        self._counter.take()
        start = time.perf_counter()
        result = self.prefiller.prefill(
            slot, stream, ns, sharing=method.sharing, policy=method.policy
        )
        int(result.logits.argmax())
        return Served(slot, result, time.perf_counter() - start, self._counter.take())

    def capture(self, stream: SegmentStream, ns: str, served: Served) -> str | None:
        """Make what is in the slot a donor."""
        keys, values = self.runner.slot_kv(served.slot)
        result = served.result
        return self.donors.capture(
            stream.keys,
            ns,
            result.plan,
            keys,
            values,
            "",
            result.attention,
            stream.positions,
            stream.media,
        )

    def decode(
        self,
        served: Sequence[Served],
        max_tokens: int,
        stop: Callable[[list[int]], bool] | None = None,
    ) -> list[list[int]]:
        """Greedy answers that continue prefilled slots, all in one batch.

        Args:
            served: prefills in slots of their own.
            max_tokens: longest answer.
            stop: told an answer so far; true ends it. The end token ends it anyway.

        Returns:
            Token ids of each answer, end token included.
        """
        answers = [[int(s.result.logits.argmax())] for s in served]
        while active := [
            i
            for i, (s, answer) in enumerate(zip(served, answers, strict=True))
            if len(answer) < max_tokens
            and answer[-1] not in self.loaded.eos_token_ids
            and s.result.plan.num_tokens + len(answer) <= self.max_len
            and not (stop and stop(answer))
        ]:
            logits = self.runner.decode(
                [served[i].slot for i in active],
                [answers[i][-1] for i in active],
                [served[i].result.plan.num_tokens + len(answers[i]) - 1 for i in active],
                [served[i].result.lead for i in active],
            )
            for i, token in zip(active, logits.argmax(-1).tolist(), strict=True):
                answers[i].append(token)
        return answers

    def close(self) -> None:
        self._counter.close()
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


def spread(values: list[float]) -> dict[str, float]:
    """Mean, median and 90th percentile."""
    array = np.array(values)
    return {
        "mean": float(array.mean()),
        "p50": float(np.median(array)),
        "p90": float(np.quantile(array, 0.9)),
    }
