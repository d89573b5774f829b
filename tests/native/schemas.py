"""Schemas of answers that end by themselves, whatever the model."""

from __future__ import annotations

from typing import Any


def an_object(**properties: Any) -> dict[str, Any]:
    """An object with just these properties."""
    return {
        "type": "object",
        "properties": properties,
        "required": [*properties],
        "additionalProperties": False,
    }


_WORD = {"type": "string", "pattern": "^[a-z]{1,8}$"}
SCHEMAS: dict[str, dict[str, Any]] = {
    "flags": an_object(yes={"type": "boolean"}, no={"type": "null"}),
    "choices": an_object(colour={"enum": ["red", "blue", "grün"]}, kind={"const": "tool"}),
    "bounds": an_object(age={"type": "integer", "minimum": 0, "maximum": 120}, name=_WORD),
    "a list": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    "either": {"anyOf": [an_object(a=_WORD), an_object(b={"enum": [1, 2, 3]})]},
    "references": {
        "$defs": {"point": an_object(x={"enum": [0, 1]}, y={"enum": [0, 1]})},
        **an_object(
            start={"$ref": "#/$defs/point"},
            path={"type": "array", "items": {"$ref": "#/$defs/point"}, "maxItems": 2},
        ),
    },
    "a call": an_object(
        name={"enum": ["search", "open"]},
        arguments=an_object(city=_WORD, day={"type": "string", "format": "date"}),
    ),
}


def json_schema(schema: Any) -> dict[str, Any]:
    """As requests ask for it."""
    return {
        "type": "json_schema",
        "json_schema": {"name": "answer", "strict": True, "schema": schema},
    }
