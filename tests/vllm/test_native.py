"""Inside vLLM a request reuses what it would in the native engine, and gets the same answer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from kvshare_mm import KVShare, SamplingParams, assets
from kvshare_mm.models.loader import load_tokenizer, locate

from ..conftest import RANDOM_MODELS
from .engines import Shared, assert_as_native, first_token, shared_engine, tokens

pytestmark = pytest.mark.vllm

Pairs = list[tuple[list[int], list[int]]]


def _random_pairs() -> Pairs:
    rng = np.random.default_rng(0)
    pairs = []
    for length in (90, 200, 350):
        donor = rng.integers(3, 250, length).tolist()
        new = rng.integers(3, 250, 9).tolist()
        target = [*donor[:30], *new[:3], *donor[30:60], *donor[64:], *new[3:]]
        pairs.append((donor, target))
    return pairs


def _real_pairs(model: str) -> Pairs:
    lines = (assets.folder("") / "pairs-demo.jsonl").read_text("utf-8").splitlines()
    tokenizer = load_tokenizer(model)
    pairs = []
    for line in lines[:6]:
        pair = json.loads(line)
        texts = [pair[side] for side in ("donor", "target")]
        pairs.append(tuple(list(tokenizer(text)["input_ids"])[:600] for text in texts))
    return pairs  # type: ignore[return-value]


@pytest.fixture(scope="module", params=[*RANDOM_MODELS, "tiny-vl", "smollm2"])
def case(
    request: pytest.FixtureRequest, random_model: Callable[[str], Path]
) -> Iterator[tuple[Shared, KVShare, Pairs]]:
    real = request.param == "smollm2"
    folder = str((random_model if request.param in RANDOM_MODELS else locate)(request.param))
    pairs = _real_pairs(folder) if real else _random_pairs()
    options = {"lookup_deadline_s": 30, "min_load_tokens": 1}
    with (
        KVShare(folder, dtype="float32", embedder=None) as native,
        shared_engine(
            folder,
            options,
            max_model_len=None if not real else 2048,
            disable_hybrid_kv_cache_manager=True,  # which changes models with windows alone
        ) as shared,
    ):
        yield shared, native, pairs


def test_the_same_reuse_and_the_same_first_token(case: tuple[Shared, KVShare, Pairs]) -> None:
    shared, native, pairs = case
    greedy = {"temperature": 0, "ignore_eos": True}
    reused = 0
    for donor, target in pairs:
        shared.forget()
        assert native.cache is not None
        native.cache.clear()
        first = native.generate(donor, SamplingParams(max_tokens=4, **greedy))
        assert tokens(shared.serve(donor)) == list(first.token_ids)
        native.flush()
        expected = native.generate(target, SamplingParams(max_tokens=1, logprobs=10, **greedy))
        assert_as_native(first_token(shared, target), expected)
        reused += expected.provenance.reused
    assert reused
