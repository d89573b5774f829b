"""Prompts with media, and a prefiller with its donors that serves them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kvshare_mm.native.encoder import MediaEncoder
from kvshare_mm.native.prefill import Prefiller, PrefillResult
from kvshare_mm.native.slots import SlotRunner
from kvshare_mm.reuse.donors import DonorPool
from kvshare_mm.reuse.editor import KVEditor
from kvshare_mm.reuse.plan import PlannerOptions
from kvshare_mm.reuse.repair import make_policy
from kvshare_mm.reuse.scheduler import namespace
from kvshare_mm.store.disk import DiskTier
from kvshare_mm.store.host import HostTier
from kvshare_mm.stream import SegmentStream

from ..media_oracle import Oracle
from ..modalities.media import RATE, picture, tone

Oracles = Callable[[str], Oracle]
Parts = list[dict[str, Any]]

MAX_LEN = 400
ATOL = 1e-4
NS = namespace("tiny", "")
OTHER_NS = namespace("tiny", "another tenant")
OPTIONS = PlannerOptions(min_run=4, min_gain_tokens=4, min_gain_share=0.0)
DONOR_TEXT = "The goods can be sent back within 30 days. "
NO_REPAIR = make_policy("none")
SIZES = [(112, 84), (56, 56), (28, 140), (168, 56)]


def see(kind: int = 0) -> dict[str, Any]:
    return {"type": "image", "image": picture(*SIZES[kind % len(SIZES)], seed=kind)}


def hear(kind: int = 0) -> dict[str, Any]:
    return {"type": "audio", "audio": (tone(0.3 + 0.17 * kind, 300 + 90 * kind), RATE)}


def say(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def user(*parts: dict[str, Any]) -> Parts:
    return [{"role": "user", "content": list(parts)}]


def medium(family: str, kind: int = 0) -> dict[str, Any]:
    """A picture for what can see, else a clip."""
    return hear(kind) if family == "qwen2_audio" else see(kind)


class Server:
    """Prefiller, donors and encoder as the engine has them."""

    def __init__(self, oracle: Oracle, disk: DiskTier | None = None, host_bytes: int = 1 << 26):
        self.oracle = oracle
        self.runner = SlotRunner(oracle.loaded, 1, MAX_LEN, 4096)
        self.pool = DonorPool("tiny", KVEditor(oracle.loaded.rotary), HostTier(host_bytes), disk)
        self.encoder = MediaEncoder(oracle.loaded, self.pool.store)
        self.prefiller = Prefiller(
            self.runner,
            self.pool,
            OPTIONS,
            NO_REPAIR,
            self.encoder,
        )

    def prefill(self, stream: SegmentStream, ns: str = NS, **options: Any) -> PrefillResult:
        """Prefill in a slot full of NaN."""
        for tensor in self.runner.slot_kv(0):
            tensor.fill_(float("nan"))
        result = self.prefiller.prefill(0, stream, ns, **options)
        for tensor in self.runner.slot_kv(0):
            assert not tensor[:, :, : len(stream)].isnan().any()
        return result

    def serve(self, messages: Parts, ns: str = NS, **options: Any) -> PrefillResult:
        """Prefill and take up as a donor."""
        stream = self.oracle.stream(messages)
        result = self.prefill(stream, ns, **options)
        self.prefiller.save(0, stream, ns, result)
        return result

    def assert_first_layer(self, messages: Parts) -> None:
        """The first layer's K and V depend on token and position alone: reused or not, they must
        be those of a full prefill, which no wrong turn survives."""
        full = self.oracle.full(self.oracle.inputs(messages))
        n = full.k.shape[2]
        for got, want in zip(self.runner.slot_kv(0), (full.k, full.v), strict=True):
            assert torch.allclose(got[0, :, :n], want[0], atol=ATOL, rtol=0)

    @property
    def runs(self) -> int:
        return self.encoder.counters["tower_runs"]

    @property
    def hits(self) -> int:
        return self.encoder.counters["tower_hits"]
