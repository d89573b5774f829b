"""Small random models that see or hear, whose answers mean nothing but depend on everything: vLLM
reuses what the native engine would, and the first token's distribution is the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kvshare_mm import KVShare
from kvshare_mm.stream import Modality

from .. import media_models
from .engines import Shared, as_native, shared_engine

pytestmark = pytest.mark.vllm

# They look everywhere alike, so the default would repair nearly all.
REPAIR = "tail:16"
WORDS = "Sort this parcel by its sender, then say to which of our two warehouses it goes. "


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen3_vl", "internvl", "qwen2_audio"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model")
    media_models.build(request.param, made, for_vllm=True)
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


def sound(seed: int, seconds: float) -> dict[str, Any]:
    samples = np.random.default_rng(seed).normal(0, 0.1, int(16_000 * seconds))
    return {"type": "audio", "audio": (samples.astype(np.float32), 16_000)}


def message(*parts: str | dict[str, Any]) -> list[dict[str, Any]]:
    content = [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]
    return [{"role": "user", "content": content}]


def cases(a: dict[str, Any], b: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """A donor and a target each."""
    return {
        "moved": (message("Tom: ", a, WORDS), message("From Alexandra: ", a, WORDS)),
        "two moved": (message("1", a, "and", b, WORDS), message("No. 11", a, "and ", b, WORDS)),
        "one taken out": (message(WORDS, a, "and", b, WORDS), message(WORDS, b, WORDS)),
        "text of a medium's request": (message(a, WORDS * 2), message(WORDS * 2)),
    }


SEEN = cases(picture(1, 84, 112), picture(2, 140, 56))
HEARD = cases(sound(1, 1.5), sound(2, 0.7))


@pytest.mark.parametrize("name", SEEN)
def test_the_native_engine_reuses_the_same(
    engines: tuple[Shared, KVShare], folder: Path, name: str
) -> None:
    shared, native = engines
    donor, target = (SEEN if Modality.IMAGE in native.modalities else HEARD)[name]
    expected = as_native(shared, native, donor, target, str(folder), repair=REPAIR)
    assert expected.provenance.reused > 40
    assert {m.source for m in expected.provenance.media} <= {"kv"}
