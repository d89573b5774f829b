"""`KVShare(model, engine="vllm")`: the native engine's interface, vLLM behind it."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator

import pytest

from kvshare_mm import KVShare, RequestOptions, SamplingParams
from kvshare_mm.apps.bench.template import pair
from kvshare_mm.errors import ConfigError, EngineClosedError, InvalidRequestError, ModelLoadError

pytestmark = pytest.mark.vllm

_OWN = {"enforce_eager": True, "kv_cache_memory_bytes": 1 << 30, "disable_log_stats": False}
_SHORT = SamplingParams(max_tokens=8)


@pytest.fixture(scope="module")
def llm() -> Iterator[KVShare]:
    with KVShare("smollm2", engine="vllm", max_model_len=1024, engine_options=_OWN) as started:
        yield started


def test_a_chat_is_answered(llm: KVShare) -> None:
    params = SamplingParams(max_tokens=12, logprobs=2)
    question = {"role": "user", "content": "What is the capital of France?"}
    output = llm.chat([question], params)
    assert "Paris" in output.text
    assert output.finish_reason == "stop"
    assert output.prompt_token_ids == llm.tokenize([question])
    assert output.metrics.ttft > 0
    assert output.logprobs is not None and len(output.logprobs) == len(output.token_ids)
    for each in output.logprobs:
        assert each.top[0] == (each.token_id, each.logprob), "greedy: the chosen one is first"
        assert len(each.top) == 2
        assert math.exp(each.top[0][1]) + math.exp(each.top[1][1]) <= 1 + 1e-5


def test_a_similar_prompt_reuses_and_a_salt_keeps_apart(llm: KVShare) -> None:
    prompts = pair(reports=1, values=4)
    before = llm.stats()["requests"].get("prompt_tokens_reused", 0)
    llm.generate(prompts["donor"], _SHORT)
    time.sleep(1)  # stored behind the answer
    target = prompts["target"]
    use = llm.generate(target, _SHORT, RequestOptions(repair="tail:8")).provenance
    assert use.reused > 100
    assert use.donors
    assert use.exact + use.reused + use.recomputed == len(llm.tokenize(target))
    exact = llm.generate(target, _SHORT, RequestOptions(reuse="exact", store=False)).provenance
    assert exact.reused == 0
    other = llm.generate(target, _SHORT, RequestOptions(cache_salt="other")).provenance
    assert (other.exact, other.reused) == (0, 0)
    assert llm.stats()["requests"]["prompt_tokens_reused"] == before + use.reused


def test_chunks_are_the_answer_and_many_prompts_have_many(llm: KVShare) -> None:
    prompts = ["Red, green and", "One, two, three,"]
    chunks = list(llm.stream(prompts[0], _SHORT))
    assert chunks[-1].output is not None
    assert len(chunks) > 2
    assert "".join(c.text for c in chunks) == chunks[-1].output.text
    answers = llm.generate(prompts, _SHORT)
    assert answers[0].token_ids == chunks[-1].output.token_ids
    assert asyncio.run(llm.agenerate(prompts[1], _SHORT)).token_ids == answers[1].token_ids


def test_who_leaves_a_stream_cancels_it(llm: KVShare) -> None:
    before = llm.stats()["requests"].get("finished_abort", 0)
    for _ in llm.stream("Count:", SamplingParams(max_tokens=900, ignore_eos=True)):
        break
    for _ in range(100):
        if not llm.stats()["queue"]["running"]:
            break
        time.sleep(0.1)
    assert llm.stats()["requests"]["finished_abort"] == before + 1


def test_what_cannot_be_is_said(llm: KVShare) -> None:
    picture = {"type": "image_url", "image_url": {"url": "lamp.png"}}
    with pytest.raises(InvalidRequestError, match="image_url"):
        llm.chat([{"role": "user", "content": [picture]}])
    with pytest.raises(InvalidRequestError, match="1024"):
        llm.generate([1] * 1024)
    with pytest.raises(ConfigError, match="lookup"):
        llm.lookup("Hello")
    with pytest.raises(ConfigError, match="flush"):
        llm.flush()
    assert llm.cache is None


def test_the_connectors_counters_are_in_the_stats(llm: KVShare) -> None:
    llm.generate("Something to count.", _SHORT)
    for _ in range(100):  # they come with the next step's statistics
        if found := llm.stats()["kvshare"]:
            break
        time.sleep(0.1)
    assert any(name.startswith("kvshare:prompt_tokens") for name in found), found


def test_a_closed_engine_says_so(llm: KVShare) -> None:
    """Last: it closes the engine of this file."""
    llm.close()
    with pytest.raises(EngineClosedError):
        llm.generate("Hello")
    llm.close()


def test_what_vllm_does_not_know_is_named() -> None:
    with pytest.raises(ConfigError, match="no_such_option"):
        KVShare("smollm2", engine="vllm", engine_options={"no_such_option": 1})
    with pytest.raises(ModelLoadError):
        KVShare("./no-such-folder", engine="vllm")
