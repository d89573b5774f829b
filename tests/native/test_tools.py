"""Calls of tools: how a prompt offers them, what an answer makes of them, what is refused."""

from __future__ import annotations

import json
from typing import Any

import jsonschema_rs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvshare_mm import InvalidRequestError, KVShare, RequestOptions
from kvshare_mm.calls import CallReader
from kvshare_mm.outputs import ToolCall
from kvshare_mm.tools import Style, Tools, closed, spelled, style_of

from .schemas import SCHEMAS, an_object

_MESSAGES = [{"role": "user", "content": "What is the weather in Rome?"}]
_OBJECTS = {name: schema for name, schema in SCHEMAS.items() if schema.get("type") == "object"}


@pytest.fixture(scope="module")
def llm(long_llm: KVShare) -> KVShare:
    return long_llm


def tool(name: str, parameters: Any = None, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


TOOLS = [tool(name.replace(" ", "_"), schema) for name, schema in _OBJECTS.items()]
ONE = {"type": "function", "function": {"name": "bounds"}}


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("choice", ["required", ONE], ids=str)
def test_a_random_model_calls_what_it_must(llm: KVShare, choice: Any, parallel: bool) -> None:
    for seed in range(4):
        output = llm.chat(
            _MESSAGES, tools=TOOLS, tool_choice=choice, parallel_tool_calls=parallel,
            max_tokens=1500, temperature=1.0, seed=seed,
        )  # fmt: skip
        assert output.finish_reason == "stop" and output.content == ""
        assert 1 <= len(output.tool_calls) <= (16 if parallel and choice == "required" else 1)
        for call in output.tool_calls:
            assert choice == "required" or call.name == "bounds"
            jsonschema_rs.validate(
                _OBJECTS[call.name.replace("_", " ")], json.loads(call.arguments)
            )


def test_an_answer_may_be_of_a_form_or_a_call(llm: KVShare) -> None:
    form = {"type": "json_schema", "json_schema": {"schema": {"const": [True]}}}
    seen = set()
    for seed in range(8):
        output = llm.chat(
            _MESSAGES, tools=TOOLS[:1], response_format=form, max_tokens=900, temperature=2.0,
            seed=seed, parallel_tool_calls=False,
        )  # fmt: skip
        seen.add(bool(output.tool_calls))
        if not output.tool_calls:
            assert json.loads(output.content) == [True]
    assert seen == {True, False}


def test_a_tool_without_parameters_is_called_with_none(llm: KVShare) -> None:
    tools = [{"type": "function", "function": {"name": "now"}}]
    output = llm.chat(
        _MESSAGES, tools=tools, tool_choice="required", parallel_tool_calls=False, max_tokens=300
    )
    assert output.tool_calls == (ToolCall("now", "{}"),)


def test_arguments_that_no_tool_names_are_not_made() -> None:
    """Unless its schema speaks of them, here or where it is combined with another."""
    open_, named = {"type": "object", "properties": {"a": {}}}, {"additionalProperties": False}
    free, shared = {**open_, "additionalProperties": True}, {**open_, "anyOf": [open_]}
    for schema, expected in [
        (open_, {**open_, **named}),
        (free, free),
        (shared, shared),
        ({}, {"type": "object", "properties": {}, **named}),
        ({"$ref": "#/$defs/x", "$defs": {"x": open_}},
         {"$ref": "#/$defs/x", "$defs": {"x": {**open_, **named}}}),
        ({"type": "object", "properties": {"type": {"const": open_}}},
         {"type": "object", "properties": {"type": {"const": open_}}, **named}),
    ]:  # fmt: skip
        assert closed(schema) == expected
    assert closed({"not": open_, "type": "object"})["not"] == open_


def test_a_prompt_of_tools_is_a_donor_like_any(llm: KVShare) -> None:
    options = RequestOptions(cache_salt="tools")
    asked: dict[str, Any] = {"tools": TOOLS, "tool_choice": "required", "max_tokens": 300}
    first = llm.chat(_MESSAGES, options=options, **asked)
    llm.flush()
    again = llm.chat(_MESSAGES, options=options, **asked)
    assert again.provenance.recomputed == 1 and again.token_ids == first.token_ids
    fewer = llm.chat(_MESSAGES, options=options, tools=TOOLS[1:], max_tokens=4)
    assert fewer.provenance.exact + fewer.provenance.reused > 0
    assert len(fewer.prompt_token_ids) < len(first.prompt_token_ids)


def test_calls_and_results_are_part_of_the_prompt(llm: KVShare) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "a", "arguments": '{"n": [1]}'}}
    messages = [
        *_MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "nineteen degrees"},
    ]
    ids = llm.chat(messages, tools=[tool("a")], max_tokens=1).prompt_token_ids
    text = llm.tokenizer.decode(ids)
    told = ['"name": "a"', '{"name": "a", "arguments": {"n": [1]}}', "nineteen degrees"]
    places = [text.find(each) for each in told]
    assert -1 not in places and places == sorted(places)


