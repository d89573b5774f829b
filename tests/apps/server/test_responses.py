"""/v1/responses as OpenAI's client sees it: it answers as the chat does, in other words."""

from __future__ import annotations

import json
from itertools import groupby
from typing import Any

import pytest
from openai.types.responses import Response

from .conftest import Running
from .test_tools import short_system  # noqa: F401

_TOOL: dict[str, Any] = {
    "type": "function",
    "name": "look",
    "parameters": {"type": "object", "properties": {"n": {"enum": [1, 2, 3]}}, "required": ["n"]},
    "strict": True,
}
_ASKED: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_output_tokens": 12}
_MADE: dict[str, Any] = {
    "tools": [_TOOL],
    "tool_choice": {"type": "function", "name": "look"},
    "parallel_tool_calls": False,
    "max_output_tokens": 100,
}
_CALL = {"type": "function_call", "call_id": "c1", "name": "look", "arguments": '{"n": 1}'}
_RESULT = {"type": "function_call_output", "call_id": "c1", "output": "3"}


def said(role: str, kind: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": kind, "text": text}]}


def chat(running: Running, *messages: dict[str, Any], **fields: Any) -> Any:
    return running.client().chat.completions.create(
        model="tiny", messages=messages, temperature=0, max_tokens=12, **fields
    )


def test_it_answers_as_the_chat_does(shared: Running) -> None:
    """The same prompt, token for token: so it is reused."""
    calls = [
        {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"n": 1}'}}
    ]
    function = {k: v for k, v in _TOOL.items() if k != "type"}
    tools = [{"type": "function", "function": function}]
    items = [
        said("user", "input_text", "Hi"), said("assistant", "output_text", "Ho"), _CALL,
        {**_CALL, "call_id": "c2"}, _RESULT,
        {**_RESULT, "output": [{"type": "input_text", "text": "3"}]},
    ]  # fmt: skip
    brief = {"role": "system", "content": "Be brief."}
    told = [
        brief,
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho", "tool_calls": calls * 2},
        *[{"role": "tool", "tool_call_id": "c1", "content": "3"}] * 2,
    ]
    user = {"role": "user", "content": "Hi"}
    for asked, messages, more in (
        ({"input": "Hi"}, [user], {}),
        (
            {"input": [{**user, "type": "message"}], "instructions": "Be brief."},
            [told[0], user],
            {},
        ),
        ({"input": items, "instructions": "Be brief.", "tools": [_TOOL]}, told, {"tools": tools}),
    ):
        expected = chat(shared, *messages, **more)
        shared.llm.flush()
        reply = shared.client().responses.create(**asked, **_ASKED)
        assert reply.output_text == expected.choices[0].message.content != ""
        used, known = reply.usage, expected.usage
        assert used is not None
        assert (used.input_tokens, used.output_tokens) == (
            known.prompt_tokens, known.completion_tokens,
        )  # fmt: skip
        assert used.total_tokens == known.total_tokens
        assert used.input_tokens_details.cached_tokens == used.input_tokens - 1
        assert reply.model_extra["kvshare"]["exact"] == used.input_tokens - 1  # type: ignore[index]
        assert reply.id.startswith("resp_") and reply.model == "tiny"


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({}, "incomplete"),
        ({"extra_body": {"stop": " "}}, "completed"),
        (_MADE, "completed"),
        ({**_MADE, "max_output_tokens": 8}, "incomplete"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"const": [1]}}},
          "max_output_tokens": 60}, "completed"),
    ],
    ids=["text", "stop", "calls", "a cut call", "schema"],
)  # fmt: skip
def test_a_stream_adds_up_to_the_whole(shared: Running, fields: Any, status: str) -> None:
    create = shared.client().responses.create
    asked = {"input": "x", **_ASKED, "metadata": {"a": "b"}, **fields}
    whole = create(**asked)
    shown = whole.model_dump(by_alias=True)
    shown["usage"]["input_tokens_details"]["cache_write_tokens"] = 0  # nobody is billed for those
    Response.model_validate(shown)
    assert whole.status == status and whole.metadata == {"a": "b"}
    cut = whole.incomplete_details and whole.incomplete_details.reason
    assert cut == ("max_output_tokens" if status == "incomplete" else None)
    assert {item.type for item in whole.output} == (
        {"function_call"} if status == "completed" and "tools" in fields else {"message"}
    )
    for item in whole.output:
        if item.type == "function_call":
            assert json.loads(item.arguments)["n"] in (1, 2, 3) and item.name == "look"
            assert item.call_id.startswith("call_") and item.status == "completed"
        else:
            assert item.type == "message" and item.status == status

    events = list(create(**asked, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    expected = ["created", "in_progress"]
    for item in whole.output:
        inside = ["function_call_arguments.delta", "function_call_arguments.done"]
        if item.type == "message":
            deltas = ["output_text.delta"] if whole.output_text else []
            inside = ["content_part.added", *deltas, "output_text.done", "content_part.done"]
        expected += ["output_item.added", *inside, "output_item.done"]
    once = [kind for kind, _ in groupby(kinds)]
    assert once == [*expected, status]
    final = events[-1].response  # type: ignore[union-attr]
    text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert text == final.output_text == whole.output_text
    done = [e.item for e in events if e.type == "response.output_item.done"]
    assert done == final.output
    without = {"id", "call_id"}
    assert [item.model_dump(exclude=without) for item in done] == [
        item.model_dump(exclude=without) for item in whole.output
    ]
    assert final.usage.output_tokens == whole.usage.output_tokens  # type: ignore[union-attr]
    assert final.model_extra["kvshare"]["recomputed"] > 0  # type: ignore[index]


def test_events_have_names_and_no_end_mark(shared: Running) -> None:
    body = {"input": "x", "max_output_tokens": 2, "stream": True}
    lines = shared.ask("POST", "/v1/responses", json=body).text.strip().split("\n")
    assert lines[0] == "event: response.created"
    assert lines[-2] == "event: response.incomplete" and lines[-1].startswith("data: {")


def test_what_goes_wrong_behind_the_first_event_is_told(
    shared: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> Any:
        raise RuntimeError("broken")

    monkeypatch.setattr("kvshare_mm.apps.server.response_items.usage", broken)
    *_, last = shared.client().responses.create(input="x", stream=True, **_ASKED)
    assert last.type == "response.failed" and last.response.status == "failed"
    assert last.response.error is not None and last.response.error.code == "server_error"
    assert "broken" not in last.response.error.message


_PICTURE = {"type": "input_image", "image_url": "ftp://x.example/"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"include": ["reasoning.encrypted_content"]}, "include"),
        ({"reasoning": {"effort": "low"}}, "reasoning"),
        ({"truncation": "auto"}, "truncation"),
        ({"prompt": {"id": "x"}}, "prompt"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"tools": [{"type": "function", "name": "no spaces"}]}, "tools[0].name"),
        ({"tools": [_TOOL], "tool_choice": {"type": "file_search"}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format"),
        ({"text": {"format": {"type": "json_schema", "schema": {"not": {}}}}}, "text.format"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"input": []}, "input"),
        ({"input": " "}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0]"),
        ({"input": [_RESULT, {"role": "user"}]}, "input[1].content"),
        ({"input": [said("user", "text", "x")]}, "input[0].content[0]"),
        ({"input": [{**_RESULT, "output": [_PICTURE]}], "instructions": "x"},
         "input[0].output[0].image_url"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "x"}]}]},
         "input[0].content[0]"),
        ({"input": [{**_RESULT, "output": " "}]}, "input"),
        ({"input": [_RESULT, _CALL, {**_CALL, "arguments": "[]"}]}, "input[2].arguments"),
        ({"input": [{k: v for k, v in _CALL.items() if k != "call_id"}]}, "input[0].call_id"),
        ({"input": [_CALL] * 1_025}, "input"),
        ({"input": [_RESULT] * 10_000, "instructions": "x"}, "input"),
        ({"model": "other"}, "model"),
    ],
    ids=lambda each: str(each)[:60],
)  # fmt: skip
def test_what_is_not_done_is_refused_by_name(
    shared: Running, fields: dict[str, Any], param: str
) -> None:
    reply = shared.ask("POST", "/v1/responses", json={"input": "x", **fields})
    assert reply.status_code == (404 if param == "model" else 400), reply.text
    assert reply.json()["error"]["param"] == param, reply.text
    assert "messages[" not in reply.text


@pytest.mark.parametrize(
    ("method", "path"), [("GET", ""), ("DELETE", ""), ("GET", "/input_items"), ("POST", "/cancel")]
)
def test_nothing_is_stored(shared: Running, method: str, path: str) -> None:
    made = shared.client().responses.create(input="x", store=True, **_ASKED)
    assert made.model_extra["store"] is False  # type: ignore[index]
    reply = shared.ask(method, f"/v1/responses/{made.id}{path}")
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "not_stored")
