"""What the tests of the benchmarks share."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import absl.logging
import numpy as np
import pytest
from numpy.typing import NDArray

from kvshare_mm import KVShareConfig
from kvshare_mm.apps.bench.methods import METHODS
from kvshare_mm.apps.bench.rig import Rig

# What a library does when it configures logging anew (pymilvus, on its first import) makes absl,
# which rouge-score brings, close the stream that it once took for stderr, unless it still is one.
# That must not be the file in which pytest collects what a test prints.
absl.logging.get_absl_handler().python_handler.stream = sys.__stderr__

_ROWS = " ".join(f"Value {i} is {i * 37 % 91} g/L;" for i in range(10))


@pytest.fixture(scope="session")
def pairs() -> list[dict[str, Any]]:
    """Two pairs of similar reports and one of prompts with nothing in common."""
    return [
        {
            "id": name,
            "donor": f"Laboratory report. Patient number {before}. {_ROWS} What is value {asked}?",
            "target": f"Laboratory report. Patient number {after}. {_ROWS} What is value {asked}?",
        }
        for name, before, after, asked in (("a", 48210, 77, 3), ("b", 5, 61234, 8))
    ] + [{"id": "unlike", "donor": "The quick brown fox. " * 6, "target": "number " * 30}]


@pytest.fixture(scope="module")
def rig(tiny_folder: Path) -> Iterator[Rig]:
    """A tiny model with a slot for every method, a donor and full recompute."""
    config = KVShareConfig.of(model=str(tiny_folder), embedder=None)
    rig = Rig(config, num_slots=len(METHODS) + 2)
    yield rig
    rig.close()


class LetterEmbedder:
    """Unit vectors that count letters: texts of the same letters mean the same to it."""

    name = "letters"
    dim = 26

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        counts = np.array(
            [[text.lower().count(chr(97 + k)) for k in range(self.dim)] for text in texts],
            dtype=np.float32,
        )
        return counts / np.maximum(np.linalg.norm(counts, axis=1, keepdims=True), 1e-9)


@pytest.fixture
def letters() -> LetterEmbedder:
    return LetterEmbedder()
