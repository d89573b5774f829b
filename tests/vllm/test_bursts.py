"""Of similar requests that come together one is computed, the others wait for it, and no longer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from vllm.distributed.kv_transfer import get_kv_transfer_group

from kvshare_mm.config import RequestOptions
from kvshare_mm.errors import KVUnavailableError
from kvshare_mm.reuse.plan import ReusePlan
from kvshare_mm.stream import text_stream
from kvshare_mm.vllm import bursts
from kvshare_mm.vllm.lookup import Lookup
from kvshare_mm.vllm.meta import Load, Save

from .engines import Shared, edited, ids, shared_engine, summary

pytestmark = pytest.mark.vllm

TOGETHER = 6


@pytest.fixture(scope="module")
def engine(random_model: Callable[[str], Path]) -> Iterator[Shared]:
    options = {"lookup_deadline_s": 30, "min_load_tokens": 8, "repair": "none"}
    with shared_engine(
        random_model("llama"), options, num_gpu_blocks_override=150, max_num_batched_tokens=256
    ) as made:
        yield made


@pytest.fixture(autouse=True)
def fresh(engine: Shared) -> Iterator[None]:
    engine.forget()
    with engine.keeping_its_blocks():
        yield


def add(engine: Shared, number: int, length: int = 24, **knobs: Any) -> None:
    """A prompt of 400 tokens, of which some in the middle are its own."""
    engine.add(str(number), edited(ids(400), 200, 5 + number), length, **knobs)


def lookup_of(engine: Shared, number: int) -> Lookup:
    """vLLM has names of its own for requests."""
    found = [
        x for name, x in engine.scheduler._lookups.items() if name.split("-")[0] == str(number)
    ]
    return found[0]


def stepped(engine: Shared, until: Callable[[], bool]) -> dict[str, Any]:
    return {o.request_id: o for o in engine.step_until(until)}


def computed(done: dict[str, Any]) -> list[int]:
    return [summary(done[name])["recomputed"] for name in sorted(done)]


def test_one_prompt_is_computed_and_the_others_reuse_it(
    engine: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, early = engine.runner._save, []

    def saved(order: Save) -> None:
        early.append(order.held)
        save(order)

    monkeypatch.setattr(engine.runner, "_save", saved)
    for number in range(TOGETHER):
        add(engine, number)
    engine.plan()
    done = stepped(engine, lambda: bool(engine.catalogue.nodes()))
    assert not done, "one prompt is a donor, and its answer goes on"
    done = engine.run()
    *others, one = sorted(computed(done))
    assert one >= 405 and max(others) < 40
    assert early.count(True) == 1 and early.count(False) == TOGETHER
    # Its answer goes on from what was stored: nothing of the prompt is kept twice.
    rows = sorted(node.num_owned for node in engine.catalogue.nodes())
    assert rows[-1] == one and sum(rows) < one + TOGETHER * 70


def test_who_comes_while_it_is_answered_finds_it(engine: Shared) -> None:
    add(engine, 0, 60)
    [request] = engine.vllm_scheduler.requests.values()
    stepped(engine, lambda: request.num_output_tokens > 2)
    add(engine, 1)
    engine.plan()
    done = engine.run()
    assert computed(done)[1] < 40


@pytest.mark.parametrize("length", [1, 2])
def test_a_short_answer_is_over_before_it_is_wanted(engine: Shared, length: int) -> None:
    for number in range(3):
        add(engine, number, length)
    engine.plan()
    assert sum(found < 40 for found in computed(engine.run())) == 2


def test_nobody_waits_for_what_will_be_no_donor(engine: Shared) -> None:
    add(engine, 0, store=False)
    add(engine, 1, reuse="off")
    add(engine, 2, reuse="exact")
    engine.add("3", ids(300, 9), 4)
    lookups = dict(engine.scheduler._lookups)
    assert len(engine.run()) == 4
    assert not any(lookup.wanted or lookup.behind for lookup in lookups.values())


def test_nobody_waits_for_more_of_what_may_not_be_kept(engine: Shared) -> None:
    engine.serve(ids(400))
    add(engine, 0, 60)
    [request] = engine.vllm_scheduler.requests.values()
    stepped(engine, lambda: request.num_output_tokens > 2)
    add(engine, 1, repair="window:400")
    engine.plan()
    first, second = lookup_of(engine, 0), lookup_of(engine, 1)
    stepped(engine, lambda: second.has_waited)
    assert second.behind is None and not first.wanted
    assert computed(engine.run())[1] > 200


def test_who_waits_in_vain_is_computed(engine: Shared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.runner, "_read", lambda save: 1 / 0)
    for number in range(3):
        add(engine, number)
    done = engine.run()
    assert len(done) == 3 and not any(summary(output)["reused"] for output in done.values())
    assert not engine.catalogue.nodes()


def test_one_that_is_cancelled_holds_nobody_up(engine: Shared) -> None:
    for number in range(3):
        add(engine, number)
    engine.plan()
    held = lookup_of(engine, 1)
    stepped(engine, lambda: held.behind is not None)
    engine.llm.llm_engine.abort_request(["0"])
    assert len(engine.run()) == 2


def test_nobody_waits_longer_than_for_two_prompts_like_its_own(
    engine: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    bursts = engine.scheduler._bursts
    monkeypatch.setattr(bursts, "stored", lambda scheduled, *_: _only_counted(bursts, scheduled))
    add(engine, 0, 64)
    add(engine, 1)
    for seed in range(4):
        engine.add(f"other {seed}", ids(400, 20 + seed), 2)
    engine.plan()
    lookup = lookup_of(engine, 1)
    stepped(engine, lambda: lookup.behind is not None)
    done = stepped(engine, lambda: lookup.behind is None)
    assert bursts._computed - lookup.held_at >= 2 * 406
    assert "0" not in done
    engine.run()


def _only_counted(bursts: Any, scheduled: dict[str, int]) -> None:
    bursts._computed += sum(scheduled.values())


def test_what_was_stored_as_approximate_is_not_called_exact_later(
    engine: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its load is approximate, then it is preempted, its donor is gone, and it is computed."""
    engine.serve(ids(400))
    add(engine, 0)
    [request] = engine.vllm_scheduler.requests.values()
    lookup = lookup_of(engine, 0)
    lookup.wanted = True
    stepped(engine, lambda: request.num_output_tokens > 2)
    early = engine.catalogue.tree[lookup.early or ""]
    assert early.exact_len < len(early)

    def gone(load: Load) -> None:
        raise KVUnavailableError("evicted", load.request_id)

    monkeypatch.setattr(engine.runner, "_placed", gone)
    assert engine.vllm_scheduler.reset_prefix_cache(reset_running_requests=True)
    (output,) = engine.run().values()
    assert summary(output)["recomputed"] == 405
    [node] = [node for node in engine.catalogue.nodes() if len(node) > 405]
    assert node.exact_len == len(node) == node.num_owned


