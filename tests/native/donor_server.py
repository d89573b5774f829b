"""A server that checks each of its prefills against full ones and against its donors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from kvshare_mm.native.prefill import Prefiller, PrefillResult, provenance
from kvshare_mm.native.slots import SlotRunner
from kvshare_mm.outputs import Provenance
from kvshare_mm.reuse.donors import DonorPool
from kvshare_mm.reuse.editor import KVEditor
from kvshare_mm.reuse.plan import PlannerOptions
from kvshare_mm.reuse.repair import make_policy
from kvshare_mm.reuse.rotary import rerotate
from kvshare_mm.reuse.scheduler import namespace
from kvshare_mm.store.disk import DiskTier
from kvshare_mm.store.host import HostTier
from kvshare_mm.stream import text_stream

MAX_LEN = 128
ATOL = 1e-4
NS = namespace("tiny", "")
OTHER_NS = namespace("tiny", "another tenant")
OPTIONS = PlannerOptions(min_run=4, min_gain_tokens=8, min_gain_share=0.2)
NO_REPAIR = make_policy("none")


def _ids(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 128, n)


def _edited(ids: np.ndarray, *positions: int) -> np.ndarray:
    out = ids.copy()
    out[list(positions)] = (out[list(positions)] + 1) % 128
    return out


class Server:
    """A prefiller over donors, as the engine drives it: prefill, then save."""

    def __init__(
        self, tiny: Any, disk: DiskTier | None = None, host_bytes: int = 1 << 26, chunk: int = 4096
    ) -> None:
        self.tiny = tiny
        self.runner = SlotRunner(tiny.loaded, 2, MAX_LEN, chunk)
        self.pool = DonorPool("tiny", KVEditor(tiny.loaded.rotary), HostTier(host_bytes), disk)
        self.served: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.namespaces: dict[str, str] = {}
        self.prefiller = Prefiller(self.runner, self.pool, OPTIONS, NO_REPAIR)

    def prefill(self, ids: np.ndarray, ns: str = NS, **options: Any) -> PrefillResult:
        """Prefill in a slot full of NaN, and check all that must hold whatever was reused."""
        k, v = self.runner.slot_kv(1)
        k.fill_(float("nan"))
        v.fill_(float("nan"))
        result = self.prefiller.prefill(1, text_stream(ids), ns, **options)
        n, plan = len(ids), result.plan
        assert plan.num_tokens == n
        assert k[:, :, n:].isnan().all() and v[:, :, n:].isnan().all()
        assert not k[:, :, :n].isnan().any() and not v[:, :, :n].isnan().any()
        assert not result.logits.isnan().any()
        full = self.tiny.full(ids)
        exact = plan.num_exact
        assert torch.allclose(k[:, :, :exact], full.k[:, :, :exact], atol=ATOL)
        assert torch.allclose(v[:, :, :exact], full.v[:, :, :exact], atol=ATOL)
        if plan.num_exact + len(plan.compute) == n and not plan.approximate.any():
            assert torch.allclose(result.logits, full.logits[-1], atol=ATOL)
            assert torch.allclose(k[:, :, :n], full.k, atol=ATOL)
        kept = plan.kept
        kept[plan.repair] = False
        for run in plan.runs:
            assert self.namespaces.get(run.donor, ns) == ns
            at = run.start + np.flatnonzero(kept[run.start : run.end])
            if run.donor not in self.served:
                continue
            # Bit for bit what the donor was served with, and its keys turned to the new place.
            donor_k, donor_v = self.served[run.donor]
            shift = torch.full((len(at),), run.shift)
            moved = rerotate(donor_k[:, :, at - run.shift], shift, self.tiny.loaded.rotary)
            assert torch.allclose(k[:, :, at], moved, atol=ATOL)
            assert torch.equal(v[:, :, at], donor_v[:, :, at - run.shift])
        _assert_adds_up(result, provenance(result))
        return result

    def answered(self, ids: np.ndarray, answer: np.ndarray) -> np.ndarray:
        """A prompt with an answer, whose KV is in the slot."""
        for i, token in enumerate(answer.tolist()):
            self.runner.decode([1], [token], [len(ids) + i])
        return np.concatenate((ids, answer))

    def save(self, ids: np.ndarray, result: PrefillResult, ns: str = NS) -> str | None:
        node_id = self.prefiller.save(1, text_stream(ids), ns, result)
        if node_id is not None:
            n = len(ids)
            k, v = self.runner.slot_kv(1)
            self.served[node_id] = k[:, :, :n].clone(), v[:, :, :n].clone()
            self.namespaces[node_id] = ns
        return node_id

    def serve(self, ids: np.ndarray, ns: str = NS, **options: Any) -> tuple[PrefillResult, str]:
        result = self.prefill(ids, ns, **options)
        node_id = self.save(ids, result, ns)
        assert node_id is not None
        return result, node_id

    def assert_full(self, ids: np.ndarray, result: PrefillResult) -> None:
        assert result.plan.num_computed == len(ids)
        assert torch.allclose(result.logits, self.tiny.full(ids).logits[-1], atol=ATOL)


def _assert_adds_up(result: PrefillResult, told: Provenance) -> None:
    plan = result.plan
    n = plan.num_tokens
    assert told.exact + told.reused + told.recomputed == n
    assert (told.exact, told.reused) == (plan.num_exact, plan.num_reused)
    assert told.recomputed == len(plan.compute) >= 1
    assert [s.start for s in told.spans] == [0, *(s.end for s in told.spans[:-1])]
    assert told.spans[-1].end == n
    lengths = {"exact": 0, "reused": 0, "recomputed": 0}
    for span in told.spans:
        assert span.start < span.end
        assert (span.donor is None) == (span.kind == "recomputed")
        assert span.donor is None or span.donor in told.donors
        lengths[span.kind] += span.end - span.start
    assert lengths == {
        "exact": told.exact,
        "reused": told.reused,
        "recomputed": told.recomputed,
    }
    computed = [p for s in told.spans if s.kind == "recomputed" for p in range(s.start, s.end)]
    assert computed == plan.compute.tolist()
    for a, b in zip(told.spans[:-1], told.spans[1:], strict=True):
        assert (a.kind, a.donor) != (b.kind, b.donor), "spans are maximal"
    assert 0.0 <= told.similarity <= 1.0
    assert told.fallback == result.fallback


def _evict(server: Server, node_id: str) -> None:
    """Take a node's KV away behind everybody's back."""
    server.pool.store._host.delete(node_id)
