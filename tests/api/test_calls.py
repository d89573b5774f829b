"""What the Python API takes: prompts, chats, streams, their async twins, options."""

from __future__ import annotations

import asyncio
import json
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import pytest

from kvshare_mm import (
    ConfigError,
    EngineClosedError,
    InvalidRequestError,
    KVShare,
    KVShareConfig,
    ModelLoadError,
    RequestOptions,
    RequestOutput,
    SamplingParams,
    StreamChunk,
)
from kvshare_mm.asked import Given
from kvshare_mm.assemble import Parts
from kvshare_mm.options import Options

from ..helpers import Clock
from .prompts import _CHAT, _DONOR, _PARAMS, _TARGET, OpenLLM


def test_prompts_as_text_and_as_token_ids(llm: KVShare) -> None:
    ids = llm.tokenizer(_DONOR)["input_ids"]
    text = llm.generate(_DONOR, _PARAMS)
    assert isinstance(text, RequestOutput)
    assert text.prompt_token_ids == tuple(ids)
    for prompt in (ids, tuple(ids)):
        assert llm.generate(prompt, _PARAMS).token_ids == text.token_ids


def test_lists_of_prompts(llm: KVShare) -> None:
    prompts = ["The fox.", "The lazy dog.", "The number."]
    outputs = llm.generate(prompts, _PARAMS)
    assert isinstance(outputs, list)
    ids = [llm.tokenizer(p)["input_ids"] for p in prompts]
    assert [o.prompt_token_ids for o in outputs] == [tuple(i) for i in ids]
    assert [o.token_ids for o in llm.generate(ids, _PARAMS)] == [o.token_ids for o in outputs]
    assert [llm.generate(p, _PARAMS).token_ids for p in prompts] == [o.token_ids for o in outputs]
    assert llm.generate([], _PARAMS) == []
    [single] = llm.generate(prompts[:1], _PARAMS)
    assert single.token_ids == outputs[0].token_ids


def test_fields_are_given_by_name(llm: KVShare) -> None:
    few = llm.generate(_DONOR, max_tokens=2)
    assert few.token_ids == llm.generate(_DONOR, SamplingParams(max_tokens=2)).token_ids
    both = llm.chat(_CHAT, SamplingParams(max_tokens=9), max_tokens=1, reuse="off")
    assert len(both.token_ids) == 1 and both.provenance.declined == "reuse_off"
    [*_, last] = llm.stream(_DONOR, max_tokens=2)
    assert last.output is not None and last.output.token_ids == few.token_ids
    assert asyncio.run(llm.agenerate(_DONOR, max_tokens=2)).token_ids == few.token_ids


def test_every_field_has_its_name() -> None:
    known = [f.name for kind in (SamplingParams, RequestOptions) for f in fields(kind)]
    tools = ["tools", "tool_choice", "parallel_tool_calls"]
    assert list(Given.__annotations__) == [*known, *tools]


def test_every_option_has_its_name_and_type() -> None:
    fields = {name: f.annotation for name, f in KVShareConfig.model_fields.items()}
    del fields["model"]
    typed = get_type_hints(Options)
    assert list(typed) == list(fields)
    for name, kind in fields.items():
        assert typed[name] == (kind | str if Path in get_args(kind) else kind), name


@pytest.mark.parametrize(
    ("given", "field", "said"),
    [
        ({"max_token": 3}, "max_token", "did you mean max_tokens?"),
        ({"reuze": "off"}, "reuze", "did you mean reuse?"),
        ({"temperature": -1}, "temperature", "not allowed"),
        ({"xyz": 1}, "xyz", "no option xyz$"),
    ],
)
def test_wrong_fields_are_named(llm: KVShare, given: Any, field: str, said: str) -> None:
    with pytest.raises(InvalidRequestError, match=said) as raised:
        llm.generate("Hi", **given)
    assert raised.value.field == field


def test_wrong_names_of_the_engine_are_answered_at_once() -> None:
    with pytest.raises(ConfigError, match=r"max_divergense: .*did you mean max_divergence\?"):
        KVShare(max_divergense=1)
    with pytest.raises(ModelLoadError, match=r"did you mean smollm2\?"):
        KVShare("smolm2")


def test_lists_of_chats(llm: KVShare) -> None:
    chats = [[{"role": "user", "content": text}] for text in ("The fox.", "The number.")]
    answers = llm.chat(chats, _PARAMS)
    assert [a.token_ids for a in answers] == [llm.chat(c, _PARAMS).token_ids for c in chats]
    assert answers[0].prompt_token_ids != answers[1].prompt_token_ids
    with pytest.raises(InvalidRequestError, match="role"):
        llm.chat([chats[0], [{"content": "no role"}]], _PARAMS)


def test_chat_goes_through_the_template(llm: KVShare) -> None:
    output = llm.chat(_CHAT, _PARAMS)
    text = (
        "<|im_start|>system\nAnswer with the number.<|im_end|>\n"
        "<|im_start|>user\nWhat is the value?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert llm.tokenizer.decode(output.prompt_token_ids) == text
    assert output.token_ids == llm.generate(text, _PARAMS).token_ids


def test_chat_takes_content_as_parts(llm: KVShare) -> None:
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "the value?"}]
    output = llm.chat([_CHAT[0], {"role": "user", "content": parts}], _PARAMS)
    assert output.prompt_token_ids == llm.chat(_CHAT, _PARAMS).prompt_token_ids


