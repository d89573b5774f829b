"""Inside vLLM a request reuses what it would in the native engine, and gets the same answer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvshare_mm import KVShare, RequestOutput, SamplingParams, assets
from kvshare_mm.models.loader import load_tokenizer, locate
from kvshare_mm.native.slots import SlotRunner

from ..conftest import RANDOM_MODELS
from ..native.asking import inside
from .engines import assert_as_native, first_token, shared_engine, summary, tokens

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


@dataclass(frozen=True)
class Served:
    """A pair, and what the native engine made of it.

    Attributes:
        looked: what the end of the donor's prompt attends to.
    """

    donor: list[int]
    target: list[int]
    first: list[int]
    looked: np.ndarray
    then: RequestOutput


def _natively(folder: str, pairs: Pairs) -> Iterator[Served]:
    greedy = {"temperature": 0, "ignore_eos": True}
    with KVShare(folder, dtype="float32", embedder=None) as native:
        for donor, target in pairs:
            native.flush()  # the pair before
            native.cache.clear()
            first = native.generate(donor, SamplingParams(max_tokens=4, **greedy))
            native.flush()
            [node] = inside(native).donors.nodes()
            then = native.generate(target, SamplingParams(max_tokens=1, logprobs=10, **greedy))
            yield Served(donor, target, list(first.token_ids), node.attention, then)


@pytest.mark.parametrize("name", [*RANDOM_MODELS, "smollm2"])
def test_the_same_reuse_and_the_same_first_token(
    name: str, random_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Inside vLLM nobody knows who has read what.
    monkeypatch.setattr(SlotRunner, "reading_heads", {})
    folder = str((random_model if name in RANDOM_MODELS else locate)(name))
    real = name == "smollm2"
    # vLLM may run transformers' own classes, and changes them for good.
    served = list(_natively(folder, _real_pairs(folder) if real else _random_pairs()))
    assert any(each.then.provenance.reused for each in served)
    with shared_engine(
        folder,
        {"lookup_deadline_s": 30, "min_load_tokens": 1},
        max_model_len=2048 if real else None,
        disable_hybrid_kv_cache_manager=True,  # which changes models with windows alone
    ) as shared:
        for each in served:
            shared.forget()
            assert tokens(shared.serve(each.donor)) == each.first
            [node] = shared.catalogue.nodes()
            assert np.allclose(node.attention, each.looked, atol=1e-4)
            assert_as_native(first_token(shared, each.target), each.then)


def test_float8_that_is_rounded_again_stays_within_the_bound() -> None:
    """The native engine has none: it is compared to computing all, with the same cache."""
    folder = str(locate("smollm2"))
    options = {"lookup_deadline_s": 30, "min_load_tokens": 1, "audit_share": 0}
    with shared_engine(
        folder, options, max_model_len=2048, kv_cache_dtype="fp8", max_logprobs=-1
    ) as shared:

        def logprobs(target: list[int], **knobs: Any) -> tuple[np.ndarray, int]:
            assert shared.llm.reset_prefix_cache()
            output = first_token(shared, target, -1, **knobs, store=False)
            top = output.outputs[0].logprobs[0]
            return np.array([top[i].logprob for i in range(len(top))]), summary(output)["reused"]

        for donor, target in _real_pairs(folder):
            shared.forget()
            whole, _ = logprobs(target, reuse="off")
            shared.serve(donor)
            exact, _ = logprobs(target, reuse="exact")
            similar, reused = logprobs(target)
            assert np.array_equal(exact, whole)
            divergence = float(np.sum(np.exp(whole) * (whole - similar)))
            print(f"{reused} of {len(target)} tokens reused: {divergence:.1e}")
            assert reused > 100 and 0 < divergence < 0.01