# -- reading answers ------------------------------------------------------------------------

_CALL = '<tool_call>\n{"name": "a", "arguments": {"x": "</tool_call> <tool_call>"}}\n</tool_call>'
_A = ToolCall("a", '{"x": "</tool_call> <tool_call>"}')
_ANSWERS: list[tuple[Style, str, list[str | ToolCall]]] = [
    ("hermes", "Just words.\n", ["Just words.\n"]),
    ("hermes", "", []),
    ("hermes", _CALL, [_A]),
    ("hermes", f"Let me see.\n{_CALL}\n{_CALL}\n", ["Let me see.", _A, _A]),
    ("hermes", _CALL.removesuffix("</tool_call>"), [_A]),
    ("hermes", _CALL[:-20], [_CALL[:-20]]),
    ("hermes", "a < b <tool_", ["a < b <tool_"]),
    ("hermes", f"<tool_call>no</tool_call>{_CALL}", ["<tool_call>no</tool_call>", _A]),
    ("hermes", _CALL.replace('"a"', '"b"'), [_CALL.replace('"a"', '"b"')]),
    ("hermes", '{"name": "a", "arguments": {}}', ['{"name": "a", "arguments": {}}']),
    ("llama", '{"name": "a", "parameters": {"x": 1}}', [ToolCall("a", '{"x": 1}')]),
    ("llama", ' {"name": "a", "parameters": {}}; {"name": "a", "parameters": {"y": []}}',
     [ToolCall("a", "{}"), ToolCall("a", '{"y": []}')]),
    ("llama", 'I say {"name": "a", "parameters": {}}', ['I say {"name": "a", "parameters": {}}']),
    ("llama", '{"name": "b", "parameters": {}} ', ['{"name": "b", "parameters": {}} ']),
    ("llama", '{"name": "a", "parameters"', ['{"name": "a", "parameters"']),
]  # fmt: skip


@pytest.mark.parametrize(("style", "text", "told"), _ANSWERS)
def test_calls_are_told_from_words(style: Style, text: str, told: list[str | ToolCall]) -> None:
    """However the answer is cut into pieces."""
    tools = Tools.of([tool("a")])
    assert tools is not None
    for size in (1, 3, 7, 1000):
        reader, found = CallReader(tools, style), list[str | ToolCall]()
        for at in range(0, len(text), size):
            found += reader.feed(text[at : at + size])
        found += reader.end()
        calls = [each for each in found if isinstance(each, ToolCall)]
        assert calls == [each for each in told if isinstance(each, ToolCall)]
        words = "".join(each for each in found if isinstance(each, str))
        assert words == "".join(each for each in told if isinstance(each, str))


_PIECES = st.sampled_from(
    ["<tool_call>", "</tool_call>", '{"name": "a"}', " ", "\n", "x", '"', "{", "<"]
)


