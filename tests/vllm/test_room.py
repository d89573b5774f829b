"""Donors in little room, without Milvus, and what is counted of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prometheus_client import REGISTRY

from .engines import Shared, edited, ids, shared_engine, summary

pytestmark = pytest.mark.vllm

BASE = {"lookup_deadline_s": 30, "min_load_tokens": 8, "host_bytes": 1 << 20}
NOBODY = "http://127.0.0.1:9"


def counted(name: str, **labels: str) -> float:
    """A counter of this process, over all its engines so far."""
    return sum(
        sample.value
        for family in REGISTRY.collect()
        for sample in family.samples
        if sample.name == f"{name}_total" and labels.items() <= sample.labels.items()
    )


@pytest.fixture(scope="module")
def small(random_model: Callable[[str], Path]) -> Iterator[Shared]:
    """Room for two donors in RAM, no disk, and a Milvus that is not there."""
    options = {**BASE, "embedder": "all-MiniLM-L6-v2", "index_uri": NOBODY}
    with shared_engine(random_model("llama"), options, disable_log_stats=False) as made:
        yield made


def test_a_full_host_tier_forgets_the_oldest(small: Shared) -> None:
    prompts = [ids(300, seed) for seed in range(5)]
    before = counted("kvshare:donor_events", event="forgotten")
    with small.keeping_its_blocks():
        for prompt in prompts:
            small.serve(prompt)
        assert 1 <= len(small.catalogue.nodes()) <= 2
        assert counted("kvshare:donor_events", event="forgotten") - before >= 3
        assert summary(small.serve(edited(prompts[-1])))["reused"] > 100
        assert small.llm.reset_prefix_cache()
        assert summary(small.serve(edited(prompts[0])))["reused"] == 0


def test_without_milvus_words_still_find_donors(small: Shared) -> None:
    first = ids(300, 20)
    small.serve(first)
    use = summary(small.serve(edited(first)))
    assert use["reused"] > 100
    assert small.scheduler.reuse.semantic is not None
    small.scheduler.reuse.semantic.flush(60)
    small.serve(ids(40, 21))  # so that what was counted is told
    assert counted("kvshare:donor_events", event="dense_open_failed") >= 1


def test_metrics_tell_exact_reused_and_recomputed_apart(small: Shared) -> None:
    kinds = ("exact", "reused", "recomputed")
    before = {k: counted("kvshare:prompt_tokens", source=k) for k in kinds}
    first = ids(300, 30)
    uses = [summary(small.serve(p)) for p in (first, edited(first), first)]
    small.serve(ids(20, 31), store=False)
    uses.append({"exact": 0, "reused": 0, "recomputed": 20})
    for kind in kinds:
        told_so = sum(use[kind] for use in uses)
        assert counted("kvshare:prompt_tokens", source=kind) - before[kind] == told_so
    assert all(sum(use[k] for use in uses) for k in kinds)
