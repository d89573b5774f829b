"""Lists whose items must differ, and a model that says the same again and again."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import jsonschema
import pytest

from kvshare_mm import InvalidRequestError, KVShare
from kvshare_mm.forms import Form
from kvshare_mm.grammar import Grammar, Grammars

from .schemas import an_object, json_schema


def _unique(items: Any = True, **keywords: Any) -> dict[str, Any]:
    return {"type": "array", "uniqueItems": True, "items": items, **keywords}


_LETTER = {"type": "string", "pattern": "^[ab]{1,2}$"}
_COLOURS = ["red", "redder", "reddest", "green", "grün", 'a"b', "a\\", "a"]
_NODE = {"$defs": {"node": _unique({"$ref": "#/$defs/node"}, maxItems=3)}, "$ref": "#/$defs/node"}
LISTS: dict[str, dict[str, Any]] = {
    "anything": _unique(minItems=2, maxItems=5),
    "colours": _unique({"enum": _COLOURS}, minItems=8),
    "texts": _unique({"type": "string", "maxLength": 1}, minItems=4, maxItems=4),
    "patterns": _unique(_LETTER, minItems=6),
    "dates": _unique({"type": "string", "format": "date"}, minItems=3, maxItems=3),
    "few integers": _unique({"type": "integer", "minimum": -3, "maximum": 3}, minItems=7),
    "integers": _unique({"type": "integer"}, minItems=4, maxItems=4),
    "shares": _unique({"type": "number", "minimum": 0, "maximum": 1}, minItems=3, maxItems=4),
    "multiples": _unique({"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 20},
                         minItems=5),
    "switches": _unique(an_object(a={"type": "boolean"}, b={"type": "boolean"}), minItems=4),
    "points": _unique(an_object(x={"enum": [0, 1]}, y={"type": "integer", "maximum": 1,
                                                       "minimum": 0}), minItems=4),
    "maps": _unique({"type": "object", "additionalProperties": {"type": "boolean"}}, minItems=2,
                    maxItems=3),
    "pairs": _unique({"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 2},
                     minItems=4),
    "sets of sets": _unique(_unique({"type": "boolean"}), minItems=5),
    "first ones": {"type": "array", "uniqueItems": True, "minItems": 3, "maxItems": 3,
                   "prefixItems": [{"enum": [1]}, {"enum": [1, 2, 3]}], "items": {"const": 2}},
    "trees": _NODE,
    "beside others": an_object(tags=_unique({"enum": [*range(9)]}, minItems=2),
                               same={"type": "array", "items": {"type": "null"}, "minItems": 2}),
    "either": {"anyOf": [_unique({"type": "boolean"}, maxItems=2), {"type": "null"}]},
}  # fmt: skip


@pytest.mark.parametrize("name", LISTS)
def test_answers_that_end_are_valid(llm: KVShare, name: str) -> None:
    """However little the model cares; and none comes where nothing is left to say."""
    schema, reasons = LISTS[name], Counter[str]()
    for seed in range(3):
        output = llm.generate(
            "x", max_tokens=400, temperature=(0.3, 1.0, 3.0)[seed % 3], seed=seed,
            response_format=json_schema(schema), logit_bias=_short(llm),
        )  # fmt: skip
        reasons[output.finish_reason] += 1
        if output.finish_reason == "stop":
            jsonschema.validate(json.loads(output.text), schema)
    assert reasons["stop"] > 0


def _short(llm: KVShare) -> dict[int, float]:
    """A bias to texts and lists that end soon, and to no blanks."""
    texts = {i: llm.tokenizer.decode([i]) for i in range(len(llm.tokenizer))}
    blanks = {i: -20.0 for i, text in texts.items() if text.isspace()}
    return blanks | {i: 4.0 for i, text in texts.items() if text in ('"', "]", "}")}


def test_all_are_said_where_no_more_may_come(llm: KVShare) -> None:
    form = json_schema(LISTS["colours"])
    output = llm.generate("x", max_tokens=400, response_format=form, logit_bias=_short(llm))
    assert sorted(json.loads(output.text)) == sorted(_COLOURS)


def _said(grammar: Grammar, llm: KVShare, text: str) -> None:
    for token in llm.tokenizer.encode(text):
        assert grammar.allowed(len(llm.tokenizer))[token]
        assert grammar.add(token) is None, text


def _refuses(grammar: Grammar, llm: KVShare, text: str) -> bool:
    [token] = llm.tokenizer.encode(text)
    refused = grammar.add(token)
    return refused is not None and token in refused


def _begun(llm: KVShare, schema: Any, said: str) -> Grammar:
    grammar = Grammars(llm.tokenizer, frozenset({llm.tokenizer.eos_token_id})).of(
        Form("json", schema)
    )
    assert grammar is not None
    _said(grammar, llm, said)
    return grammar


@pytest.mark.parametrize(
    ("items", "said", "refused", "possible"),
    [
        ({"type": "string"}, '["a", "a', '"', "b"),
        ({"type": "string", "maxLength": 2}, '["ab", "a', "b", "c"),
        ({"enum": ["red", "reddish", "rest"]}, '["red", "reddish", "re', "d", "s"),
        ({"type": "boolean"}, "[true, ", "t", "f"),
        ({"type": "boolean"}, "[true, false", ",", "]"),
        ({"type": "number"}, "[1, 1.0", "]", "5"),
        ({"type": "number", "maximum": 1}, "[1, ", "1", "0"),
        ({"type": "integer"}, "[0, -", "0", "1"),
        ({}, '["1", 1, [1.0], [1', "]", "2"),
        ({}, '[{"a": 1, "b": 2}, {"b": 2, "a": 1', "}", ","),
        (an_object(a={"type": "boolean"}, b={"const": "much"}), '[{"a": true, "b": "much"}, {"a":',
         "t", "f"),
        ({"type": "string"}, '["\\n", "\\u000a', '"', "b"),
        ({"enum": ["a\n"]}, '["a\\n"', ",", "]"),
        (_unique({"type": "boolean"}), "[[false, true], [false", ",", "]"),
        ({"type": "integer", "minimum": 0, "maximum": 2}, "[2, 0, ", "2", "1"),
        (_unique({"type": "integer"}), "[[1, 2], [1, 2", "]", ","),
        (_unique({"type": "integer"}), "[[1, 2], [1, 1", "]", "0"),
    ],
)  # fmt: skip
def test_what_would_end_in_an_equal_item_is_not_begun(
    llm: KVShare, items: Any, said: str, refused: str, possible: str
) -> None:
    grammar = _begun(llm, _unique(items), said)
    assert _refuses(grammar, llm, refused)
    assert not _refuses(grammar, llm, possible)


def test_equal_items_may_stand_where_the_schema_takes_them(llm: KVShare) -> None:
    tags = _unique({"$ref": "#/$defs/tag"})
    schema = {
        "$defs": {"tag": {"enum": ["a", "b"]}, "tags": tags},
        **an_object(one={"$ref": "#/$defs/tags"}, two={"type": "array", "items": {"const": "a"}}),
    }
    grammar = _begun(llm, schema, '{"one": ["a", "b"], "two": ["a", "a", "a')
    assert not _refuses(grammar, llm, '"')


def test_where_nothing_is_left_the_request_ends_alone(llm: KVShare) -> None:
    """A pattern of which nobody counts the words."""
    form = json_schema(_unique({"type": "string", "pattern": "^[ab]$"}, minItems=3))
    with pytest.raises(InvalidRequestError, match="must have more") as raised:
        llm.generate("x", max_tokens=400, response_format=form, logit_bias=_short(llm))
    assert raised.value.field == "response_format"
    assert llm.healthy


def test_what_takes_too_long_ends_the_request_alone(llm: KVShare) -> None:
    item = {"type": "string", "pattern": "^[ab]{10}$"}
    grammar = _begun(llm, _unique(item), "[")
    with pytest.raises(InvalidRequestError, match="too much alike"):
        for i in range(1 << 10):
            text = f"{i:010b}".replace("0", "a").replace("1", "b")
            _said(grammar, llm, f'{", " if i else ""}"{text}"')


def test_arguments_of_tools(long_llm: KVShare) -> None:
    tools = [
        {"type": "function", "function": {"name": name, "parameters": an_object(tags=tags)}}
        for name, tags in (("tag", LISTS["colours"]), ("count", LISTS["few integers"]))
    ]
    called = []
    for seed in range(6):
        output = long_llm.chat(
            [{"role": "user", "content": "Hi"}], tools=tools, tool_choice="required",
            max_tokens=400, temperature=2.0, seed=seed, parallel_tool_calls=False,
        )  # fmt: skip
        called += output.tool_calls
    for call in called:
        tags = json.loads(call.arguments)["tags"]
        assert len(tags) == len({*tags}) == (8 if call.name == "tag" else 7)
    assert called