@given(st.lists(_PIECES), st.sampled_from(["hermes", "llama"]))
def test_without_a_call_nothing_is_lost(pieces: list[str], style: Style) -> None:
    tools = Tools.of([tool("b")])
    assert tools is not None
    reader = CallReader(tools, style)
    told = [each for piece in pieces for each in reader.feed(piece)] + reader.end()
    assert "".join(map(str, told)) == "".join(pieces)


@pytest.mark.parametrize(("choice", "told"), [(None, _A), ("none", _CALL)])
def test_one_call_at_most_unless_several_may_come_or_none(
    choice: str | None, told: ToolCall | str
) -> None:
    tools = Tools.of([tool("a")], choice, False)
    assert tools is not None
    repeated = _CALL if choice else _CALL + _CALL
    assert CallReader(tools, "hermes").feed(repeated) == [told]


def test_templates_say_how_calls_are_written() -> None:
    assert style_of("{% for m in messages %}{{ m.content }}{% endfor %}") is None
    assert style_of("{% if tools %}<tool_call>{% endif %}") == "hermes"
    llama = """{% if tools %}{{ '{"name": function name, "parameters": dictionary}' }}{% endif %}"""
    assert style_of(llama) == "llama"
    assert spelled("llama", "a")[0] == '{"name": "a", "parameters": '


# -- what is refused ------------------------------------------------------------------------

_LOOP: dict[str, Any] = {}
_LOOP["properties"] = {"self": _LOOP}


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({"tools": 5}, "tools"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [tool("a b")]}, "tools[0].function.name"),
        ({"tools": [tool("a", description=5)]}, "tools[0].function.description"),
        ({"tools": [tool("a", {"type": "string"})]}, "tools[0].function.parameters"),
        ({"tools": [tool("a", _LOOP)]}, "tools[0].function"),
        ({"tools": [tool("a"), tool("a")]}, "tools[1].function"),
        ({"tools": [tool(f"t{i}") for i in range(129)]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"function": {"name": "nobody"}, "type": "function"}},
         "tool_choice"),
        ({"tools": TOOLS, "parallel_tool_calls": "no"}, "parallel_tool_calls"),
        # The bounds of schemas hold for each tool, and for all together.
        ({"tools": [*TOOLS, tool("x", an_object(a={"type": "array", "minItems": 10**9}))],
          "tool_choice": "required"}, "tools"),
        ({"tools": [tool(f"t{i}", an_object(a={"pattern": f"^{i}{{3}}$"})) for i in range(9)],
          "tool_choice": "required"}, "tools"),
        ({"tools": [tool(f"t{i}", an_object(a={"const": "x" * 3000})) for i in range(12)],
          "tool_choice": "required"}, "tools"),
        ({"tools": [tool("a", an_object(a={"not": {}}))], "tool_choice": "required"}, "tools"),
    ],
)  # fmt: skip
def test_tools_that_are_none_are_refused(llm: KVShare, asked: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        llm.read(_MESSAGES, **asked)
    assert raised.value.field == field


@pytest.mark.parametrize(
    ("calls", "field"),
    [
        ("no", ".tool_calls"),
        ([{}], ".tool_calls[0].function"),
        ([{"function": {"name": "a", "arguments": "[1]"}}], ".tool_calls[0].function.arguments"),
        ([{"function": {"name": "a", "arguments": "{"}}], ".tool_calls[0].function.arguments"),
        ([{"function": {"name": "a", "arguments": _LOOP}}], ".tool_calls[0].function.arguments"),
    ],
)
def test_calls_that_are_none_are_refused(llm: KVShare, calls: Any, field: str) -> None:
    message = {"role": "assistant", "content": "", "tool_calls": calls}
    with pytest.raises(InvalidRequestError) as raised:
        llm.read([*_MESSAGES, message])
    assert raised.value.field == f"messages[1]{field}"


def test_tools_are_for_chats(llm: KVShare) -> None:
    with pytest.raises(InvalidRequestError, match="messages"):
        llm.generate("Hi", tools=TOOLS)
