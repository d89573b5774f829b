"""Two ranks on one machine: each holds its heads' share of a donor, both load or neither does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from vllm import SamplingParams as VLLMParams

from kvshare_mm import KVShare, SamplingParams

from .engines import Shared, shared_engine, summary, tokens

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
    rng = np.random.default_rng(0)
    donor = rng.integers(3, 250, 300).tolist()
    target = [*donor[:100], 5, 6, 7, *donor[100:200], *donor[207:]]
    free = engine.num_free
    engine.serve(donor)
    params = VLLMParams(max_tokens=4, temperature=0, logprobs=20, ignore_eos=True)
    (output,) = engine.llm.generate([{"prompt_token_ids": target}], params, use_tqdm=False)
    engine.settle()
    assert engine.num_free == free
    use = summary(output)
    with KVShare(str(folder), dtype="float32", embedder=None) as native:
        ours = SamplingParams(max_tokens=4, temperature=0, logprobs=10, ignore_eos=True)
        native.generate(donor, ours)
        native.flush()
        expected = native.generate(target, ours)
    p = expected.provenance
    assert p.reused > 100
    assert (use["exact"], use["reused"]) == (p.exact, p.reused)
    assert expected.logprobs is not None
    for token, logprob in expected.logprobs[0].top:
        assert output.outputs[0].logprobs[0][token].logprob == pytest.approx(logprob, abs=2e-3)


def test_a_donor_that_one_rank_lost_is_lost_for_both(engine: Shared) -> None:
    rng = np.random.default_rng(1)
    donor = rng.integers(3, 250, 300).tolist()
    engine.serve(donor)
    (node,) = [n for n in engine.scheduler.reuse.catalogue.nodes() if n.align_keys[0] == donor[0]]
    store = engine.scheduler._options.core.store_dir
    assert store is not None
    # Rank 1 forgets it and says nothing.
    lost = engine.llm.collective_rpc(_lose, args=(node.node_id, 1))
    assert sorted(lost) == [False, True]
    target = [*donor[:100], 5, 6, 7, *donor[100:]]
    expected = tokens(engine.serve(target, reuse="off", store=False))
    assert engine.llm.reset_prefix_cache()
    output = engine.serve(target)
    assert summary(output)["reused"] == 0
    assert summary(output)["declined"] in ("evicted", "other_rank")
    assert tokens(output) == expected


def _lose(worker: object, node_id: str, rank: int) -> bool:
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    if worker.rank != rank:  # type: ignore[attr-defined]
        return False
    runner = get_kv_transfer_group()._runner
    runner._worker.store.delete(node_id)
    runner._gone.clear()
    return True
