"""Audits: what they measure, whom they never disturb, and what becomes of the node."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from kvshare_mm import KVShare, RequestOptions, RequestOutput
from kvshare_mm.metrics import EngineMetrics
from kvshare_mm.native.audit import Audit, Auditor
from kvshare_mm.reuse.audits import FIRST, FIRST_SHARE, Compared, changed_facts, drawn
from kvshare_mm.reuse.plan import Promise, ReusePlan

from .asking import _DONOR, _TARGET, PATIENCE_S, Gate, Inbox, OpenLLM, params

_OPTIONS = {"audit_share": 1, "audit_budget": 1e9, "repair": "none"}
_OTHER_SALT = RequestOptions(cache_salt="other")


def auditor_of(llm: KVShare) -> Auditor:
    auditor = llm._parts.auditor
    assert auditor is not None
    return auditor


def audited(llm: KVShare) -> dict[str, int]:
    assert llm.wait_audited(PATIENCE_S)
    results: dict[str, int] = llm.stats()["audits"]["results"]
    return results


def kept_audits(llm: KVShare) -> list[Audit]:
    """The audits that are ordered from now on."""
    auditor, found = auditor_of(llm), []
    add = auditor.add

    def keeping(audit: Audit) -> None:
        found.append(audit)
        add(audit)

    auditor.add = keeping  # type: ignore[method-assign]
    return found


def approximate(llm: KVShare, max_tokens: int = 12) -> RequestOutput:
    """The target's answer, served with the donor's KV."""
    llm.generate(_DONOR, params(2))
    output = llm.generate(_TARGET, params(max_tokens))
    assert output.provenance.reused > 0
    return output


@torch.inference_mode()
def reference(folder: Path, output: RequestOutput) -> torch.Tensor:
    """``[tokens of the answer, vocab]``: transformers' own logits, one whole forward."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt, answer = output.prompt_token_ids, output.token_ids
    ids = torch.tensor([[*prompt, *answer[:-1]]])
    logits: torch.Tensor = model(ids).logits[0, len(prompt) - 1 :]
    return logits.double().log_softmax(-1)


@pytest.mark.parametrize(("chunk", "max_tokens"), [(16, 12), (2048, 12), (2048, 100)])
def test_what_is_measured_is_what_a_slow_reference_says(
    open_llm: OpenLLM, tiny_folder: Path, chunk: int, max_tokens: int
) -> None:
    """In chunks as at once, and of long answers the beginning."""
    llm = open_llm(**_OPTIONS, prefill_chunk=chunk)
    audits = kept_audits(llm)
    output = approximate(llm, max_tokens)
    audited(llm)
    full = reference(tiny_folder, output)[:64]
    served = torch.stack(audits[0].logits).double().log_softmax(-1)
    kls = (full.exp() * (full - served)).sum(-1)
    other = (full.argmax(-1) != served.argmax(-1)).nonzero().flatten().tolist()
    found = auditor_of(llm).results[-1]
    assert len(kls) == len(audits[0].compared) == min(max_tokens, 64)
    assert found.first == pytest.approx(float(kls[0]), rel=1e-3, abs=1e-6)
    assert found.mean == pytest.approx(float(kls.mean()), rel=1e-3, abs=1e-6)
    assert found.worst == pytest.approx(float(kls.max()), rel=1e-3, abs=1e-6)
    assert found.differs_at == (other[0] if other else None)
    assert found.value == max(found.first, found.mean) > 1e-4


def test_an_audited_node_is_exact_and_so_is_what_goes_on_from_it(open_llm: OpenLLM) -> None:
    llm = open_llm(**_OPTIONS)
    audits = kept_audits(llm)
    output = approximate(llm)
    assert llm.flush()
    audited(llm)
    donors = llm._parts.donors
    assert donors is not None
    node = donors.tree[str(audits[0].node_id)]
    assert (node.exact_len, node.drift, node.risk) == (len(node), None, 0)
    assert donors.tree.donor(node.node_id).reusable.all()
    assert donors.counters["healed"] == 1
    turn = [*output.prompt_token_ids, *output.token_ids, *llm.tokenize(" and what then?")]
    second = llm.generate(turn, params())
    assert second.provenance.exact == len(node)
    assert second.provenance.reused == 0
    assert second.provenance.expected_divergence is None
    alone = llm.generate(turn, params(), RequestOptions(reuse="off"))
    assert second.token_ids == alone.token_ids


