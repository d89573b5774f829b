"""CacheBlend's sets that shrink from layer to layer, on a tiny model of four layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvshare_mm import KVShareConfig
from kvshare_mm.apps.bench.methods import METHODS, pick
from kvshare_mm.apps.bench.policies import Narrowing
from kvshare_mm.apps.bench.prompts import encode
from kvshare_mm.apps.bench.rig import Rig
from kvshare_mm.reuse.plan import ReusePlan
from kvshare_mm.stream import SegmentStream

KV = tuple[torch.Tensor, torch.Tensor]
LAYERS = 4


@pytest.fixture(scope="module")
def rig(random_model: Callable[[str], Path]) -> Iterator[Rig]:
    rig = Rig(KVShareConfig.of(model=str(random_model("olmo3")), embedder=None), num_slots=3)
    yield rig
    rig.close()


@pytest.fixture
def asked(rig: Rig, pairs: list[dict[str, Any]]) -> Iterator[tuple[SegmentStream, str]]:
    """A prompt whose donor is stored."""
    donor, target = encode(rig, pairs[0]["donor"]), encode(rig, pairs[0]["target"])
    ns = rig.namespace("narrowing")
    with rig.known(donor, ns):
        yield target, ns


def _kv(rig: Rig, slot: int, n: int) -> KV:
    k, v = rig.runner.slot_kv(slot)
    return k[:, :, :n].clone(), v[:, :, :n].clone()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7])
def test_layer_by_layer(rig: Rig, asked: tuple[SegmentStream, str], share: float) -> None:
    """The first two layers are full recompute's. Then a layer's KV is new where V of the one before
    was furthest off, of what was new there, and the donor's elsewhere."""
    target, ns = asked
    n, policy = len(target), Narrowing(share)
    rig.serve(target, ns, METHODS["full"], slot=1)
    stale = rig.serve(target, ns, pick("repair=tail:8")[0], slot=2)
    served = rig.serve(target, ns, pick(f"repair=narrowing:{share}")[0], slot=0)
    full, reused, got = (_kv(rig, slot, n) for slot in (1, 2, 0))
    for one, two in zip(got, full, strict=True):
        assert torch.allclose(one[:2], two[:2], atol=1e-4)
    plan, base = served.result.plan, stale.result.plan
    left = np.setdiff1d(np.arange(base.num_exact, n), base.compute)
    others, work = left, 0
    for layer, count in enumerate(policy.counts(LAYERS, len(others))):
        if layer >= 2:
            drift = (got[1] - reused[1])[layer - 1].norm(dim=-1).norm(dim=0).numpy()
            left = np.sort(left[np.argsort(-drift[left])[:count]])
            dropped = np.setdiff1d(others, left)
            for one, old in zip(got, reused, strict=True):
                assert torch.equal(one[layer][:, dropped], old[layer][:, dropped])
                assert (one[layer][:, left] != old[layer][:, left]).any(-1).all()
        work += len(left) + len(base.compute)
    assert plan.compute.tolist() == sorted([*base.compute, *left])
    assert served.work == pytest.approx(work / LAYERS + 1)  # the last position runs again


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_what_ran_through_all_layers_would_be_the_same_again(
    rig: Rig, asked: tuple[SegmentStream, str], share: float
) -> None:
    """A layer's rows attend to what it leaves in the slot, and stand where they stand."""
    target, ns = asked
    served = rig.serve(target, ns, pick(f"repair=narrowing:{share}")[0])
    before = _kv(rig, 0, len(target))
    logits = rig.runner.prefill(0, target.token_ids, served.result.plan.compute)
    assert torch.allclose(logits, served.result.logits, atol=1e-4)
    for one, two in zip(before, _kv(rig, 0, len(target)), strict=True):
        assert torch.allclose(one, two, atol=1e-4)


def test_it_computes_what_other_parts_of_a_policy_want(
    rig: Rig, asked: tuple[SegmentStream, str]
) -> None:
    target, ns = asked
    window = rig.serve(target, ns, pick("repair=tail:8+window:6")[0]).result.plan
    both = rig.serve(target, ns, pick("repair=window:6+narrowing:0")[0]).result.plan
    assert both.compute.tolist() == window.compute.tolist()


def test_nothing_to_narrow(rig: Rig, pairs: list[dict[str, Any]]) -> None:
    target, ns = encode(rig, pairs[0]["target"]), rig.namespace("nobody's")
    served = rig.serve(target, ns, METHODS["cacheblend"])
    assert served.work == served.result.plan.num_computed == len(target)


def test_shares_fall_and_are_right_on_average() -> None:
    counts = list(Narrowing(0.2).counts(32, 1000))
    assert counts[:3] == [1000, 1000, 240] and counts[-1] in (160, 161)
    assert counts == sorted(counts, reverse=True)
    assert sum(counts[2:]) / 30 == pytest.approx(200, abs=1)
    assert list(Narrowing(0.9).counts(3, 10)) == [10, 10, 10]
    assert list(Narrowing(0.5).counts(1, 10)) == [10]
    assert Narrowing().positions(ReusePlan(20)).tolist() == list(range(12, 20))
