"""Donors on disk: after a restart, and damaged."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvshare_mm.assets.shop.pictures import draw, random_photo
from kvshare_mm.models.loader import load_tokenizer, locate

from .engines import Shared, shared_engine, summary, tokens

pytestmark = pytest.mark.vllm

BASE = {"lookup_deadline_s": 30, "min_load_tokens": 8, "host_bytes": 1 << 20}


def ids(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, 250, length).tolist()


def edited(prompt: list[int]) -> list[int]:
    return [*prompt[:100], 9, 8, 7, 6, 5, *prompt[100:]]


@pytest.fixture(scope="module")
def store_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("donors")


def test_pictures_on_disk_outlive_the_engine(tmp_path: Path) -> None:
    picture = draw(random_photo(random.Random(0)))
    tokenizer = load_tokenizer("tiny-vl")

    def prompt(name: str) -> dict[str, Any]:
        text = f"{name}: <|vision_start|><|image_pad|><|vision_end|>{'Which way did it come? ' * 8}"
        ids = tokenizer(text)["input_ids"]
        return {"prompt_token_ids": ids, "multi_modal_data": {"image": [picture]}}

    options = {**BASE, "store_dir": tmp_path}
    with shared_engine(locate("tiny-vl"), options, max_model_len=512) as engine:
        engine.serve(prompt("Tom"))
        before = engine.serve(prompt("Alexandra 17"), store=False, repair="tail:16")
        assert engine.runner._worker.store.flush(60)
        (node,) = engine.scheduler.reuse.catalogue.nodes()
    with shared_engine(locate("tiny-vl"), options, max_model_len=512) as engine:
        after = engine.serve(prompt("Alexandra 17"), store=False, repair="tail:16")
        (found,) = engine.scheduler.reuse.catalogue.nodes()
    assert found.media == node.media and len(node.media) == 1
    assert np.array_equal(found.positions, node.positions)
    assert summary(after)["reused"] == summary(before)["reused"] > 16
    assert tokens(after) == tokens(before)


def test_donors_on_disk_outlive_the_engine_and_damage(
    random_model: Callable[[str], Path], store_dir: Path
) -> None:
    options = {**BASE, "store_dir": store_dir}
    prompts = [ids(300, seed) for seed in range(3)]

    def serve(engine: Shared, prompt: list[int]) -> tuple[dict[str, Any], list[int]]:
        assert engine.llm.reset_prefix_cache()
        output = engine.serve(prompt, store=False)
        return summary(output), tokens(output)

    with shared_engine(random_model("llama"), options) as engine:
        for prompt in prompts:
            engine.serve(prompt)
        # Not all fit into RAM: some of these come from the disk.
        before = [serve(engine, edited(prompt)) for prompt in prompts]
        assert all(use["reused"] > 100 for use, _ in before)
        assert engine.runner._worker.store.flush(60)
    with shared_engine(random_model("llama"), options) as engine:
        assert [serve(engine, edited(prompt)) for prompt in prompts] == before
        files = [f for f in store_dir.rglob("*") if f.is_file() and f.stat().st_size > 100_000]
        assert len(files) == 3
        for file in files:
            content = bytearray(file.read_bytes())
            content[-1000] ^= 1
            file.write_bytes(content)
        reasons = set()
        for prompt in prompts:
            use, answer = serve(engine, edited(prompt))
            plain = engine.serve(edited(prompt), reuse="off", store=False)
            if use["reused"]:
                continue  # RAM has it
            reasons.add(use["declined"])
            assert answer == tokens(plain)
        assert reasons == {"corrupt"}