def test_healing_leaves_to_others_what_they_borrow(open_llm: OpenLLM) -> None:
    llm = open_llm(**{**_OPTIONS, "audit_share": 0.5})
    auditor_of(llm)._random.seed(1)
    llm.generate(_DONOR, params(2))
    for number in (5, 6, 7, 8):
        llm.generate(_TARGET.replace("77", str(number)), params(4))
    audited(llm)
    donors = llm._parts.donors
    assert donors is not None and donors.counters["healed"] > 0
    for node in donors.nodes():
        pieces = donors.tree.resolve(node.node_id, 0, len(node))
        assert sum(piece.length for piece in pieces) == len(node)
        for piece in pieces:
            owner = donors.store.get(piece.owner, node.namespace)
            row = owner.node.owned_row(piece.owner_start, piece.length)
            assert row is not None
            assert row + piece.length <= owner.kv.k.shape[2]


def test_a_healed_node_survives_a_restart(open_llm: OpenLLM, tmp_path: Path) -> None:
    llm = open_llm(**_OPTIONS, store_dir=tmp_path)
    output = approximate(llm)
    audited(llm)
    assert llm.flush()
    before = llm.cache.families()
    llm.close()
    again = open_llm(**_OPTIONS, store_dir=tmp_path)
    assert again.cache.families() == before != []
    turn = [*output.prompt_token_ids, *output.token_ids, *again.tokenize(" and then?")]
    assert again.generate(turn, params(2)).provenance.reused == 0


def test_whoever_asks_is_served_before_the_audit_goes_on(open_llm: OpenLLM) -> None:
    llm = open_llm(**_OPTIONS, max_num_seqs=2)
    auditor = auditor_of(llm)
    forward, asked = auditor._runner.forward, threading.Event()
    inbox: list[Inbox] = []

    def interrupted(*args: Any) -> torch.Tensor:
        if not inbox:
            inbox.append(Inbox(llm, "Somebody asks.", params(3)))
            asked.set()
        return forward(*args)

    auditor._runner.forward = interrupted  # type: ignore[method-assign]
    audits = kept_audits(llm)
    approximate(llm)
    assert asked.wait(PATIENCE_S)
    assert len(inbox[0].result().token_ids) == 3
    results = audited(llm)
    assert results["yielded"] >= 1
    assert sum(results.get(name, 0) for name in ("kept", "missed", "fact")) == 1
    assert audits[0].done == audits[0].length


def test_its_slot_is_there_for_a_request_that_needs_it(open_llm: OpenLLM) -> None:
    llm = open_llm(**_OPTIONS, max_num_seqs=1)
    gate = Gate(auditor_of(llm)._runner, "forward")
    approximate(llm)
    gate.wait()
    inbox = Inbox(llm, _TARGET.replace("77", "51"), params(3))
    gate.open()
    alone = open_llm(**{**_OPTIONS, "audit_share": 0}, max_num_seqs=1)
    approximate(alone)
    same = alone.generate(_TARGET.replace("77", "51"), params(3))
    assert inbox.result().token_ids == same.token_ids
    audited(llm)
    assert len(auditor_of(llm).results) == 2


_FAULTS = {
    "it fails": {"side_effect": RuntimeError("no memory")},
    "no numbers": {"return_value": float("nan")},
}


@pytest.mark.parametrize("fault", _FAULTS.values(), ids=_FAULTS)
def test_an_audit_that_fails_teaches_nothing_and_is_nobodys_problem(
    open_llm: OpenLLM, fault: dict[str, Any]
) -> None:
    llm = open_llm(**_OPTIONS)
    forward = auditor_of(llm)._runner.forward
    broken = Mock(**fault)
    auditor_of(llm)._runner.forward = lambda *args: forward(*args) * broken()
    approximate(llm)
    assert audited(llm) == {"failed": 1}
    assert llm.cache.families() == []
    assert llm.healthy
    assert llm.generate(_TARGET, params(3)).finish_reason == "length"


def test_what_waits_too_long_is_dropped_and_counted(open_llm: OpenLLM) -> None:
    llm = open_llm(**{**_OPTIONS, "audit_budget": 1e-3}, max_num_seqs=2)
    llm.generate(_DONOR, params(2))
    for number in range(20):
        llm.generate(_TARGET.replace("77", str(number)), params(2))
    stats = llm.stats()["audits"]
    assert stats["waiting"] == 16
    assert stats["results"]["dropped"] >= 2


def test_without_a_share_nobody_is_audited_and_the_constants_hold(open_llm: OpenLLM) -> None:
    llm = open_llm(audit_share=0)
    assert llm._parts.auditor is None
    assert "audits" not in llm.stats()
    assert llm._parts.donors is not None
    assert llm._parts.donors.reuse.calibration is None


def test_the_draw_can_be_repeated(open_llm: OpenLLM) -> None:
    each = []
    for _ in range(2):
        llm = open_llm(**{**_OPTIONS, "audit_share": 0.4})
        audits = kept_audits(llm)
        llm.generate(_DONOR, params(2))
        for number in range(12):
            llm.generate(_TARGET.replace("77", str(number)), params(2))
            audited(llm)
        each.append([audit.spec.text for audit in audits])
    assert each[0] == each[1]
    assert 0 < len(each[0]) < 12


