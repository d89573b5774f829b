"""Tiny random models, what transformers itself computes with them, and what serves them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from kvshare_mm import KVShare, RequestOptions, RequestOutput
from kvshare_mm.models.loader import LoadedModel
from kvshare_mm.models.support import check_support

from .. import references
from .asking import _PROMPTS, params
from .donor_server import Server

_SHAPE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
_CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config}


@dataclass(frozen=True, slots=True)
class Tiny:
    """A model as we serve it, and its twin that runs transformers' own attention."""

    loaded: LoadedModel
    reference: Any

    def full(self, token_ids: np.ndarray) -> references.Full:
        return references.full(self.reference, references.text(token_ids))

    def greedy(self, token_ids: np.ndarray, num_tokens: int) -> list[int]:
        return references.greedy(self.reference, references.text(token_ids), num_tokens)


def _build(name: str, **options: Any) -> Tiny:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        _CONFIGS[name](**{**_SHAPE, **options}), attn_implementation="sdpa", dtype=torch.float32
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        # Fresh weights attend almost evenly, which would hide a wrong mask or rotation.
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
    model = model.eval().requires_grad_(False)
    reference = copy.deepcopy(model)
    support = check_support(model)
    assert support.reason is None
    loaded = LoadedModel(
        name=name,
        model=model,
        tokenizer=None,  # type: ignore[arg-type]
        device=torch.device("cpu"),
        dtype=torch.float32,
        context_len=512,
        eos_token_ids=frozenset(),
        fingerprint=name,
        rotary=support.rotary,
        kv_shape=support.kv_shape,
        unsupported=None,
    )
    return Tiny(loaded, reference)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_llama() -> Tiny:
    return _build("llama")


@pytest.fixture(scope="session", params=sorted(_CONFIGS))
def tiny(request: pytest.FixtureRequest, tiny_llama: Tiny) -> Tiny:
    return tiny_llama if request.param == "llama" else _build(request.param)


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
