"""Schemas written without oneOf, not, allOf and conditions: never wider, as wide where they can."""

from __future__ import annotations

from typing import Any

import jsonschema_rs
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvshare_mm.plain_schema import multiplies, plain
from kvshare_mm.schema_types import UNIQUE, CannotEnforceError

from .test_any_schema import _ANY, _with_definitions

_VALUES: list[Any] = [
    None, True, False, 0, 1, 2, 3, 5, -1, 4.0, 0.5, 2.5, 1e9, "", "a", "ab", "abc", "b7", "a\nb",
    "red", "7", "grün", [], [0], [1], [True], [1, 2], ["a"], [None, "a", 3], [[]], [True] * 4,
    ["red", "blue"], ["blue", "red"], ["red", "red"], [True, False], [1, True], [1, "a"], [1, 1.0],
    {}, {"a": 1},
    {"a": "x"}, {"b": 2}, {"a": 1, "b": 2}, {"a": None, "b": [], "c": {}}, {"x": 3}, {"x": 11},
    {"kind": "k0", "value": 1}, {"kind": "k1", "value": None}, {"kind": "k0"},
]  # fmt: skip
_KEYS = [[f"{a}{b}" for b in range(12)] for a in "abcdef"]
_A, _B = ({"type": "object", "properties": {n: {"type": "integer"}}} for n in "ab")
_NEEDS_A, _NEEDS_B = ({**each, "required": [*each["properties"]]} for each in (_A, _B))


def _unique(**keywords: Any) -> dict[str, Any]:
    return {"type": "array", "uniqueItems": True, **keywords}


def _with_unique(part: Any) -> Any:
    """What is marked as other readers know it."""
    if isinstance(part, list):
        return [*map(_with_unique, part)]
    if not isinstance(part, dict):
        return part
    return {"uniqueItems" if n == UNIQUE else n: _with_unique(v) for n, v in part.items()}


