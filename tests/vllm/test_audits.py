"""Audits inside vLLM: what they measure, whom they give way to, and what becomes of the node."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from kvshare_mm import KVShare, SamplingParams
from kvshare_mm.reuse.audits import Compared, Divergence
from kvshare_mm.reuse.calibration import read_state
from kvshare_mm.vllm import audits, recompute

from .bursts import BASES, Burst, bursts
from .engines import (
    Shared,
    edited,
    first_token,
    ids,
    patience,
    shared_engine,
    stock_engine,
    stock_tokens,
    summary,
    tokens,
)

pytestmark = pytest.mark.vllm

# One long request and a little more.
NUM_BLOCKS = 25
Logits = list[tuple[torch.Tensor, torch.Tensor]]


@pytest.fixture(scope="module")
def model(random_model: Callable[[str], Path]) -> Path:
    return random_model("llama")


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[Shared]:
    options = {"lookup_deadline_s": 30, "min_load_tokens": 8, "repair": "none"}
    shares = {"audit_share": 1, "audit_budget": 1e9}
    with shared_engine(model, {**options, **shares}, num_gpu_blocks_override=NUM_BLOCKS) as made:
        connector = made.vllm_scheduler.connector
        connector.get_kv_connector_stats = lambda: None  # they are looked at here
        yield made


@pytest.fixture(scope="module")
def stock(model: Path) -> Iterator[Any]:
    with stock_engine(model) as made:
        yield made


@pytest.fixture(autouse=True)
def fresh(engine: Shared) -> Iterator[None]:
    engine.forget()
    engine.scheduler.counters.clear()
    engine.scheduler.times.clear()
    engine.scheduler.reuse.calibration._spaces.clear()
    with engine.keeping_its_blocks():
        yield
        engine.settle()
        assert not engine.scheduler.audits.busy


@pytest.fixture
def logits(monkeypatch: pytest.MonkeyPatch) -> Logits:
    """What audits compare: of full recompute, and of what was served."""
    seen: Logits = []
    compared = recompute.compared

    def noted(full: torch.Tensor, served: torch.Tensor) -> Compared:
        seen.append((full, served))
        return compared(full, served)

    monkeypatch.setattr(recompute, "compared", noted)
    return seen


def results(engine: Shared) -> dict[str, int]:
    counted = engine.scheduler.counters.items()
    return {n.removeprefix("audits_"): c for n, c in counted if n.startswith("audits_") and c}


def step_until(engine: Shared, reached: Callable[[], bool]) -> list[Any]:
    """What is answered until something is."""
    return [] if reached() else engine.step_until(reached)


def answer(engine: Shared, prompt: list[int], max_tokens: int = 12, **knobs: Any) -> Any:
    """What is answered, and not a step more: it is not audited yet."""
    engine.add("one", prompt, max_tokens, **knobs)
    done: list[Any] = []
    while not done:
        done = engine.step()
    return done[0]


@torch.inference_mode()
def reference(model: Path, prompt: list[int], said: list[int]) -> torch.Tensor:
    """``[tokens of the answer, vocab]``: transformers' own log probabilities, one whole forward."""
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    found: torch.Tensor = whole(torch.tensor([[*prompt, *said[:-1]]])).logits
    return found[0, len(prompt) - 1 :].double().log_softmax(-1)


@pytest.mark.parametrize("length", [1, 12, 100])
def test_what_is_measured_is_what_a_slow_reference_says(
    engine: Shared, model: Path, logits: Logits, length: int
) -> None:
    """Of long answers the beginning; between what was served and what a whole forward says."""
    engine.serve(ids(300))
    prompt = edited(ids(300))
    output = engine.serve(prompt, length)
    assert summary(output)["audit"] and summary(output)["reused"] > 150
    assert len(logits) == min(length, 64)
    full, served = (
        torch.stack(each).double().log_softmax(-1) for each in zip(*logits, strict=True)
    )
    expected = reference(model, prompt, tokens(output))[:64]
    assert torch.allclose(full, expected, atol=1e-4)
    # Greedy: what was served is what its logits say.
    assert served.argmax(-1).tolist() == tokens(output)[:64]
    kls = (expected.exp() * (expected - served)).sum(-1)
    (found,) = engine.scheduler.times["divergence"]
    assert found == pytest.approx(float(max(kls[0], kls.mean())), rel=1e-3)
    assert found > 0.01 and results(engine) == {"missed": 1}


