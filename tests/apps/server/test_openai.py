"""What OpenAI's own client gets, whole and streamed, against the engine's own answers."""

from __future__ import annotations

import json
from typing import Any

import jsonschema_rs
import pytest

from kvshare_mm import KVShare, RequestOptions, RequestOutput, SamplingParams

from .conftest import Running

_MESSAGES: list[Any] = [
    {"role": "system", "content": "Answer with the number and nothing else."},
    {"role": "user", "content": "Sodium 141 mmol/L. What is the value?"},
]
_GREEDY: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": 8}
_ALONE = RequestOptions(reuse="off", store=False)


def offline(llm: KVShare, **params: Any) -> RequestOutput:
    return llm.chat(_MESSAGES, SamplingParams(**{"max_tokens": 8, **params}), _ALONE)


def chat(running: Running, **fields: Any) -> Any:
    """What OpenAI's client makes of a chat; fields that it does not know go in `extra_body`."""
    asked = {"messages": _MESSAGES, **_GREEDY, **fields}
    return running.client().chat.completions.create(**asked)


def test_a_chat_answers_as_the_engine_does(shared: Running) -> None:
    reply = chat(shared)
    expected = offline(shared.llm)
    [choice] = reply.choices
    assert choice.message.content == expected.text
    assert choice.message.role == "assistant"
    assert choice.finish_reason == expected.finish_reason
    assert reply.object == "chat.completion" and reply.model == "tiny"
    assert reply.id.startswith("chatcmpl-")
    assert reply.usage.prompt_tokens == len(expected.prompt_token_ids)
    assert reply.usage.completion_tokens == len(expected.token_ids)
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens


def test_a_streamed_chat_adds_up_to_the_whole_one(shared: Running) -> None:
    chunks = list(chat(shared, stream=True, stream_options={"include_usage": True}))
    expected = offline(shared.llm)
    *pieces, last, counted = chunks
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in (*pieces, last)) == expected.text
    assert [c.choices[0].finish_reason for c in pieces] == [None] * len(pieces)
    assert last.choices[0].finish_reason == expected.finish_reason
    assert last.model_extra["kvshare"]["recomputed"] > 0
    assert all(c.usage is None for c in (*pieces, last))
    assert counted.choices == []
    assert counted.usage.completion_tokens == len(expected.token_ids)
    assert len({c.id for c in chunks}) == 1
    *_, last = chat(shared, stream=True)
    assert last.choices[0].finish_reason is not None and last.usage is None  # not asked for


def test_cached_tokens_tell_the_truth(shared: Running) -> None:
    salt = {"cache_salt": "cached-tokens"}
    first = chat(shared, extra_body=salt)
    shared.llm.flush()
    second = chat(shared, extra_body=salt)
    for reply, some in ((first, False), (second, True)):
        told = reply.model_extra["kvshare"]
        cached = reply.usage.prompt_tokens_details.cached_tokens
        assert cached == told["exact"] + told["reused"]
        assert (cached or 0) > 0 if some else cached == 0
        assert told["exact"] + told["reused"] + told["recomputed"] == reply.usage.prompt_tokens
    assert second.model_extra["kvshare"]["exact"] == second.usage.prompt_tokens - 1
    assert second.model_extra["kvshare"]["donors"]
    assert second.choices[0].message.content == first.choices[0].message.content


def test_requests_choose_how_they_reuse(shared: Running) -> None:
    salt = {"cache_salt": "per-request"}
    chat(shared, extra_body=salt)
    shared.llm.flush()
    alone = chat(shared, extra_body={**salt, "kvshare": {"reuse": "off", "spans": True}})
    told = alone.model_extra["kvshare"]
    assert (told["exact"], told["declined"]) == (0, "reuse_off")
    assert [span["kind"] for span in told["spans"]] == ["recomputed"]


