"""Audits inside vLLM: what they measure, whom they give way to, and what becomes of the node."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvshare_mm.reuse.audits import Divergence

from .engines import Shared, edited, ids, shared_engine, stock_engine, stock_tokens, summary, tokens

pytestmark = pytest.mark.vllm

NUM_BLOCKS = 40


@pytest.fixture(scope="module")
def model(random_model: Callable[[str], Path]) -> Path:
    return random_model("llama")


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[Shared]:
    options = {"lookup_deadline_s": 30, "min_load_tokens": 8, "repair": "none"}
    audits = {"audit_share": 1, "audit_budget": 1e9}
    with shared_engine(model, {**options, **audits}, num_gpu_blocks_override=NUM_BLOCKS) as made:
        yield made


@pytest.fixture
def found(engine: Shared, monkeypatch: pytest.MonkeyPatch) -> list[Divergence]:
    """What audits find from now on."""
    made: list[Divergence] = []
    of = Divergence.of

    def noted(*args: Any) -> Divergence:
        made.append(of(*args))
        return made[-1]

    monkeypatch.setattr(Divergence, "of", noted)
    return made


@pytest.fixture(autouse=True)
def fresh(engine: Shared) -> Iterator[None]:
    engine.forget()
    engine.scheduler.counters.clear()
    engine.scheduler.reuse.calibration._spaces.clear()
    with engine.keeping_its_blocks():
        yield


def audits(engine: Shared) -> dict[str, int]:
    counted = engine.scheduler.counters.items()
    return {n.removeprefix("audits_"): c for n, c in counted if n.startswith("audits_") and c}


@pytest.mark.parametrize("answer", [1, 12, 100])
def test_what_is_measured_is_what_a_slow_reference_says(
    engine: Shared, model: Path, found: list[Divergence], answer: int
) -> None:
    engine.serve(ids(300))
    prompt = edited(ids(300))
    output = engine.serve(prompt, answer)
    print(summary(output), audits(engine), found)
    assert 0
