"""`KVShare(model, engine="vllm")`: the native engine's interface, vLLM behind it."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Iterator
from typing import Any

import jsonschema_rs
import pytest

from kvshare_mm import KVShare, RequestOptions, SamplingParams
from kvshare_mm.errors import ConfigError, EngineClosedError, InvalidRequestError, ModelLoadError
from kvshare_mm.stream import Modality

from ..helpers import samples, until
from .engines import patience

pytestmark = pytest.mark.vllm

_OWN = {"enforce_eager": True, "kv_cache_memory_bytes": 1 << 28, "disable_log_stats": False}
_SHORT = SamplingParams(max_tokens=8)
_PARAMS = SamplingParams(max_tokens=24, logprobs=2)


@pytest.fixture(scope="module")
def llm() -> Iterator[KVShare]:
    options = {"engine": "vllm", "max_model_len": 1024, "engine_options": _OWN}
    with patience(), KVShare("tiny-vl", **options) as started:
        yield started


def test_the_samples_are_answered_right(llm: KVShare) -> None:
    assert llm.modalities == {Modality.IMAGE}
    right = []
    for messages, want in samples("tiny-vl")[:8]:
        output = llm.chat(messages, _PARAMS, RequestOptions(reuse="off"))
        assert output.prompt_token_ids == llm.tokenize(messages)
        assert [use.source for use in output.provenance.media] == ["encoder"]
        assert output.finish_reason == "stop"
        assert output.metrics.ttft > 0
        assert output.logprobs is not None and len(output.logprobs) == len(output.token_ids)
        for each in output.logprobs:
            assert each.top[0] == (each.token_id, each.logprob), "greedy: the chosen one is first"
            assert len(each.top) == 2
            assert math.exp(each.top[0][1]) + math.exp(each.top[1][1]) <= 1 + 1e-5
        right.append(output.text == want)
    assert sum(right) >= 7


def test_what_was_sent_before_is_reused_and_told_and_a_salt_keeps_apart(llm: KVShare) -> None:
    system, user = samples("tiny-vl")[0][0]
    picture, words = user["content"]
    assert words["type"] == "text"
    before = llm.stats()["requests"].get("prompt_tokens_reused", 0)
    first = llm.chat([system, user], _PARAMS, RequestOptions(cache_salt="told"))
    time.sleep(1)  # stored behind the answer
    name = {"type": "text", "text": "My name is Viktor, which is none of your business. "}
    again = [system, {"role": "user", "content": [name, picture, words]}]

    def ask(salt: str, **options: Any) -> Any:
        asked = RequestOptions(cache_salt=salt, store=False, **options)
        return llm.chat(again, _PARAMS, asked).provenance

    use = ask("told")
    (photo,) = use.media
    assert photo.source == "kv" and use.donors
    assert photo.content_hash == first.provenance.media[0].content_hash
    assert use.reused >= photo.end - photo.start
    assert use.exact + use.reused + use.recomputed == len(llm.tokenize(again))
    assert ask("told", reuse="exact").reused == ask("told", max_divergence=0).reused == 0
    other = ask("other")
    assert (other.exact, other.reused) == (0, 0)
    assert [m.source for m in other.media] == ["encoder"]
    assert llm.stats()["requests"]["prompt_tokens_reused"] == before + use.reused
    # What the connector counts comes with the next step's statistics.
    until(lambda: any(n.startswith("kvshare:prompt_tokens") for n in llm.stats()["kvshare"]))


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
    until(lambda: not llm.stats()["queue"]["running"])
    assert llm.stats()["requests"]["finished_abort"] == before + 1


def test_mistakes_are_named_at_the_door(llm: KVShare) -> None:
    def ask(part: dict[str, Any]) -> None:
        llm.chat([{"role": "user", "content": [part]}], _PARAMS)

    with pytest.raises(InvalidRequestError, match="there is no file"):
        ask({"type": "image_url", "image_url": {"url": "no-such-lamp.png"}})
    with pytest.raises(InvalidRequestError, match="video"):
        ask({"type": "video_url", "video_url": {"url": "lamp.mp4"}})
    with pytest.raises(InvalidRequestError, match="stands for a picture"):
        llm.generate(llm.tokenizer.convert_tokens_to_ids(["<|image_pad|>", "a"]))
    with pytest.raises(InvalidRequestError, match="magic"):
        llm.generate("Hello", _PARAMS, RequestOptions(repair="magic:0.2"))
    with pytest.raises(InvalidRequestError, match="1024"):
        llm.generate([1] * 1024)
    with pytest.raises(ConfigError, match="lookup"):
        llm.lookup("Hello")
    with pytest.raises(ConfigError, match="flush"):
        llm.flush()
    assert not llm.has_cache
    with pytest.raises(ConfigError, match="cache"):
        llm.cache.list()


def test_penalties_bias_and_a_schema_reach_vllm(llm: KVShare) -> None:
    """Each changes the answer as its name says; a schema that is none is named."""
    alone = RequestOptions(reuse="off")
    plain = llm.generate("Count:", SamplingParams(max_tokens=12, ignore_eos=True), alone)
    for fields in (
        {"presence_penalty": 2.0, "frequency_penalty": 2.0},
        {"repetition_penalty": 5.0},
        {"logit_bias": dict.fromkeys(plain.token_ids, -100)},
    ):
        params = SamplingParams(max_tokens=12, ignore_eos=True, **fields)
        assert llm.generate("Count:", params, alone).token_ids != plain.token_ids
    schema = {
        "type": "object",
        "properties": {"name": {"enum": ["search", "open"]}, "deep": {"type": "boolean"}},
        "required": ["name", "deep"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"schema": schema}}
    words = ((i, llm.tokenizer.decode([i])) for i in range(len(llm.tokenizer)))
    no_blanks = {i: -100.0 for i, word in words if word.isspace()}  # it would go on with them
    answer = llm.generate(
        "Count:", max_tokens=300, response_format=form, logit_bias=no_blanks, options=alone
    )
    assert answer.finish_reason == "stop"
    jsonschema_rs.validate(schema, json.loads(answer.text))
    wrong = {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}
    with pytest.raises(InvalidRequestError, match="nonsense"):
        llm.generate("Count:", max_tokens=3, response_format=wrong)


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
