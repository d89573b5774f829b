"""The real engine over a small random model: exact is stock vLLM's, what is not is apart."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from hypothesis import HealthCheck, given, settings

from kvshare_mm.errors import KVUnavailableError
from kvshare_mm.reuse.orders import Report
from kvshare_mm.vllm import compat, worker_side
from kvshare_mm.vllm.meta import Orders, Save, WorkerReport

from .bursts import Burst, bursts
from .engines import (
    Shared,
    edited,
    ids,
    shared_engine,
    stock_engine,
    stock_tokens,
    summary,
    tokens,
)

pytestmark = pytest.mark.vllm

BLOCK = 32
# One long request and a little more: several at once must preempt each other.
NUM_BLOCKS = 25
OPTIONS = {
    "lookup_deadline_s": 30,
    "min_load_tokens": 8,
    "recompute_per_step": 32,
    "audit_share": 0,
}


@pytest.fixture(scope="module")
def engine(random_model: Callable[[str], Path]) -> Iterator[Shared]:
    with shared_engine(
        random_model("llama"),
        OPTIONS,
        num_gpu_blocks_override=NUM_BLOCKS,
        max_num_batched_tokens=512,
    ) as made:
        yield made


@pytest.fixture(scope="module")
def stock(random_model: Callable[[str], Path]) -> Iterator[Any]:
    with stock_engine(random_model("llama")) as made:
        yield made


@pytest.fixture(autouse=True)
def fresh(engine: Shared) -> Iterator[None]:
    engine.forget()
    with engine.keeping_its_blocks():
        yield


@pytest.mark.parametrize("staged", [1, 16 << 20])
def test_an_exact_donor_gives_stock_tokens(
    engine: Shared, stock: Any, staged: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(worker_side._STAGED_BYTES, "cpu", staged)
    prompt = ids(230)
    engine.serve(prompt)
    assert engine.llm.reset_prefix_cache()
    longer = [*prompt, *ids(40, 7)]
    output = engine.serve(longer, 12, reuse="exact")
    assert summary(output)["exact"] == 230  # not a multiple of the block size
    assert summary(output)["reused"] == 0
    assert tokens(output) == stock_tokens(stock, longer, 12)


def test_exact_blocks_are_for_everybody(engine: Shared) -> None:
    prompt = ids(230)
    engine.serve(prompt)
    assert engine.llm.reset_prefix_cache()
    longer = [*prompt, *ids(40, 7)]
    assert summary(engine.serve(longer, 12, reuse="exact"))["exact"] == 230
    assert summary(engine.serve(longer, reuse="off"))["exact"] == 256


def test_exact_requests_never_hit_approximate_blocks(engine: Shared, stock: Any) -> None:
    first = ids(300)
    engine.serve(first)
    second = edited(first)
    approximate = engine.serve(second, 40)
    use = summary(approximate)
    assert use["reused"] > 150 and use["gaps"] >= 5
    assert engine.scheduler.audits is None and "audit" not in use, "nobody asked for audits"
    assert approximate.num_cached_tokens == use["exact"] + use["reused"]
    whole = [*second, *tokens(approximate)]
    # All of its blocks are still in the cache; only those before the edit may be found.
    replay = engine.serve(whole, 8, reuse="off")
    assert summary(replay)["exact"] == 100 // BLOCK * BLOCK
    assert tokens(replay) == stock_tokens(stock, whole, 8)


def test_a_short_prompt_is_apart_when_its_answer_fills_the_block(
    engine: Shared, stock: Any
) -> None:
    first = ids(60)
    engine.serve(first)
    second = [*first[:5], *ids(2, 3), *first[5:30]]  # less than two blocks
    output = engine.serve(second, 70, repair="none")
    assert summary(output)["reused"] > 0
    replay = engine.serve([*second, *tokens(output)], 4, reuse="off")
    assert summary(replay)["exact"] == 0


def test_what_a_failed_load_computes_is_exact_and_found_as_such(
    engine: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.serve(ids(300))
    with monkeypatch.context() as patch:
        patch.setattr(engine.store, "get", Mock(side_effect=KVUnavailableError("corrupt", "gone")))
        use = summary(engine.serve(edited(ids(300)), 12))
    assert (use["declined"], use["reused"], use["exact"]) == ("corrupt", 0, 96)
    assert summary(engine.serve(edited(ids(300)), reuse="off"))["exact"] == 288


@pytest.mark.parametrize("together", [1, 2])
def test_no_step_forward_or_copy_is_wasted_on_loads(
    engine: Shared, monkeypatch: pytest.MonkeyPatch, together: int
) -> None:
    engine.serve(ids(300))
    staged = [0]
    write = engine.runner._worker.write

    def count(placement: Any, k: Any, v: Any, first: int) -> None:
        staged[0] += k.nbytes + v.nbytes
        write(placement, k, v, first)

    monkeypatch.setattr(engine.runner._worker, "write", count)
    gaps = [5 + i for i in range(together)]
    for new in gaps:
        engine.add(str(new), edited(ids(300), new=new), 1, repair="none")
    for lookup in engine.scheduler._lookups.values():
        lookup.future.result()  # its wait is no step's
    forwards: list[int] = []

    def counted(model: Any, args: Any, kwargs: Any) -> None:
        forwards.append(len(kwargs["input_ids"]))

    done: list[Any] = []
    steps = 0
    with compat.model().register_forward_pre_hook(counted, with_kwargs=True):
        while len(done) < together:
            done += engine.step()
            steps += 1
    done.sort(key=lambda output: len(output.prompt_token_ids))
    for new, output in zip(gaps, done, strict=True):
        use = summary(output)
        assert (use["exact"], use["gaps"], use["recomputed"]) == (100, new, new + 1)
    # The loads, then what is behind them: vLLM computes it, there is no other way to its sampler.
    assert steps == 2 and forwards == [sum(gaps), together]
    layer = next(iter(engine.runner._layers.values())).kv_cache
    _, heads, _, both = layer.shape
    kept = 4 + 200 - 1  # behind three blocks of vLLM's own cache
    size = kept * len(engine.runner._layers) * heads * both * layer.itemsize
    assert staged == [size * together]


def test_who_ends_together_is_saved_one_a_step(
    engine: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each save is a forward, which those that decode wait for."""
    saves = [0]
    step, save = engine.runner.step, engine.runner._save

    def stepped(orders: Orders) -> None:
        saves.append(0)
        step(orders)

    def saved(order: Save) -> None:
        saves[-1] += 1
        save(order)

    monkeypatch.setattr(engine.runner, "step", stepped)
    monkeypatch.setattr(engine.runner, "_save", saved)
    for seed in range(3):
        engine.add(str(seed), ids(60, seed), 2)
    engine.run()
    assert sum(saves) == 3 and max(saves) == 1
    assert len(engine.catalogue.nodes()) == 3