def test_what_was_served_is_compared_to_the_last_digit(engine: Shared, logits: Logits) -> None:
    engine.serve(ids(300))
    output = first_token(engine, edited(ids(300)))
    ((_, served),) = logits
    found = served.double().log_softmax(-1)
    for token, logprob in output.outputs[0].logprobs[0].items():
        assert float(found[token]) == pytest.approx(logprob.logprob, abs=1e-4)


def test_an_audited_node_is_exact_and_so_is_what_goes_on_from_it(
    engine: Shared, stock: Any
) -> None:
    engine.serve(ids(300))
    prompt = edited(ids(300))
    # Longer than what is compared: all of it is computed.
    output = engine.serve(prompt, 100)
    _, node = engine.catalogue.nodes()
    assert (len(node), node.exact_len) == (404, 404)
    assert (node.drift, node.risk) == (None, 0)
    assert engine.catalogue.tree.donor(node.node_id).reusable.all()
    assert engine.scheduler.counters["healed"] == 1
    stored = engine.store.get(node.node_id, node.namespace)
    assert stored.node.exact_len == 404 and stored.kv.k.shape[2] == node.num_owned
    turn = [*prompt, *tokens(output), *ids(20, 5)]
    assert engine.llm.reset_prefix_cache()
    second = engine.serve(turn, 12)
    assert (summary(second)["exact"], summary(second)["reused"]) == (404, 0)
    assert "audit" not in summary(second)
    assert tokens(second) == stock_tokens(stock, turn, 12)


def test_blocks_of_others_are_not_written(engine: Shared) -> None:
    """Those before the edit are everybody's: an audit computes from what was kept behind it."""
    engine.serve(ids(300))
    first = answer(engine, edited(ids(300)))
    assert summary(first)["exact"] == 100
    (audit,) = engine.scheduler.audits._waiting
    computed = [step.span for step in audit.steps if step.what != "served"]
    assert min(span.start for span in computed) == 105
    assert max(span.end for span in computed) == audit.length == 316


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(burst=bursts(), steps=st.integers(0, 12))
def test_what_audits_leave_is_exact(engine: Shared, stock: Any, burst: Burst, steps: int) -> None:
    """Whoever comes while they are under way, and to what they made of others' blocks and nodes."""
    engine.forget()
    engine.scheduler.reuse.calibration._spaces.clear()
    with engine.keeping_its_blocks():
        for prompt in BASES:
            engine.serve(prompt, 1)
        for number, (prompt, length, reuse, pause) in enumerate(burst):
            engine.add(str(number), prompt, length, reuse=reuse)
            for _ in range(pause):
                engine.step()
        step_until(engine, lambda: not engine.llm.llm_engine.has_unfinished_requests())
        for _ in range(steps):
            engine.step()  # audits, if there are any
        for prompt, length, _, _ in burst:
            expected = stock_tokens(stock, prompt, length)
            for reuse in ("exact", "off"):
                output = answer(engine, prompt, length, reuse=reuse)
                assert tokens(output) == expected
                assert not summary(output)["reused"]
        engine.settle()
    for node in engine.catalogue.nodes():
        stored = engine.store.get(node.node_id, node.namespace)
        assert (stored.node.own, stored.node.exact_len) == (node.own, node.exact_len)


def test_a_family_that_keeps_missing_is_shut_off(engine: Shared) -> None:
    engine.serve(ids(300), 1)
    declined = []
    for i in range(12):
        output = engine.serve(edited(ids(300), 100 + 8 * i), 4, store=False)
        declined.append(summary(output)["declined"])
    assert "audited" in declined
    (family,) = engine.scheduler.reuse.calibration.report()
    assert family.shut and family.misses >= 3
    shut = declined.index("audited")
    assert set(declined[:shut]) == {None} and set(declined[shut:]) == {"audited"}
    # Whoever asks for a policy of their own gets it, and nothing is learned from them.
    own = summary(engine.serve(edited(ids(300), 50), 4, repair="window:2"))
    assert own["reused"] > 0 and "audit" not in own


def test_what_is_computed_in_full_meanwhile_is_of_that_family_too(engine: Shared) -> None:
    prompt, declined = ids(300), []
    engine.serve(prompt, 1)
    for i in range(10):
        prompt = edited(prompt, 20 + 12 * i)
        declined.append(summary(engine.serve(prompt, 4))["declined"])
    shut = declined.index("audited")
    assert shut < 8 and set(declined[shut:]) == {"audited"}


