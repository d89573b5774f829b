"""Two of vLLM's servers behind the router."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..apps.router.cluster import ask_whole, bodies, plan, routed, sent, shared_tokens
from ..apps.router.measured import families
from .servers import SMALL

pytestmark = pytest.mark.vllm


def test_two_replicas_reuse_and_answer_as_one(tmp_path: Path) -> None:
    words = ("tiny-vl", "--engine", "vllm", "--max-model-len", "1024", "--", *SMALL)
    texts = families(6, 3, 60)
    with routed(tmp_path, [words, words]) as (replicas, router):
        one = sent(bodies(texts, "one"), lambda _: replicas[0].url, by=ask_whole)
        both = sent(bodies(texts, "both"), lambda _: router.url, by=ask_whole)
    assert not [s.error for s in (*one, *both) if s.error]
    alike = [(a, b) for a, b in zip(one, both, strict=True) if plan(a) == plan(b)]
    assert alike
    assert all(a.text == b.text for a, b in alike)
    assert shared_tokens(both) >= 0.9 * shared_tokens(one) > 0
