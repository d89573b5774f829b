"""What a model computes is counted in the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from kvshare_mm.apps.bench import memory
from kvshare_mm.apps.bench.methods import METHODS, pick
from kvshare_mm.apps.bench.prompts import encode
from kvshare_mm.apps.bench.rig import Rig
from kvshare_mm.apps.bench.work import LayerCounter


class Stack(nn.Module):
    """Three layers of which a pass may use the first few."""

    def __init__(self) -> None:
        super().__init__()
        self.others = nn.ModuleList([nn.Identity()])
        self.layers = nn.ModuleList([nn.Identity() for _ in range(3)])

    def forward(self, x: torch.Tensor, depth: int) -> torch.Tensor:
        for layer in list(self.layers)[:depth]:
            x = layer(x)
        return x


def test_positions_through_all_layers() -> None:
    model = Stack()
    counter = LayerCounter(model, 3)
    model(torch.zeros(1, 10, 4), 3)
    assert counter.take() == 10
    assert counter.take() == 0
    model(torch.zeros(1, 6, 4), 1)
    model(torch.zeros(1, 2, 4), 3)
    assert counter.take() == 4
    counter.close()
    model(torch.zeros(1, 10, 4), 3)
    assert counter.take() == 0


def test_a_model_without_such_layers() -> None:
    with pytest.raises(ValueError, match="list of 7 layers"):
        LayerCounter(Stack(), 7)


def test_probes_cost_what_they_run(rig: Rig, pairs: list[dict[str, Any]]) -> None:
    donor, target = encode(rig, pairs[0]["donor"]), encode(rig, pairs[0]["target"])
    ns = rig.namespace("work")
    first = rig.serve(donor, ns, METHODS["full"])
    assert first.work == len(donor)
    stored = rig.save(donor, ns, first)
    assert stored
    window = rig.serve(target, ns, pick("repair=window:4")[0])
    assert window.work == window.result.plan.num_computed
    probed = rig.serve(target, ns, pick("repair=deviation:0.1")[0])
    # Layers 0 and 1 of three, over what follows the exact prefix.
    behind = len(target) - probed.result.plan.num_exact
    assert probed.work == pytest.approx(probed.result.plan.num_computed + behind * 2 / 3)
    # The question runs twice; what is new is work of the prefill alone.
    asked = rig.serve(target, ns, pick("repair=prophet:0.1")[0])
    assert asked.work == asked.result.plan.num_computed + 32
    rig.donors.delete(stored)


def test_chunks_move_to_the_front_and_nothing_in_them_is_computed(rig: Rig) -> None:
    first, gone, last = "Report one. ", "It is not known who wrote this. ", "Value 3 is 7 g/L. " * 3
    donor, target = encode(rig, first + gone + last), encode(rig, first + last)
    ns = rig.namespace("chunks")
    with rig.known(donor, ns):
        stored = rig.runner.slot_kv(0)[1].clone()
        served = rig.serve(target, ns, pick("repair=earlier:8")[0])
        moved = rig.runner.slot_kv(0)[1].clone()
        too_short = rig.serve(target, ns, pick("repair=earlier:200")[0])
        repaired = rig.serve(target, ns, pick("repair=earlier:8+window:3")[0])
    prefix, chunk = served.result.plan.runs
    assert chunk.start == prefix.end and chunk.shift < 0
    assert served.work == len(target) - chunk.end
    behind = slice(chunk.donor_start, chunk.donor_start + chunk.length)
    assert torch.equal(moved[:, :, chunk.start : chunk.end], stored[:, :, behind])
    assert too_short.result.plan.runs == (prefix,) and too_short.result.plan.declined
    assert not served.result.plan.declined
    assert repaired.work == served.work + 3


def test_answers_of_a_batch_are_those_of_one_by_one(rig: Rig, pairs: list[dict[str, Any]]) -> None:
    streams = [encode(rig, pair["target"]) for pair in pairs]
    ns = rig.namespace("decode")
    served = [rig.serve(s, ns, METHODS["full"], slot) for slot, s in enumerate(streams)]
    together = rig.decode(served, 6)
    for slot, stream in enumerate(streams):
        alone = rig.serve(stream, ns, METHODS["full"], slot)
        assert rig.decode([alone], 6) == [together[slot]]
    assert [len(a) for a in rig.decode(served, 6, lambda tokens: len(tokens) == 2)] == [2, 2, 2]
    assert rig.decode([], 6) == []


def test_donors_remember_where_their_end_looked(rig: Rig, pairs: list[dict[str, Any]]) -> None:
    donor, target = encode(rig, pairs[0]["donor"]), encode(rig, pairs[0]["target"])
    ns = rig.namespace("attention")
    stored = rig.save(donor, ns, rig.serve(donor, ns, METHODS["full"]))
    assert stored
    plan = rig.serve(target, ns, METHODS["placeholders"]).result.plan
    assert plan.attention is not None
    # The average stands where nothing is known.
    assert len(set(plan.attention[plan.approximate].tolist())) > 10
    rig.donors.delete(stored)


def test_memory_is_what_donors_own(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "lab_report", lambda *words: f"Report {words[1]}. " + "g/L " * 60)
    before = len(rig.donors.tree)
    report = memory.run(rig, num_requests=2)
    assert report["donors"] - before == 2
    assert report["bytes_owned"] < report["bytes_whole"]
    assert report["budget_bytes"]["host"] == rig.config.host_budget()


def test_donors_are_packed_for_one_method_alone(rig: Rig) -> None:
    donor, target = (encode(rig, "g/L " * 60 + last) for last in ("mmol", "and so on"))
    ns = rig.namespace("packed")
    with rig.known(donor, ns):
        (node,) = (n for n in rig.donors.nodes() if n.namespace == ns)
        before = rig.donors.store.get(node.node_id, ns)
        whole = rig.serve(target, ns, METHODS["kvshare"]).result
        packed = rig.serve(target, ns, METHODS["q8"]).result
        assert packed.plan.num_computed == whole.plan.num_computed < len(target) / 2
        assert not torch.equal(packed.logits, whole.logits)
        assert torch.allclose(packed.logits, whole.logits, atol=0.2)
        again = rig.serve(target, ns, METHODS["kvshare"]).result
        assert torch.equal(again.logits, whole.logits)
        assert torch.equal(rig.donors.store.get(node.node_id, ns).kv.k, before.kv.k)
