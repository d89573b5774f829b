"""Donors on disk: after a restart, and damaged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .engines import Shared, shared_engine, tokens, told

pytestmark = pytest.mark.vllm

BASE = {"lookup_deadline_s": 30, "min_load_tokens": 8, "host_bytes": 1 << 20}


def ids(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, 250, length).tolist()


def edited(prompt: list[int]) -> list[int]:
    return [*prompt[:100], 9, 8, 7, 6, 5, *prompt[100:]]


@pytest.fixture(scope="module")
def store_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("donors")


def test_donors_on_disk_outlive_the_engine_and_damage(
    random_model: Callable[[str], Path], store_dir: Path
) -> None:
    options = {**BASE, "store_dir": store_dir}
    prompts = [ids(300, seed) for seed in range(3)]

    def serve(engine: Shared, prompt: list[int]) -> tuple[dict[str, Any], list[int]]:
        assert engine.llm.reset_prefix_cache()
        output = engine.serve(prompt, store=False)
        return told(output), tokens(output)

    with shared_engine(random_model("llama"), options) as engine:
        for prompt in prompts:
            engine.serve(prompt)
        # Not all fit into RAM: some of these come from the disk.
        before = [serve(engine, edited(prompt)) for prompt in prompts]
        assert all(use["reused"] > 100 for use, _ in before)
        assert engine.runner._store.flush(60)
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
            plain = engine.serve(edited(prompt), sharing="off", store=False)
            if use["reused"]:
                continue  # RAM has it
            reasons.add(use["declined"])
            assert answer == tokens(plain)
        assert reasons == {"corrupt"}
