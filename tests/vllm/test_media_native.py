"""A random Qwen2-VL, whose answers mean nothing but depend on everything: vLLM reuses what the
native engine would, and the first token's distribution is the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from kvshare_mm import KVShare

from .. import media_models
from .engines import Shared, as_native, shared_engine

pytestmark = pytest.mark.vllm

# It looks everywhere alike, so the default would repair nearly all.
REPAIR = "tail:16"
WORDS = "Sort this parcel by its sender, then say to which of our two warehouses it goes. "


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """vLLM's attention on CPUs wants heads of 32 and more."""
    made = tmp_path_factory.mktemp("qwen2-vl")
    media_models.build("qwen2_vl", made)  # its processor is kept
    config = Qwen2VLConfig.from_pretrained(made).to_dict()
    config["text_config"].update(hidden_size=128, rope_parameters=media_models._MROPE)
    config["text_config"]["rope_parameters"] = {**media_models._MROPE, "mrope_section": [4, 6, 6]}
    config["vision_config"]["hidden_size"] = 128
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(**config))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    model.save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def engines(folder: Path) -> Iterator[tuple[Shared, KVShare]]:
    options = {"lookup_deadline_s": 30, "min_load_tokens": 1}
    with (
        KVShare(str(folder), dtype="float32", embedder=None) as native,
        shared_engine(folder, options, max_model_len=1024) as shared,
    ):
        yield shared, native


def picture(seed: int, width: int, height: int) -> dict[str, Any]:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return {"type": "image", "image": Image.fromarray(pixels)}


def message(*parts: str | dict[str, Any]) -> list[dict[str, Any]]:
    content = [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]
    return [{"role": "user", "content": content}]


A, B = picture(1, 84, 112), picture(2, 140, 56)
CASES = {
    "moved": (message("Tom: ", A, WORDS), message("From Alexandra: ", A, WORDS)),
    "two moved": (message("1", A, "and", B, WORDS), message("No. 11", A, "and ", B, WORDS)),
    "one taken out": (message(WORDS, A, "and", B, WORDS), message(WORDS, B, WORDS)),
    "text of a picture's request": (message(A, WORDS * 2), message(WORDS * 2)),
}


@pytest.mark.parametrize("name", CASES)
def test_the_native_engine_reuses_the_same(
    engines: tuple[Shared, KVShare], folder: Path, name: str
) -> None:
    shared, native = engines
    expected = as_native(shared, native, *CASES[name], str(folder), repair=REPAIR)
    assert expected.provenance.reused > 40
    assert {m.source for m in expected.provenance.media} <= {"kv"}
