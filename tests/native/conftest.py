"""Tiny random models, what transformers itself computes with them, and what serves them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from kvshare_mm import KVShare, RequestOptions, RequestOutput
from kvshare_mm.models.loader import LoadedModel, load_model
from kvshare_mm.native.waiting import WaitingRequests

from .. import references
from .asking import _PROMPTS, PATIENCE_S, params
from .donor_server import Server


@dataclass(frozen=True, slots=True)
class Tiny:
    """A model as we serve it, and its twin that runs transformers' own attention."""

    loaded: LoadedModel
    reference: Any

    def full(self, token_ids: np.ndarray) -> references.Full:
        return references.full(self.reference, references.text(token_ids))

    def greedy(self, token_ids: np.ndarray, num_tokens: int) -> list[int]:
        return references.greedy(self.reference, references.text(token_ids), num_tokens)


def _tiny(folder: Path) -> Tiny:
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return Tiny(load_model(str(folder), dtype="float32"), reference)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def saves_are_waited_for() -> Iterator[None]:
    """Who comes behind an answer finds it, however slowly a busy machine saves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WaitingRequests, "MAX_HOLD_S", float(PATIENCE_S))
        yield


@pytest.fixture(scope="session")
def tiny_llama(tiny_folder: Path) -> Tiny:
    return _tiny(tiny_folder)


@pytest.fixture(scope="session", params=["llama", "qwen2"])
def tiny(
    request: pytest.FixtureRequest, tiny_llama: Tiny, random_model: Callable[[str], Path]
) -> Tiny:
    return tiny_llama if request.param == "llama" else _tiny(random_model(request.param))


@pytest.fixture(scope="module")
def llm(tiny_folder: Path) -> Iterator[KVShare]:
    """For tests that change nothing about the server; they take a salt of their own."""
    with KVShare(str(tiny_folder), embedder=None, max_num_seqs=2) as llm:
        yield llm


@pytest.fixture(scope="module")
def alone(llm: KVShare) -> list[RequestOutput]:
    """The answers to `_PROMPTS`, each computed in full with nothing else running."""
    return [llm.generate(p, params(), RequestOptions(reuse="off")) for p in _PROMPTS]


@pytest.fixture
def server(tiny_llama: Any) -> Iterator[Server]:
    server = Server(tiny_llama)
    yield server
    server.pool.close()


@pytest.fixture(scope="module")
def long_llm(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[KVShare]:
    """With room for prompts of tools."""
    folder = shutil.copytree(tiny_folder, tmp_path_factory.mktemp("long") / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 4096}))
    with KVShare(str(folder), embedder=None) as made:
        yield made
