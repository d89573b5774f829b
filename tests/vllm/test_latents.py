"""Multi-head latent attention: what holds with any KV holds with latents.

vLLM has no prefix caching for them on CPUs: whatever is reused here comes from stored donors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from . import test_engine as any_kv
from .engines import Shared, edited, ids, shared_engine, stock_engine, summary

pytestmark = pytest.mark.vllm

# What vLLM takes for latents on CPUs.
BLOCK = 16


@pytest.fixture(scope="module")
def engine(random_model: Callable[[str], Path]) -> Iterator[Shared]:
    blocks = any_kv.NUM_BLOCKS * any_kv.BLOCK // BLOCK
    with shared_engine(
        random_model("deepseek_v2"), any_kv.OPTIONS, num_gpu_blocks_override=blocks
    ) as made:
        yield made


@pytest.fixture(scope="module")
def stock(random_model: Callable[[str], Path]) -> Iterator[Any]:
    with stock_engine(random_model("deepseek_v2")) as made:
        yield made


fresh = any_kv.fresh

test_an_exact_donor_gives_stock_tokens = any_kv.test_an_exact_donor_gives_stock_tokens
test_no_pollution = any_kv.test_no_pollution
test_a_cancelled_load_gives_its_blocks_back = any_kv.test_a_cancelled_load_gives_its_blocks_back
test_a_preempted_request = (
    any_kv.test_a_preempted_request_does_not_call_its_own_approximate_blocks_exact
)


def test_what_is_computed_between_kept_latents_is_told(engine: Shared) -> None:
    engine.serve(ids(300))
    use = summary(engine.serve(edited(ids(300)), 4, repair="none"))
    assert (use["exact"], use["reused"], use["gaps"], use["declined"]) == (100, 199, 5, None)
