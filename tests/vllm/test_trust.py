"""What a request inside vLLM may read of others, and what it says of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .engines import Shared, shared_engine, stock_engine, stock_tokens, summary, tokens

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def engine(random_model: Callable[[str], Path]) -> Iterator[Shared]:
    options = {"lookup_deadline_s": 30, "min_load_tokens": 8, "recompute_per_step": 32}
    with shared_engine(
        random_model("llama"), options, num_gpu_blocks_override=25, max_num_batched_tokens=512
    ) as made:
        yield made


@pytest.fixture(scope="module")
def stock(random_model: Callable[[str], Path]) -> Iterator[Any]:
    with stock_engine(random_model("llama")) as made:
        yield made


@pytest.fixture(autouse=True)
def fresh(engine: Shared) -> None:
    engine.forget()


def ids(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, 250, length).tolist()


def edited(prompt: list[int], at: int) -> list[int]:
    return [*prompt[:at], *ids(5, 1000 + at), *prompt[at + 3 :]]


def test_a_careless_request_changes_nothing_for_a_strict_one(engine: Shared, stock: Any) -> None:
    first = ids(300)
    engine.serve(first)
    second = edited(first, 40)
    assert summary(engine.serve(second, repair="none"))["reused"] > 200
    for prompt in (second, [*second, *ids(20, 5)], [*second[:150], *ids(60, 6)]):
        output = engine.serve(prompt, 12, max_divergence=0, store=False)
        assert summary(output)["reused"] == 0
        assert summary(output)["exact"] >= 40
        assert tokens(output) == stock_tokens(stock, prompt, 12)
    # Who takes what there is continues it.
    assert engine.llm.reset_prefix_cache()
    again = summary(engine.serve(second, repair="none", store=False))
    assert again["reused"] > 200 and again["declined"] is None


def test_a_request_that_repeats_an_approximate_one_is_stored_once(engine: Shared) -> None:
    first = ids(300)
    engine.serve(first)
    for _ in range(4):
        engine.serve(edited(first, 40), repair="none")
        assert engine.llm.reset_prefix_cache()
    assert len(engine.scheduler.reuse.catalogue.nodes()) == 2


def test_every_turn_of_an_agent_that_does_not_pause_begins_with_the_turn_before(
    engine: Shared,
) -> None:
    """Each request enters in the step after the answer before, when that is just being stored."""
    llm = engine.llm.llm_engine
    prompt, known = ids(40, 3), 0
    for turn in range(6):
        engine.add(f"turn {turn}", prompt, 12)
        done: list[Any] = []
        while not done:
            done = engine.step()
        assert llm is not None
        assert summary(done[0])["exact"] >= known - 8  # fewest tokens worth a load
        known = len(prompt) + 11
        prompt = [*prompt, *tokens(done[0]), *ids(7, 10 + turn)]
    engine.run()


def test_a_preempted_request_does_not_call_its_own_approximate_blocks_exact(
    engine: Shared,
) -> None:
    first = ids(380, 2)
    engine.serve(first, 1)
    preempted = set()
    for number in range(3):
        engine.add(str(number), edited(first, 50 + number), 60, repair="none")
    requests = engine.vllm_scheduler.requests
    outputs = {}
    while engine.llm.llm_engine.has_unfinished_requests():
        done = engine.step()
        preempted |= {name for name, r in requests.items() if r.num_preemptions}
        outputs.update({o.request_id: summary(o) for o in done})
    engine.settle()
    reused = {name: use for name, use in outputs.items() if use["reused"]}
    assert preempted and reused
    for name, use in reused.items():
        at = 50 + int(name.split("-")[0])
        assert use["exact"] <= at + 5 + 32, (name, use)
        total = use["exact"] + use["reused"] + use["recomputed"]
        assert total == 382


def test_what_was_restored_is_not_kept_twice(engine: Shared) -> None:
    engine.serve(ids(300))
    node = engine.scheduler.reuse.catalogue.nodes()[0]
    engine.scheduler.reuse.catalogue.remove(node.node_id)
    from kvshare_mm.reuse.orders import Report
    from kvshare_mm.vllm.meta import WorkerReport

    engine.scheduler.reported(WorkerReport(Report(restored=[node])), lambda _: None)
    assert [n.node_id for n in engine.scheduler.reuse.catalogue.nodes()] == [node.node_id]
    assert not engine.scheduler.reuse._restored


def test_what_is_known_of_donors_counts_in_a_budget(
    engine: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(4):
        engine.serve(ids(200, seed), 1)
    catalogue = engine.scheduler.reuse.catalogue
    assert len(catalogue.nodes()) == 4
    monkeypatch.setattr(engine.scheduler.reuse, "_max_bytes", catalogue.num_bytes // 2)
    engine.serve(ids(200, 9), 1)
    left = catalogue.nodes()
    assert 1 <= len(left) <= 3
    assert left[-1].align_keys[:200].tolist() == ids(200, 9)
    assert sorted(engine.runner._worker.store.ids()) == sorted(node.node_id for node in left)
