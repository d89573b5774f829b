"""KV in float8: what holds with any KV, and what is rounded once more."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from . import test_engine as any_kv
from .engines import Shared, edited, ids, shared_engine, stock_engine, summary

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def engine(random_model: Callable[[str], Path]) -> Iterator[Shared]:
    with shared_engine(
        random_model("llama"),
        any_kv.OPTIONS,
        kv_cache_dtype="fp8",
        num_gpu_blocks_override=any_kv.NUM_BLOCKS,
        max_num_batched_tokens=512,
    ) as made:
        yield made


@pytest.fixture(scope="module")
def stock(random_model: Callable[[str], Path]) -> Iterator[Any]:
    with stock_engine(random_model("llama"), kv_cache_dtype="fp8") as made:
        yield made


fresh = any_kv.fresh

test_an_exact_donor_gives_stock_tokens = any_kv.test_an_exact_donor_gives_stock_tokens
test_exact_requests_never_hit_approximate_blocks = (
    any_kv.test_exact_requests_never_hit_approximate_blocks
)
test_no_pollution = any_kv.test_no_pollution
test_a_cancelled_load_gives_its_blocks_back = any_kv.test_a_cancelled_load_gives_its_blocks_back


def test_what_moves_is_rounded_once_and_what_stays_is_the_same_bytes(
    engine: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = ids(300)
    engine.serve(first)
    assert engine.llm.reset_prefix_cache()
    (node_id,) = engine.store.ids()
    donor = engine.store.get(node_id, engine.catalogue.nodes()[0].namespace).kv
    pages, written = engine.runner._pages, []
    write = pages.write

    def seen(layer: Any, k: Any, v: Any, slots: Any) -> None:
        write(layer, k, v, slots)
        written.append((layer, k.clone(), v.clone(), slots))

    monkeypatch.setattr(pages, "write", seen)
    use = summary(engine.serve(edited(first), 1, repair="none"))
    assert (use["exact"], use["reused"]) == (100, 199)
    angles = 10000.0 ** -(torch.arange(0, 32, 2).double() / 32) * 5  # five tokens further
    for of_layer, (layer, k, v, slots) in enumerate(written):
        was_k, was_v = (x[of_layer].transpose(0, 1) for x in (donor.k, donor.v))
        assert torch.equal(v.view(torch.uint8), was_v[:299].contiguous().view(torch.uint8))
        assert torch.equal(k[:100].view(torch.uint8), was_k[:100].contiguous().view(torch.uint8))
        a, b = was_k[100:299].double().chunk(2, -1)
        cos, sin = angles.cos(), angles.sin()
        want = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
        step = torch.maximum(want.abs() / 16, torch.tensor(2.0**-10))  # half of float8's
        assert ((k[100:].double() - want).abs() <= step * (1 + 1e-4)).all()
        assert len(slots) == 299 and layer.kv_cache.dtype == torch.uint8


def test_what_the_end_looks_at_is_told(engine: Shared) -> None:
    engine.serve(ids(60))
    (node,) = engine.catalogue.nodes()
    assert node.attention.shape == (60,) and node.attention.sum() == pytest.approx(1, abs=1e-3)
