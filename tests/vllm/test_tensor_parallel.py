"""Two ranks on one machine: each holds its heads' share of a donor, both load or neither does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvshare_mm import KVShare
from kvshare_mm.reuse.calibration import Calibration
from kvshare_mm.vllm.audits import Audits

from .. import media_models
from .engines import Shared, as_native, edited, ids, shared_engine, summary, tokens
from .test_media_native import REPAIR, SEEN

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def folder(random_model: Callable[[str], Path]) -> Path:
    return random_model("qwen2")


@pytest.fixture(scope="module")
def engine(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    options = {
        "lookup_deadline_s": 30,
        "min_load_tokens": 1,
        "store_dir": tmp_path_factory.mktemp("store"),
    }
    with shared_engine(folder, options, tensor_parallel_size=2) as made:
        yield made


def test_two_ranks_reuse_as_one_does(engine: Shared, folder: Path) -> None:
    donor = ids(300)
    target = edited(edited(donor, 200, 0, left_out=7), 100, 3)
    with (
        engine.keeping_its_blocks(),
        KVShare(str(folder), dtype="float32", embedder=None) as native,
    ):
        expected = as_native(engine, native, donor, target)
    assert expected.provenance.reused > 100


def test_two_ranks_keep_pictures_as_one_does(tmp_path: Path) -> None:
    media_models.build("qwen2_vl", tmp_path, for_vllm=True)
    options = {"lookup_deadline_s": 30, "min_load_tokens": 1}
    with (
        KVShare(str(tmp_path), dtype="float32", embedder=None) as native,
        shared_engine(tmp_path, options, tensor_parallel_size=2, max_model_len=1024) as shared,
    ):
        expected = as_native(shared, native, *SEEN["two moved"], str(tmp_path), repair=REPAIR)
    assert [m.source for m in expected.provenance.media] == ["kv", "kv"]


def test_a_donor_that_one_rank_lost_is_lost_for_both(engine: Shared) -> None:
    donor = ids(300, 1)
    engine.serve(donor)
    (node,) = [n for n in engine.catalogue.nodes() if n.align_keys[0] == donor[0]]
    # Rank 1 forgets it and says nothing.
    lost = engine.llm.collective_rpc(_lose, args=(node.node_id, 1))
    assert sorted(lost) == [False, True]
    expected = tokens(engine.serve(edited(donor), reuse="off", store=False))
    assert engine.llm.reset_prefix_cache()
    output = engine.serve(edited(donor))
    assert summary(output)["reused"] == 0
    assert summary(output)["declined"] in ("evicted", "other_rank")
    assert tokens(output) == expected


def test_an_audit_is_computed_and_healed_on_both(
    engine: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.settle()
    scheduler = engine.scheduler
    calibration = Calibration(scheduler.counters)
    times: dict[str, list[float]] = {}
    now = scheduler._threads.submit
    audits = Audits(scheduler.reuse, calibration, 1, 1e9, times, now, scheduler.tokenizer)
    audits.pool = engine.vllm_scheduler.kv_cache_manager.block_pool
    monkeypatch.setattr(scheduler, "audits", audits)
    monkeypatch.setattr(scheduler.reuse, "calibration", calibration)
    donor = ids(300, 2)
    with engine.keeping_its_blocks():
        engine.serve(donor)
        prompt = edited(donor)
        output = engine.serve(prompt, 12, max_divergence=1)
        assert summary(output)["audit"] and len(times["divergence"]) == 1
    (report,) = calibration.report()
    assert report.audits == 1
    node = next(n for n in engine.catalogue.nodes() if len(n) == 316)
    assert node.exact_len == 316
    held = engine.llm.collective_rpc(_holds, args=(node.node_id, node.namespace))
    assert held == [(316, node.num_owned)] * 2


def _holds(worker: object, node_id: str, ns: str) -> tuple[int, int]:
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    stored = get_kv_transfer_group()._runner._worker.store.get(node_id, ns)
    return stored.node.exact_len, stored.kv.k.shape[2]


def _lose(worker: object, node_id: str, rank: int) -> bool:
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    if worker.rank != rank:  # type: ignore[attr-defined]
        return False
    runner = get_kv_transfer_group()._runner
    runner._worker.store.delete(node_id)
    runner._gone.clear()
    return True


def test_a_prompt_is_stored_on_both_while_it_is_answered(engine: Shared) -> None:
    engine.settle()
    prompt = ids(400, 3)
    with engine.keeping_its_blocks():
        for number in range(3):
            engine.add(str(number), edited(prompt, 200, 5 + number), 24, repair="none")
        engine.plan()
        lookups = list(engine.scheduler._lookups.values())
        done = engine.run()
    assert sum(bool(lookup.early) for lookup in lookups) == 1
    assert sum(summary(output)["recomputed"] < 40 for output in done.values()) == 2