def test_who_asks_meanwhile_is_answered_at_once_and_right(
    engine: Shared, stock: Any, logits: Logits
) -> None:
    engine.serve(ids(300))
    prompt = edited(ids(300))
    first = answer(engine, prompt, 40)
    held = engine.scheduler.audits
    (audit,) = held._waiting
    most = len(audit.steps)
    step_until(engine, lambda: len(audit.steps) == most - 3)
    asked = [ids(90, 4), edited(ids(150), 30)]
    for number, each in enumerate(asked):
        engine.add(str(number), each, 8, reuse="off")
    done = step_until(engine, lambda: not engine.llm.llm_engine.has_unfinished_requests())
    assert len(audit.steps) == most - 3, "it went on though somebody asked"
    done.sort(key=lambda output: output.request_id)
    assert [tokens(o) for o in done] == [stock_tokens(stock, each, 8) for each in asked]
    engine.settle()
    assert len(logits) == 40 and results(engine) == {"missed": 1}
    served = torch.stack([each for _, each in logits])
    assert served.argmax(-1).tolist() == tokens(first)


def test_who_needs_the_blocks_gets_them(engine: Shared, stock: Any) -> None:
    engine.serve(ids(300))
    prompt = edited(ids(300))
    first = answer(engine, prompt)
    long = ids(480, 8)
    assert engine.num_free < 480 / 32
    engine.add("long", long, 8, reuse="off")
    (output,) = step_until(engine, lambda: not engine.llm.llm_engine.has_unfinished_requests())
    assert tokens(output) == stock_tokens(stock, long, 8)
    engine.settle()
    assert results(engine) == {"dropped": 1}
    # It was stored as it was served, before its blocks were given away.
    node = next(n for n in engine.catalogue.nodes() if len(n) == 316)
    assert node.exact_len == 105
    again = summary(engine.serve([*prompt, *tokens(first), *ids(20, 5)], 1, repair="none"))
    assert again["exact"] + again["reused"] == 316


def test_what_was_found_counts_though_room_was_needed_before_the_end(engine: Shared) -> None:
    engine.serve(ids(300))
    answer(engine, edited(ids(300)), 100)
    (audit,) = engine.scheduler.audits._waiting
    step_until(engine, lambda: bool(audit.result))
    assert audit.steps and not results(engine)
    assert engine.scheduler.audits.make_room()
    engine.settle()
    assert results(engine) == {"missed": 1} and engine.scheduler.counters["healed"] == 0


def test_who_decodes_is_not_preempted_for_an_audit(engine: Shared, stock: Any) -> None:
    engine.serve(ids(300))
    answer(engine, edited(ids(300)))
    prompt = ids(400, 9)
    assert 400 / 32 < engine.num_free < 500 / 32
    engine.add("long", prompt, 100, reuse="off")
    requests = engine.vllm_scheduler.requests
    preempted: set[str] = set()
    done: list[Any] = []
    while not done:
        done = engine.step()
        preempted |= {name for name, r in requests.items() if r.num_preemptions}
    assert not preempted
    engine.settle()
    assert results(engine) == {"dropped": 1}
    assert tokens(done[0])[:8] == stock_tokens(stock, prompt, 8)


def test_a_preempted_request_gets_the_blocks_back(engine: Shared) -> None:
    """Who took them ends meanwhile, and its audit would hold them while nobody asks anew."""
    engine.serve(ids(300))
    engine.add("first", edited(ids(300)), 140)
    [first] = engine.vllm_scheduler.requests.values()
    step_until(engine, lambda: first.num_output_tokens > 1)
    engine.add("second", ids(250, 9), 200, reuse="off")
    requests = engine.vllm_scheduler.requests
    second = next(r for name, r in requests.items() if name.startswith("second"))
    done = step_until(engine, lambda: not engine.llm.llm_engine.has_unfinished_requests())
    assert len(done) == 2 and second.num_preemptions
    engine.settle()
    assert results(engine) == {"dropped": 1}


def test_who_waits_for_another_needs_no_blocks_yet(engine: Shared) -> None:
    engine.serve(ids(300))
    answer(engine, edited(ids(300)))
    prompt = ids(200, 8)
    engine.add("first", prompt, 4)
    engine.add("second", edited(prompt, 100, 40), 4)
    second = list(engine.scheduler._lookups.values())[-1]
    step_until(engine, lambda: second.behind is not None)
    assert engine.num_free < second.num_blocks
    assert engine.scheduler.audits._waiting


