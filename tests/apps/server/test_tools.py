"""Tools and forms over the network, as OpenAI's client sees them."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from .conftest import Running

_TOOL: Any = {
    "type": "function",
    "function": {
        "name": "look",
        "parameters": {
            "type": "object",
            "properties": {"n": {"enum": [1, 2, 3]}, "on": {"type": "boolean"}},
            "required": ["n", "on"],
        },
    },
}
_ASKED: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "x"}],
    "max_tokens": 100,
    "temperature": 0,
    "tools": [_TOOL],
    "parallel_tool_calls": False,
}
_NAMED: Any = {"type": "function", "function": {"name": "look"}}


@pytest.fixture(autouse=True)
def short_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model's context has no room for the real one, byte by byte."""
    monkeypatch.setattr("kvshare_mm.tools._SYSTEM", "{tools}")


@pytest.mark.parametrize("choice", ["required", _NAMED], ids=["required", "named"])
def test_a_call_is_whole_and_valid(shared: Running, choice: Any) -> None:
    create = shared.client().chat.completions.create
    [whole] = create(**_ASKED, tool_choice=choice).choices
    assert whole.finish_reason == "tool_calls" and whole.message.content is None
    [call] = whole.message.tool_calls
    assert call.type == "function" and call.id.startswith("call_")
    assert call.function.name == "look"
    given = json.loads(call.function.arguments)
    assert given["n"] in (1, 2, 3) and isinstance(given["on"], bool) and len(given) == 2

    chunks = list(create(**_ASKED, tool_choice=choice, stream=True))
    deltas = [c.choices[0].delta for c in chunks if c.choices[0].delta.tool_calls]
    [piece] = [piece for delta in deltas for piece in delta.tool_calls]
    assert piece.index == 0 and piece.id and piece.function.name == "look"
    assert piece.function.arguments == call.function.arguments
    assert not any(c.choices[0].delta.content for c in chunks)
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_each_choice_has_calls_of_its_own(shared: Running) -> None:
    asked = {**_ASKED, "n": 3, "temperature": 1.5, "seed": 1, "tool_choice": "required"}
    whole = shared.client().chat.completions.create(**asked)
    streamed: dict[int, str] = {}
    for chunk in shared.client().chat.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            for call in choice.delta.tool_calls or ():
                assert call.index == 0
                streamed[choice.index] = call.function.arguments
    assert streamed == {
        choice.index: choice.message.tool_calls[0].function.arguments for choice in whole.choices
    }


@pytest.mark.parametrize("choice", ["auto", "none", None])
def test_words_stay_words(shared: Running, choice: Any) -> None:
    create = shared.client().chat.completions.create
    asked = {**_ASKED, "max_tokens": 12, "tool_choice": choice}
    [whole] = create(**asked).choices
    assert whole.finish_reason in ("stop", "length") and not whole.message.tool_calls
    said = "".join(c.choices[0].delta.content or "" for c in create(**asked, stream=True))
    assert said == whole.message.content and said


def test_a_cut_call_is_none(shared: Running) -> None:
    asked = {**_ASKED, "max_tokens": 8, "tool_choice": "required"}
    [choice] = shared.client().chat.completions.create(**asked).choices
    assert choice.finish_reason == "length" and not choice.message.tool_calls
    assert choice.message.content.startswith("<tool")


def test_calls_and_results_are_taken(shared: Running) -> None:
    client = shared.client()
    message = client.chat.completions.create(**_ASKED, tool_choice="required").choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "3"}
    messages = [*_ASKED["messages"], message.model_dump(exclude_none=True), result]
    reply = client.chat.completions.create(**{**_ASKED, "messages": messages, "max_tokens": 4})
    assert reply.usage.completion_tokens == 4


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ({"regex": "[A-Z]{3}-[0-9]{2}"}, "[A-Z]{3}-[0-9]{2}"),
        ({"choice": ["yes", 'a "quoted" no']}, 'yes|a "quoted" no'),
        ({"grammar": 'start: "a" ("b" | "c"){2}'}, "a[bc]{2}"),
        ({"grammar": 'root ::= "x" | "y"'}, "x|y"),
        ({"json": {"const": [1]}}, r"\[1\]"),
        ({"json": '{"const": [1]}', "regex": None}, r"\[1\]"),
    ],
    ids=str,
)
def test_answers_follow_vllms_forms(shared: Running, form: dict[str, Any], pattern: str) -> None:
    for path, more in (("chat", {}), ("completions", {"prompt": "x"})):
        body = {"structured_outputs": form, "max_tokens": 60, **more}
        reply = (
            shared.chat("x", **body)
            if path == "chat"
            else shared.ask("POST", "/v1/completions", json=body)
        )
        assert reply.status_code == 200, reply.text
        [choice] = reply.json()["choices"]
        text = choice["text"] if more else choice["message"]["content"]
        assert re.fullmatch(pattern, re.sub(r"\s+(?=1|\])", "", text)), text


@pytest.mark.parametrize(
    "form",
    [
        {}, {"regex": "a", "choice": ["b"]}, {"choice": []}, {"choice": [""]},
        {"choice": ["a"] * 1001},
        {"regex": 5}, {"regex": "("}, {"regex": "a" * 1001}, {"regex": "((a{99}){99}){99}"},
        {"regex": "a{1000000000}"}, {"regex": "a{2,}{2000}"}, {"json": "{"}, {"json": []},
        {"json": {"type": "array", "minItems": 10**9}}, {"structural_tag": "{}"},
        {"grammar": "start"}, {"grammar": "root ::= ("}, {"grammar": 'start: "a"\n' * 1000},
        {"grammar": 'start: "a"{1000000}'}, {"grammar": 'start: "a"~1..1000000'},
        # The way around the bounds of schemas.
        {"grammar": 'start: %json {"minItems": 1000000000}'}, {"grammar": "start: /(?P<a/"},
        {"grammar": '%llguidance {}\nstart: "a"'},
        {"grammar": '{"grammars": [{"json_schema": {}}]}'},
    ],
    ids=lambda form: repr(form)[:40],
)  # fmt: skip
def test_forms_that_are_none_are_refused(shared: Running, form: Any) -> None:
    reply = shared.chat("x", structured_outputs=form)
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"] == "structured_outputs"


def test_tools_of_a_bad_shape_are_refused(shared: Running) -> None:
    reply = shared.chat("x", tools=[{"type": "function", "function": {"name": "no spaces"}}])
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "tools[0].function.name")
    assert shared.chat("x", tool_choice="required").status_code == 400