def test_streams_of_prompts_and_chats(llm: KVShare) -> None:
    ids = llm.tokenizer(_DONOR)["input_ids"]
    for prompt, output in (
        (_DONOR, llm.generate(_DONOR, _PARAMS)),
        (ids, llm.generate(_DONOR, _PARAMS)),
        (_CHAT, llm.chat(_CHAT, _PARAMS)),
    ):
        chunks = list(llm.stream(prompt, _PARAMS))
        assert "".join(c.text for c in chunks) == output.text
        assert chunks[-1].output is not None
        assert chunks[-1].output.token_ids == output.token_ids


def test_async_twins(llm: KVShare) -> None:
    async def ask() -> tuple[RequestOutput, RequestOutput, list[StreamChunk], list[StreamChunk]]:
        return (
            await llm.agenerate(_DONOR, _PARAMS),
            await llm.achat(_CHAT, _PARAMS),
            [c async for c in llm.astream(_DONOR, _PARAMS)],
            [c async for c in llm.astream(_CHAT, _PARAMS)],
        )

    generated, chatted, chunks, chat_chunks = asyncio.run(ask())
    assert generated.token_ids == llm.generate(_DONOR, _PARAMS).token_ids
    assert chatted.token_ids == llm.chat(_CHAT, _PARAMS).token_ids
    assert "".join(c.text for c in chunks) == generated.text
    assert "".join(c.text for c in chat_chunks) == chatted.text


def test_outputs_and_stats_are_json(open_llm: OpenLLM, tmp_path: Path) -> None:
    llm = open_llm(store_dir=tmp_path / "store")
    llm.generate(_DONOR, _PARAMS)
    assert llm.flush()
    output = llm.generate(_TARGET, SamplingParams(max_tokens=6, logprobs=2))
    assert llm.flush()
    told = json.loads(json.dumps(output.to_dict()))
    assert told["provenance"]["reused"] == output.provenance.reused > 0
    assert len(told["logprobs"]) == len(told["token_ids"]) == 6
    stats = json.loads(json.dumps(llm.stats()))
    assert set(stats) == {"model", "dtype", "unsupported", "requests", "queue", "donors", "audits"}
    assert stats["dtype"] == "float32"
    assert stats["unsupported"] is None
    assert stats["queue"] == {"waiting": 0, "running": 0}
    assert stats["requests"]["requests"] == 2
    assert set(stats["donors"]) == {"nodes", "tokens_owned", "tokens_whole", "bytes", "events"}
    assert stats["donors"]["nodes"] == 2
    assert 0 < stats["donors"]["tokens_owned"] < stats["donors"]["tokens_whole"]
    assert set(stats["donors"]["bytes"]) == {"host", "disk"}
    assert all(n > 0 for n in stats["donors"]["bytes"].values())
    assert stats["donors"]["events"]["saved"] == 2


def test_the_context_manager_closes(tiny_folder: Path) -> None:
    with KVShare(str(tiny_folder), embedder=None) as llm:
        llm.generate("The fox.", _PARAMS)
    with pytest.raises(EngineClosedError):
        llm.generate("The fox.", _PARAMS)
    assert llm.stats()["requests"]["requests"] == 1
    assert llm.flush(1)
    with pytest.raises(ZeroDivisionError), KVShare(str(tiny_folder), embedder=None) as other:
        raise ZeroDivisionError
    with pytest.raises(EngineClosedError):
        other.generate("The fox.", _PARAMS)


def test_a_flush_has_its_time_once_and_not_for_each_part(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    given: list[float] = []

    def slow(timeout_s: float) -> bool:
        given.append(timeout_s)
        clock.now += 3
        return True

    part = SimpleNamespace(wait_saved=slow, flush=slow)
    monkeypatch.setattr("kvshare_mm.assemble.time", SimpleNamespace(monotonic=clock), raising=False)
    nothing: Any = None
    fake: Any = part
    parts = Parts(nothing, nothing, nothing, donors=fake, engine=fake, seen=fake)
    assert parts.flush(5)
    assert given == [5, 2, 0]


def test_a_store_in_the_home_folder() -> None:
    assert KVShareConfig.of(store_dir="~/donors").store_dir == Path.home() / "donors"


def test_a_request_says_how_far_it_may_diverge(open_llm: OpenLLM) -> None:
    llm = open_llm(repair="none")
    llm.generate(_DONOR, _PARAMS)
    assert llm.flush(30)
    loose, strict = (
        llm.generate(_TARGET, _PARAMS, RequestOptions(max_divergence=kl, store=False)).provenance
        for kl in (1e6, 0.0)
    )
    assert loose.reused > 0
    assert strict.reused == 0
    assert strict.declined == "divergence"


def test_cache_is_there_or_says_why_not(tiny_folder: Path) -> None:
    for reuse, there in (("similar", True), ("off", False)):
        with KVShare(str(tiny_folder), embedder=None, reuse=reuse) as llm:
            assert llm.has_cache is there
            if there:
                assert llm.cache.list() == []
            else:
                with pytest.raises(ConfigError, match="reuse='off'"):
                    llm.cache.list()