def test_a_cancelled_load_gives_its_blocks_back(engine: Shared) -> None:
    engine.serve(ids(400))
    # More to compute than one step's budget.
    with engine.keeping_its_blocks():
        free = engine.num_free
        engine.add("two", edited(edited(ids(400), 300, 40), 100, 40))
        engine.step_until(lambda: any(x.loading for x in engine.scheduler._lookups.values()))
        assert engine.num_free < free
        engine.llm.llm_engine.abort_request(["two"])


def test_a_late_lookup_is_done_without(
    engine: Shared, stock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.serve(ids(300))
    options = engine.scheduler._options.model_copy(update={"lookup_deadline_s": 0.05})
    monkeypatch.setattr(engine.scheduler, "_options", options)
    release = threading.Event()
    monkeypatch.setattr(engine.catalogue, "find", lambda *_: release.wait(60))
    output = engine.serve(edited(ids(300)), 8)
    release.set()
    assert summary(output)["declined"] == "lookup_late"
    assert tokens(output) == stock_tokens(stock, edited(ids(300)), 8)


def test_wrong_knobs_are_told(engine: Shared) -> None:
    for wrong in {"reuse": "perhaps"}, {"sharing": "off", "store": False}:
        assert summary(engine.serve(ids(100), **wrong))["declined"] == "invalid_options"
        assert not engine.catalogue.nodes(), "it may have asked not to be stored"


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(burst=bursts())
def test_no_pollution(engine: Shared, stock: Any, burst: Burst) -> None:
    """Whatever came before, a prompt with reuse off gets stock vLLM's tokens."""
    done: dict[str, Any] = {}
    with engine.keeping_its_blocks():
        for number, (prompt, length, reuse, steps) in enumerate(burst):
            engine.add(str(number), prompt, length, reuse=reuse, repair="none")
            for _ in range(steps):
                done.update({o.request_id: o for o in engine.step()})
        done.update(engine.run())
    assert len(done) == len(burst)
    for number, (prompt, length, reuse, _) in enumerate(burst):
        expected = stock_tokens(stock, prompt, length)
        if reuse != "similar":
            assert tokens(done[str(number)]) == expected
        answered = [*prompt, *tokens(done[str(number)])]
        for again in (prompt, answered):
            replay = engine.serve(again, 4, reuse="off")
            assert tokens(replay) == stock_tokens(stock, again, 4)


def test_every_turn_of_an_agent_that_does_not_pause_begins_with_the_turn_before(
    engine: Shared,
) -> None:
    """Each request enters in the step after the answer before, when that is just being stored."""
    prompt, known = ids(40, 3), 0
    for turn in range(6):
        engine.add(f"turn {turn}", prompt, 12)
        done: list[Any] = []
        while not done:
            done = engine.step()
        assert summary(done[0])["exact"] >= known - 8  # fewest tokens worth a load
        known = len(prompt) + 11
        prompt = [*prompt, *tokens(done[0]), *ids(7, 10 + turn)]
    engine.run()


def test_a_preempted_request_does_not_call_its_own_approximate_blocks_exact(
    engine: Shared,
) -> None:
    """That requests are preempted and reuse is what makes the property above prove much."""
    first = ids(380, 2)
    engine.serve(first, 1)
    preempted = set()
    for number in range(3):
        engine.add(str(number), edited(first, 50 + number, left_out=3), 60, repair="none")
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
    (node,) = engine.catalogue.nodes()
    engine.catalogue.remove(node.node_id)
    engine.scheduler.reported(WorkerReport(Report(restored=[node])), lambda _: None)
    assert [n.node_id for n in engine.catalogue.nodes()] == [node.node_id]
    assert not engine.scheduler.reuse._restored


def test_what_is_known_of_donors_counts_in_a_budget(
    engine: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(4):
        engine.serve(ids(200, seed), 1)
    assert len(engine.catalogue.nodes()) == 4
    most = engine.catalogue.num_bytes // 2
    monkeypatch.setattr(engine.scheduler.reuse, "_max_bytes", most)
    engine.serve(ids(200, 9), 1)
    left = engine.catalogue.nodes()
    assert 1 <= len(left) <= 3
    assert left[-1].align_keys[:200].tolist() == ids(200, 9)
    assert sorted(engine.store.ids()) == sorted(node.node_id for node in left)