def test_so_many_wait_and_no_more(engine: Shared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audits, "_SHARE_OF_BLOCKS", 1)
    monkeypatch.setattr(audits, "_MAX_WAITING", 2)
    engine.serve(ids(200), 1)
    for number in range(4):
        engine.add(str(number), edited(ids(200), 60 + number), 2)
    step_until(engine, lambda: len(engine.scheduler._lookups) == 0)
    assert len(engine.scheduler.audits._waiting) == 2
    engine.settle()
    assert results(engine) == {"dropped": 2, "missed": 2}
    assert len([n for n in engine.catalogue.nodes() if n.exact_len == len(n)]) == 3


def test_an_audit_that_fails_is_nobodys_request(
    engine: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(hidden: torch.Tensor) -> torch.Tensor:
        return torch.full((len(hidden), 379), np.nan)

    engine.serve(ids(300))
    with monkeypatch.context() as patch:
        patch.setattr(engine.runner._recompute, "_head", broken)
        assert len(tokens(engine.serve(edited(ids(300)), 4))) == 4
    assert results(engine) == {"failed": 1}
    assert not engine.scheduler.reuse.calibration.report()


def test_who_does_not_want_to_be_stored_is_audited_and_not_stored(engine: Shared) -> None:
    engine.serve(ids(300))
    use = summary(engine.serve(edited(ids(300)), 100, store=False))
    assert use["audit"] and results(engine) == {"missed": 1}
    assert len(engine.catalogue.nodes()) == 1
    assert engine.scheduler.counters["healed"] == 0


def test_a_node_that_went_meanwhile_stays_away(engine: Shared) -> None:
    engine.serve(ids(300))
    answer(engine, edited(ids(300)))
    (audit,) = engine.scheduler.audits._waiting
    step_until(engine, lambda: not audit.steps)
    engine.store.delete(audit.save.node.node_id)
    engine.settle()
    assert results(engine) == {"missed": 1} and engine.scheduler.counters["healed"] == 0
    assert len(engine.catalogue.nodes()) == len(engine.store.ids()) == 1


def test_a_share_is_a_share(engine: Shared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.scheduler.audits, "_share", 0.0)
    engine.serve(ids(300))
    output = engine.serve(edited(ids(300)), 4)
    assert summary(output)["reused"] > 150
    assert "audit" not in summary(output) and not results(engine)


@pytest.mark.parametrize(
    ("first", "length", "whole", "expected"),
    [
        (195, 201, True, "served 200-201, compute 195-200, compare 200-201"),
        (
            *(100, 300, True),
            "served 200-264, compute 100-164, compute 164-200, compare 200-264, compute 264-300",
        ),
        (150, 300, False, "served 200-264, compute 150-200, compare 200-264"),
    ],
)
def test_all_behind_the_edit_is_computed_once_and_in_order(
    first: int, length: int, whole: bool, expected: str
) -> None:
    found = audits._chunks(first, 200, length, whole)
    assert ", ".join(f"{what} {span.start}-{span.end}" for what, span in found) == expected


def test_a_divergence_says_where_and_whether_it_matters() -> None:
    compared = [Compared(0.0, 5, 5), Compared(0.2, 7, 8), Compared(0.1, 9, 9)]
    found = Divergence.of(compared, frozenset({8}), 0.1)
    assert found == Divergence(0.0, pytest.approx(0.1), 0.2, 1, True)
    assert not Divergence.of(compared, frozenset({8}), 0.3).fact
    assert not Divergence.of(compared, frozenset({9}), 0.1).fact


def test_from_python_too_and_what_was_learned_is_kept(model: Path, tmp_path: Path) -> None:
    own = {"enforce_eager": True, "kv_cache_memory_bytes": 1 << 26}
    options = {"audit_share": 1, "audit_budget": 1e9, "repair": "none", "store_dir": tmp_path}
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    with patience(), KVShare(str(model), engine="vllm", engine_options=own, **options) as llm:
        assert llm.wait_audited(0)
        prompt = edited(ids(300))
        llm.generate(ids(300), params)
        assert llm.generate(prompt, params).provenance.reused > 150
        assert llm.wait_audited(60)
        counted = llm.stats()["kvshare"]
        assert counted["kvshare:audits_total,missed"] == 1
        turn = [*prompt, *llm.generate(prompt, params).token_ids, *ids(20, 5)]
        use = llm.generate(turn, params).provenance
        assert use.exact >= len(prompt) and use.reused == 0
    (file,) = tmp_path.glob("calibration-*.json")
    (learned,) = read_state(file).values()
    assert [family.audits for family in learned.families.values()] == [1]