def test_nothing_is_kept_waiting_where_a_worker_takes_no_part(
    engine: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    connector = get_kv_transfer_group()
    monkeypatch.setattr(connector, "_runner", None)
    monkeypatch.setattr(connector, "_obstacle", "it cannot")
    monkeypatch.setattr(engine.scheduler, "obstacle", None)
    monkeypatch.setattr(engine.scheduler._bursts, "_ended", False)
    for number in range(3):
        add(engine, number)
    done = stepped(engine, lambda: not engine.scheduler._lookups)
    assert len(done) == 3 and engine.scheduler.obstacle == "it cannot"
    engine.step()
    assert not engine.scheduler.busy


def test_plans_that_nobody_has_asked_for_yet_hold_nobody_up() -> None:
    """They may stand in the queue behind one that gets no blocks."""
    pending: Future[ReusePlan] = Future()
    lookups = {str(i): Lookup("", RequestOptions(), 1, future=pending) for i in range(20)}
    held = Lookup("", RequestOptions(), 1, stream=text_stream(ids(100)), behind="gone")
    known = bursts.Bursts(lookups, Mock(saving=Mock(return_value=[])))
    assert known.waits(held)
    pending.set_result(ReusePlan(100))
    assert not known.waits(held)


def test_those_that_waited_are_not_all_looked_up_at_once(
    engine: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bursts, "_AT_ONCE", 1)
    for number in range(TOGETHER):
        add(engine, number)
    engine.plan()
    lookups = list(engine.scheduler._lookups.values())
    look, beside = engine.scheduler._look, []

    def looked(lookup: Lookup) -> None:
        beside.append(sum(x.is_planned for x in lookups))
        look(lookup)

    monkeypatch.setattr(engine.scheduler, "_look", looked)
    stepped(engine, lambda: sum(x.behind is not None for x in lookups) == TOGETHER - 1)
    done = stepped(engine, lambda: not any(x.behind for x in lookups))
    done.update(engine.run())
    assert beside == [0] * (TOGETHER - 1)
    assert sum(found < 40 for found in computed(done)) == TOGETHER - 1