def test_of_a_tenants_first_requests_more_are_audited() -> None:
    """And of those that promise nothing, none."""
    plan = ReusePlan(4, promise=Promise("f", 0.01, 0.01, 0.01))
    rng = random.Random(1)

    def share(known: int, share: float, plan: ReusePlan = plan) -> float:
        return sum(drawn(plan, share, rng, known) is not None for _ in range(4000)) / 4000

    assert share(FIRST - 1, 0.02) == pytest.approx(FIRST_SHARE, abs=0.03)
    assert share(FIRST, 0.02) == pytest.approx(0.02, abs=0.01)
    assert share(0, 0.5) == pytest.approx(0.5, abs=0.03)
    assert share(0, 0.0) == share(0, 1.0, ReusePlan(4)) == 0


def test_exact_requests_and_aborted_ones_are_not_audited(open_llm: OpenLLM) -> None:
    llm = open_llm(**_OPTIONS)
    audits = kept_audits(llm)
    approximate(llm)
    audited(llm)
    llm.generate(_TARGET, params(12))
    llm.generate(_TARGET, params(2), RequestOptions(reuse="exact"))
    llm.generate(_TARGET, params(2), RequestOptions(reuse="off"))
    assert len(audits) == 1


def test_a_policy_that_is_bad_is_found_and_shut_off(open_llm: OpenLLM) -> None:
    """Though it promises nothing itself: what requests get is what they would have asked for."""
    llm = open_llm(**{**_OPTIONS, "audit_share": 0.2})
    rng = np.random.default_rng(0)
    llm.generate(_DONOR, params(2))
    declined = []
    for _ in range(100):
        number, row = rng.integers(1000, 99999), rng.integers(12)
        prompt = _TARGET.replace("77", str(number)).replace(f"Value {row} is", f"Value {row} was")
        output = llm.generate(prompt, params(8))
        declined.append(output.provenance.declined)
        audited(llm)
    assert "audited" in declined
    after = declined[declined.index("audited") :]
    assert after.count("audited") >= 0.9 * len(after)
    assert llm.cache.families()[0].shut
    # Other tenants have their own experience, and whoever asks for a policy of their own gets it.
    llm.generate(_DONOR, params(2), _OTHER_SALT)
    assert llm.generate(_TARGET, params(2), _OTHER_SALT).provenance.reused > 0
    own = RequestOptions(repair="window:2")
    assert llm.generate(_TARGET.replace("77", "3"), params(2), own).provenance.reused > 0


@pytest.mark.parametrize(("kl", "fact"), [(2.0, True), (0.0001, False)])
def test_a_changed_number_is_a_fact_unless_rounding_would_turn_it(
    open_llm: OpenLLM, kl: float, fact: bool
) -> None:
    llm = open_llm(**_OPTIONS)
    audits = kept_audits(llm)
    approximate(llm)
    audited(llm)
    ids = audits[0].spec.stream.token_ids
    facts = changed_facts(llm.tokenizer, audits[0].plan, ids)
    said = "".join(llm.tokenizer.decode([token]) for token in facts)
    assert "7" in said and not any(c.islower() for c in said)
    audits[0].compared = [Compared(0.0, 5, 5), Compared(kl, next(iter(facts)), 5)]
    auditor_of(llm)._learn(audits[0])
    assert auditor_of(llm).results[-1].fact is fact


def test_operators_see_what_audits_found(open_llm: OpenLLM) -> None:
    llm = open_llm(**_OPTIONS)
    approximate(llm)
    results = audited(llm)
    metrics = EngineMetrics("tiny", llm.stats, lambda: 0).render().decode()
    lines = dict(line.rsplit(" ", 1) for line in metrics.splitlines() if line[0] != "#")
    label = '{model_name="tiny"'
    found = auditor_of(llm).results[-1].value
    assert float(lines[f"kvshare:divergence_sum{label}}}"]) == pytest.approx(found)
    assert float(lines[f"kvshare:divergence_count{label}}}"]) == 1
    for result in ("kept", "missed", "fact"):
        told = float(lines[f'kvshare:audits_total{label},result="{result}"}}'])
        assert told == results.get(result, 0)
    assert float(lines[f"kvshare:audit_coverage{label}}}"]) == results.get("kept", 0)


def test_a_request_says_what_is_expected_of_it(open_llm: OpenLLM) -> None:
    llm = open_llm(audit_share=1, max_divergence=5.0)
    llm.generate(_DONOR, params(2))
    use = llm.generate(_TARGET, params(2)).provenance
    assert use.reused > 0
    assert use.expected_divergence is not None and 0 < use.expected_divergence <= 5.0
    assert llm.generate(_DONOR, params(2)).provenance.expected_divergence is None
