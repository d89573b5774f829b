"""The real engine over a small random model: exact is stock vLLM's, what is not is apart."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvshare_mm.errors import KVUnavailableError

from .engines import Shared, shared_engine, stock_engine, stock_tokens, summary, tokens

pytestmark = pytest.mark.vllm

BLOCK = 32
# One long request and a little more: several at once must preempt each other.
NUM_BLOCKS = 25


@pytest.fixture(scope="module")
def engine(random_model: Callable[[str], Path]) -> Iterator[Shared]:
    options = {"lookup_deadline_s": 30, "min_load_tokens": 8, "recompute_per_step": 32}
    with shared_engine(
        random_model("llama"),
        options,
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
    free = engine.num_free
    yield
    engine.settle()
    assert engine.num_free == free, "blocks leaked"
    assert not engine.scheduler._lookups and not engine.scheduler.reuse._saving


def ids(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, 250, length).tolist()


def edited(prompt: list[int], at: int, new: int = 5) -> list[int]:
    """`prompt` with `new` other tokens put in at `at`."""
    return [*prompt[:at], *ids(new, 1000 + at), *prompt[at:]]


def test_reuse_off_is_stock_vllm(engine: Shared, stock: Any) -> None:
    prompt = ids(200)
    output = engine.serve(prompt, 8, reuse="off")
    assert tokens(output) == stock_tokens(stock, prompt, 8)
    assert summary(output) == {
        "exact": 0,
        "reused": 0,
        "recomputed": 200,
        "gaps": 0,
        "donors": [],
        "declined": "reuse_off",
        "fallback": None,
    }


def test_a_similar_request_reuses(engine: Shared) -> None:
    first = ids(300)
    assert summary(engine.serve(first))["declined"] == "no_donor"
    second = edited(first, 100)
    use = summary(engine.serve(second))
    assert use["exact"] == 100
    assert use["reused"] > 150
    assert use["gaps"] >= 5
    assert use["exact"] + use["reused"] + use["recomputed"] == len(second)
    assert len(use["donors"]) == 1 and use["declined"] is None


def test_vllm_counts_what_is_really_reused(engine: Shared) -> None:
    first = ids(300)
    engine.serve(first)
    output = engine.serve(edited(first, 100))
    use = summary(output)
    assert output.num_cached_tokens == use["exact"] + use["reused"]


def test_an_exact_donor_gives_stock_tokens(engine: Shared, stock: Any) -> None:
    prompt = ids(230)
    engine.serve(prompt)
    assert engine.llm.reset_prefix_cache()
    longer = [*prompt, *ids(40, 7)]
    output = engine.serve(longer, 12, reuse="exact")
    assert summary(output)["exact"] == 230  # not a multiple of the block size
    assert summary(output)["reused"] == 0
    assert tokens(output) == stock_tokens(stock, longer, 12)
    # Exact blocks are for everybody.
    assert summary(engine.serve(longer, reuse="off"))["exact"] == 256


def test_a_plan_that_repairs_everything_gives_stock_tokens(engine: Shared, stock: Any) -> None:
    first = ids(300)
    engine.serve(first)
    second = edited(first, 100)
    output = engine.serve(second, 12, repair="window:100000")
    assert summary(output)["reused"] == 0
    assert summary(output)["declined"] == "divergence"
    assert tokens(output) == stock_tokens(stock, second, 12)


def test_exact_requests_never_hit_approximate_blocks(engine: Shared, stock: Any) -> None:
    first = ids(300)
    engine.serve(first)
    second = edited(first, 100)
    approximate = engine.serve(second, 40)
    assert summary(approximate)["reused"] > 150
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


def test_a_cancelled_load_gives_its_blocks_back(engine: Shared) -> None:
    first = ids(400)
    engine.serve(first)
    free = engine.num_free
    # More to compute than one step's budget.
    second = edited(edited(first, 300, 40), 100, 40)
    engine.add("two", second)
    loading = engine.scheduler._lookups
    for _ in range(1000):
        engine.step()
        if "two" in str(loading) and any(x.loading for x in loading.values()):
            break
    assert any(x.loading for x in loading.values())
    assert engine.num_free < free
    engine.llm.llm_engine.abort_request(["two"])
    engine.settle()
    assert engine.num_free == free


@pytest.mark.parametrize("reason", ["corrupt", "evicted", "io_error"])
def test_a_donor_lost_before_its_load(
    engine: Shared, stock: Any, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    first = ids(300)
    engine.serve(first)
    second = edited(first, 100)

    def lost(*_: Any) -> Any:
        raise KVUnavailableError(reason, "gone")

    monkeypatch.setattr(engine.runner._worker.store, "get", lost)
    output = engine.serve(second, 12)
    use = summary(output)
    assert (use["declined"], use["reused"], use["exact"]) == (reason, 0, 96)
    assert tokens(output) == stock_tokens(stock, second, 12)
    # It is exact after all, and found as such.
    monkeypatch.undo()
    assert summary(engine.serve(second, reuse="off"))["exact"] == 288


def test_a_donor_evicted_between_plan_and_load(engine: Shared, stock: Any) -> None:
    first = ids(300)
    engine.serve(first)
    for node in engine.scheduler.reuse.catalogue.nodes():
        engine.runner._worker.store.delete(node.node_id)  # the scheduler does not know yet
    second = edited(first, 100)
    output = engine.serve(second, 12)
    assert summary(output)["reused"] == 0
    assert tokens(output) == stock_tokens(stock, second, 12)
    assert summary(output)["declined"] in ("evicted", "no_donor")
    assert len(engine.scheduler.reuse.catalogue.nodes()) == 1  # the new one


def test_a_late_lookup_is_done_without(
    engine: Shared, stock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = ids(300)
    engine.serve(first)
    options = engine.scheduler._options.model_copy(update={"lookup_deadline_s": 0.05})
    monkeypatch.setattr(engine.scheduler, "_options", options)
    release = threading.Event()
    find = engine.scheduler.reuse.catalogue.find

    def slow(*args: Any) -> Any:
        release.wait(60)
        return find(*args)

    monkeypatch.setattr(engine.scheduler.reuse.catalogue, "find", slow)
    second = edited(first, 100)
    output = engine.serve(second, 8)
    release.set()
    assert summary(output)["declined"] == "lookup_late"
    assert tokens(output) == stock_tokens(stock, second, 8)


def test_a_lookup_that_fails_is_a_miss(
    engine: Shared, stock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("index on fire")

    monkeypatch.setattr(engine.scheduler.reuse.catalogue, "find", fail)
    prompt = ids(100, 4)
    output = engine.serve(prompt, 8)
    assert summary(output)["declined"] == "lookup_error"
    assert tokens(output) == stock_tokens(stock, prompt, 8)


def test_wrong_knobs_are_told(engine: Shared) -> None:
    for wrong in {"reuse": "perhaps"}, {"sharing": "off", "store": False}:
        assert summary(engine.serve(ids(100), **wrong))["declined"] == "invalid_options"
        assert not engine.scheduler.reuse.catalogue.nodes(), "it may have asked not to be stored"


def test_a_request_that_is_not_to_be_stored(engine: Shared) -> None:
    engine.serve(ids(100), store=False)
    assert not engine.scheduler.reuse.catalogue.nodes()


def test_salts_are_apart(engine: Shared) -> None:
    first = ids(300)
    engine.serve(first)
    params = {"prompt_token_ids": edited(first, 100), "cache_salt": "other"}
    (output,) = engine.llm.generate([params], use_tqdm=False)
    engine.settle()
    assert summary(output)["declined"] == "no_donor"


BASES = [ids(length, 50 + length) for length in (150, 260, 330)]


@st.composite
def bursts(draw: st.DrawFn) -> list[tuple[list[int], int, str, int]]:
    """Prompts that resemble each other, with how they share, and steps between arrivals."""
    made = []
    for _ in range(draw(st.integers(2, 6))):
        prompt = draw(st.sampled_from(BASES))
        for _ in range(draw(st.integers(0, 2))):
            prompt = edited(prompt, draw(st.integers(0, len(prompt))), draw(st.integers(1, 9)))
        prompt = prompt[draw(st.integers(0, 20)) :]
        reuse = draw(st.sampled_from(["similar", "similar", "exact", "off"]))
        made.append((prompt, draw(st.integers(1, 40)), reuse, draw(st.integers(0, 4))))
    return made


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(burst=bursts())
def test_no_pollution(
    engine: Shared, stock: Any, burst: list[tuple[list[int], int, str, int]]
) -> None:
    """Whatever came before, a prompt with reuse off gets stock vLLM's tokens."""
    free = engine.num_free
    done: dict[str, Any] = {}
    for number, (prompt, length, reuse, steps) in enumerate(burst):
        engine.add(str(number), prompt, length, reuse=reuse, repair="none")
        for _ in range(steps):
            done.update({o.request_id: o for o in engine.step()})
    done.update(engine.run())
    assert len(done) == len(burst)
    assert engine.num_free == free
    for number, (prompt, length, reuse, _) in enumerate(burst):
        expected = stock_tokens(stock, prompt, length)
        if reuse != "similar":
            assert tokens(done[str(number)]) == expected
        answered = [*prompt, *tokens(done[str(number)])]
        for again in (prompt, answered):
            replay = engine.serve(again, 4, reuse="off")
            assert tokens(replay) == stock_tokens(stock, again, 4)
    assert engine.num_free == free


def test_the_burst_does_preempt_and_reuse(engine: Shared) -> None:
    """Else the property above would prove little."""
    engine.serve(BASES[2], 1)
    preempted = 0
    requests = engine.vllm_scheduler.requests
    for number in range(3):
        engine.add(str(number), edited(BASES[2], 50 + number), 60)
    reused = 0
    while engine.llm.llm_engine.has_unfinished_requests():
        done = engine.step()
        preempted += sum(r.num_preemptions for r in requests.values())
        reused += sum(summary(o)["reused"] for o in done)
    assert preempted and reused