_EDGES: list[Any] = [
    {"not": {"type": "string"}},
    {"type": "string", "not": {"enum": ["a", "ab", "grün", "a\nb"]}},
    {"type": "string", "not": {"const": ""}},
    {"type": "integer", "not": {"enum": [1, 3.0]}},
    {"type": "number", "not": {"minimum": 1, "exclusiveMaximum": 3}},
    {"oneOf": [{"type": "integer", "minimum": 1}, {"type": "number", "maximum": 2}]},
    {"oneOf": [_NEEDS_A, _NEEDS_B]},
    {"oneOf": [{"type": "array", "minItems": 1}, {"type": "array", "maxItems": 2}]},
    {"type": "array", "not": {"prefixItems": [{"type": "integer"}], "minItems": 1}},
    {"allOf": [_NEEDS_A, {"properties": {"b": {"minimum": 2}}, "required": ["b"]}]},
    {"allOf": [{"type": "string", "pattern": "a"}, {"pattern": "b", "minLength": 2}]},
    {"$ref": "#/$defs/Point", "required": ["x"], "maxProperties": 1},
    {"if": {"type": "string"}, "then": {"minLength": 2}, "else": {"not": {"type": "object"}}},
    {"not": {"not": {"type": "string", "maxLength": 2}}},
    {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/Colour"}], "not": {"const": "red"}},
    _unique(items={"enum": ["a", "red", "blue", 1]}),
    _unique(items={"$ref": "#/$defs/Colour"}, minItems=1),
    _unique(items={"type": ["boolean", "null"]}, maxItems=2),
    _unique(items={"enum": [1, 1.0, True]}, contains={"const": 1}),
    _unique(items={"enum": [*range(19)]}, maxItems=1),
    _unique(prefixItems=[{"type": "integer"}, {"type": "string"}], items=False),
    _unique(prefixItems=[{"enum": [1, "a"]}, {"const": "a"}], items=False),
    {"allOf": [{"uniqueItems": True}, {"type": "array", "maxItems": 1}]},
    {"allOf": [{"uniqueItems": True}, {"type": "array", "minItems": 1}]},
    _unique(items={"type": "string"}, maxItems=2),
    _unique(items={"enum": [*range(6)]}),
]


_NOT_A = {"type": "string", "not": {"type": "string", "pattern": "^a"}}


@settings(max_examples=300, deadline=None)
@given(_ANY | st.tuples(_ANY, _ANY).map(lambda two: {"not": two[0], "anyOf": [two[1], {}]}))
@example({"oneOf": [{"type": "string"}, {"minLength": 2, **_NOT_A}]})
@example({"type": "array", "not": {"minItems": 1, "prefixItems": [_NOT_A]}})
@example({"allOf": [{"type": "array", "items": {"const": i}} for i in (0, False)]})
@example({"not": {"enum": [[True], [1]]}})
@example({"type": "array", "items": {"enum": [1, 2]}, "not": {"uniqueItems": True, "minItems": 2}})
@example(_unique(items={"enum": [1, 1.0, True, [1], [True]]}, maxItems=2))
@example({"oneOf": [{"type": "string", "format": "date"}, {"enum": [""]}]})
def test_what_fits_the_plain_one_fits(schema: Any) -> None:
    schema = _with_definitions(schema)
    try:
        written = _with_unique(plain(schema))
    except CannotEnforceError:
        return
    for value in _VALUES:
        if jsonschema_rs.is_valid(written, value):
            assert jsonschema_rs.is_valid(schema, value), (written, value)


@pytest.mark.parametrize("schema", _EDGES, ids=lambda schema: str(schema)[:60])
def test_nothing_is_lost_where_all_can_be_said(schema: Any) -> None:
    schema = _with_definitions(schema)
    written = _with_unique(plain(schema))
    assert not {"oneOf", "not", "if", "$ref"} & written.keys()
    for value in _VALUES:
        fits = jsonschema_rs.is_valid(schema, value)
        assert jsonschema_rs.is_valid(written, value) == fits, (written, value)


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"not": {}}, "nothing that fits"),
        ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, "nothing that fits"),
        ({"not": {"oneOf": [{"pattern": "a"}, {"pattern": "b"}]}}, "not around another"),
        (_unique(items={"type": "boolean"}, minItems=3), "nothing that fits"),
        ({"$ref": "#/properties/a", "minimum": 1}, r"\$ref"),
        ({"$ref": "http://127.0.0.1/a.json", "minimum": 1}, r"\$ref"),
        ({"allOf": [{"const": 1}, {"not": {"$ref": "#"}}]}, "too far"),
        ({"allOf": [{"anyOf": [{"maximum": i} for i in range(40)]}] * 3}, "combinations"),
        # Work for minutes, or for ever, if it were done.
        ({"oneOf": [{"enum": [*map(str, range(5000))]}, {"pattern": "^(a|aa|a*)*b$"}]}, "too many"),
        ({"oneOf": [{"const": "a" * 99}, {"pattern": r"^((a+)+)+\1$"}]}, "regex"),
        ({"type": "integer", "not": {"enum": [*range(0, 300, 2)]}}, "too many"),
        (
            {"type": "object", "not": {"enum": [dict.fromkeys(each, 1) for each in _KEYS]}},
            "too many",
        ),
        ({"oneOf": [{"const": "a"}, {"pattern": "((a{1,900}){1,900}){1,900}"}]}, "regex"),
        ({"oneOf": {}}, "a list"),
        ({"allOf": [{"exclusiveMinimum": True}, {}]}, "a number"),
    ],
    ids=str,
)
def test_what_cannot_be_said_is_named(schema: Any, said: str) -> None:
    with pytest.raises(CannotEnforceError, match=said):
        plain(schema)


def test_others_stay_as_they_are() -> None:
    """Also tagged unions, whose branches are told apart; references may go round."""
    node = {"$ref": "#/$defs/node"}
    tagged = [
        {"type": "object", "properties": {"kind": {"const": kind}, "next": node},
         "required": ["kind"]}
        for kind in "ab"
    ]  # fmt: skip
    for own in ({"type": "object"}, {"allOf": [_A]}, {"anyOf": tagged}):
        schema = {**own, "$defs": {"node": {"anyOf": tagged}}}
        assert plain(schema) == schema and not multiplies(schema)
    assert plain({"oneOf": tagged, "$defs": {"node": {"oneOf": tagged}}}) == {
        "anyOf": tagged,
        "$defs": {"node": {"anyOf": tagged}},
    }