def test_several_choices_differ_and_repeat(shared: Running) -> None:
    asked = {"max_tokens": 12, "n": 3, "seed": 7, "temperature": 1.5}
    first = chat(shared, **asked)
    texts = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert len(set(texts)) > 1
    streamed = [""] * 3
    for chunk in chat(shared, stream=True, **asked):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts
    assert first.usage.prompt_tokens == len(offline(shared.llm).prompt_token_ids)
    assert len(first.model_extra["kvshare"]["choices"]) == 3


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_are_the_engines(shared: Running, stream: bool) -> None:
    reply = chat(shared, stream=stream, logprobs=True, top_logprobs=2)
    found = []
    for part in reply if stream else [reply]:
        if part.choices[0].logprobs is not None:
            found += part.choices[0].logprobs.content
    expected = offline(shared.llm, logprobs=2).logprobs
    assert expected is not None
    assert [x.logprob for x in found] == pytest.approx([x.logprob for x in expected], abs=1e-3)
    assert [len(x.top_logprobs) for x in found] == [2] * len(expected)
    assert [x.token for x in found] == [shared.llm.tokenizer.decode([x.token_id]) for x in expected]


def test_stop_strings_end_an_answer(shared: Running) -> None:
    whole = offline(shared.llm, ignore_eos=True, max_tokens=12).text
    stop = whole[3:5]
    reply = chat(shared, stop=[stop], max_tokens=12, extra_body={"ignore_eos": True})
    assert reply.choices[0].message.content == whole[: whole.index(stop)]
    assert reply.choices[0].finish_reason == "stop"


def test_vllms_fields_arrive(shared: Running) -> None:
    reply = shared.client().chat.completions.create(
        model="tiny", messages=_MESSAGES, temperature=2, max_completion_tokens=6,
        extra_body={"top_k": 1, "min_p": 0.1, "ignore_eos": True},
    )  # fmt: skip
    expected = offline(shared.llm, ignore_eos=True, max_tokens=6)
    assert reply.choices[0].message.content == expected.text
    assert reply.choices[0].finish_reason == "length"


def test_completions_of_text_and_tokens(shared: Running) -> None:
    client = shared.client()
    text = "The quick brown fox jumps"
    ids = shared.llm.tokenizer(text)["input_ids"]
    alone = SamplingParams(max_tokens=5)
    expected = shared.llm.generate(text, alone, _ALONE)
    other = shared.llm.generate("Laboratory report.", alone, _ALONE)
    asked: dict[str, Any] = {"model": "tiny", "max_tokens": 5, "temperature": 0}
    for prompt, answers in (
        (text, [expected.text]),
        (ids, [expected.text]),
        ([text, "Laboratory report."], [expected.text, other.text]),
        ([ids], [expected.text]),
    ):
        reply = client.completions.create(prompt=prompt, **asked)
        assert [choice.text for choice in reply.choices] == answers
        assert reply.object == "text_completion"
    chunks = client.completions.create(prompt=text, stream=True, **asked)
    assert "".join(c.choices[0].text for c in chunks if c.choices) == expected.text
    logged = client.completions.create(prompt=text, logprobs=1, **asked).choices[0].logprobs
    assert logged is not None and logged.tokens is not None
    assert "".join(logged.tokens) == expected.text
    assert logged.text_offset == [len("".join(logged.tokens[:i])) for i in range(5)]


def test_completions_have_a_short_default(shared: Running) -> None:
    reply = shared.client().completions.create(
        model="tiny", prompt="The quick", temperature=0, extra_body={"ignore_eos": True}
    )
    assert reply.usage is not None and reply.usage.completion_tokens == 16


def test_models_and_what_a_server_says_of_itself(shared: Running) -> None:
    [model] = shared.client().models.list()
    assert model.id == "tiny"
    assert shared.client().models.retrieve("tiny").model_extra["max_model_len"] == 512  # type: ignore[index]
    assert shared.ask("GET", "/ping").status_code == 200
    assert shared.ask("GET", "/version").json()["version"]


def test_tokens_there_and_back(shared: Running) -> None:
    text = "Haemoglobin 148 g/L"
    reply = shared.ask("POST", "/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert reply["tokens"] == shared.llm.tokenizer(text)["input_ids"]
    assert reply["count"] == len(reply["token_strs"]) == len(reply["tokens"])
    back = shared.ask("POST", "/detokenize", json={"tokens": reply["tokens"]}).json()
    assert back["prompt"] == text
    chat = shared.ask("POST", "/tokenize", json={"messages": _MESSAGES}).json()
    assert tuple(chat["tokens"]) == offline(shared.llm).prompt_token_ids


def test_request_ids_come_back(shared: Running) -> None:
    reply = shared.ask("GET", "/version")
    assert len(reply.headers["x-request-id"]) == 32
    body = {"messages": _MESSAGES, "max_tokens": 1}
    mine = {"X-Request-Id": "mine-1"}
    named = shared.ask("POST", "/v1/chat/completions", headers=mine, json=body)
    assert named.headers["x-request-id"] == "mine-1"
    assert named.json()["id"] == "chatcmpl-mine-1"
    odd = shared.ask("GET", "/version", headers={"X-Request-Id": "a b<script>"})
    assert odd.headers["x-request-id"] != "a b<script>"


def test_penalties_and_bias_over_http(shared: Running) -> None:
    """Both routes answer as the engine does, and each field does something."""
    plain = offline(shared.llm, max_tokens=20)
    banned = {token: -100 for token in plain.token_ids}
    for fields in (
        {"presence_penalty": 2.0},
        {"frequency_penalty": 2},
        {"repetition_penalty": 5.0},
        {"logit_bias": banned},
    ):
        expected = offline(shared.llm, max_tokens=20, **fields)
        assert expected.token_ids != plain.token_ids
        reply = chat(shared, max_tokens=20, extra_body=fields)
        assert reply.choices[0].message.content == expected.text
        prompt = list(expected.prompt_token_ids)
        asked = {"model": "tiny", "prompt": prompt, "temperature": 0, "max_tokens": 20}
        made = shared.client().completions.create(**asked, extra_body=fields)
        assert made.choices[0].text == expected.text


def _form(schema: Any) -> dict[str, Any]:
    named = {"name": "answer", "strict": True, "schema": schema}
    return {"type": "json_schema", "json_schema": named}


_CALL: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"enum": ["search", "open"]}, "deep": {"type": "boolean"}},
    "required": ["name", "deep"],
    "additionalProperties": False,
}


def test_answers_follow_a_schema_streamed_or_not_and_many_at_once(shared: Running) -> None:
    asked = {"response_format": _form(_CALL), "max_tokens": 200, "temperature": 1.2, "seed": 5}
    reply = chat(shared, n=4, **asked)
    assert len({choice.message.content for choice in reply.choices}) > 1
    for choice in reply.choices:
        assert choice.finish_reason == "stop"
        jsonschema_rs.validate(_CALL, json.loads(choice.message.content))
    texts, reasons = ["", "", "", ""], set()
    for chunk in chat(shared, n=4, stream=True, **asked):
        [choice] = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        reasons.add(choice.finish_reason)
    assert texts == [choice.message.content for choice in reply.choices]
    assert reasons == {None, "stop"}
    prompts = {"prompt": ["x", "The fox"], "response_format": _form(_CALL), "max_tokens": 200}
    for made in shared.ask("POST", "/v1/completions", json=prompts).json()["choices"]:
        jsonschema_rs.validate(_CALL, json.loads(made["text"]))


def test_json_mode_begins_an_object_and_may_be_cut(shared: Running) -> None:
    [choice] = chat(shared, response_format={"type": "json_object"}, max_tokens=5).choices
    assert choice.message.content.startswith("{") and choice.finish_reason == "length"
