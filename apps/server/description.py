"""What the API's description says of fields beyond their types: ranges, as clients can check them.

They are checked where they are used, with words of their own; this is how they are told.
"""

from __future__ import annotations

from typing import Any

_TOKEN = {"minimum": 0}
_LIMITS: dict[str, dict[str, Any]] = {
    "max_tokens": {"minimum": 1},
    "max_completion_tokens": {"minimum": 1},
    "temperature": {"minimum": 0, "maximum": 100},
    "top_p": {"exclusiveMinimum": 0, "maximum": 1},
    "top_k": {"minimum": -1},
    "min_p": {"minimum": 0, "maximum": 1},
    "presence_penalty": {"minimum": -2, "maximum": 2},
    "frequency_penalty": {"minimum": -2, "maximum": 2},
    "repetition_penalty": {"exclusiveMinimum": 0},
    "logit_bias": {
        "propertyNames": {"pattern": "^[0-9]{1,9}$"},
        "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
    },
    "response_format": {
        "properties": {"type": {"enum": ["text", "json_object", "json_schema"]}},
        "required": ["type"],
    },
    "structured_outputs": {
        "properties": {
            "regex": {"type": "string", "minLength": 1},
            "grammar": {"type": "string", "minLength": 1},
            "choice": {"type": "array", "minItems": 1, "items": {"type": "string"}},
            "json": {"type": ["object", "string"]},
        },
        "minProperties": 1,
        "maxProperties": 1,
        "additionalProperties": False,
    },
    "tools": {
        "items": {
            "type": "object",
            "properties": {
                "type": {"const": "function"},
                "function": {
                    "type": "object",
                    "properties": {
                        "name": {"type": "string", "pattern": "^[A-Za-z0-9_.-]{1,64}$"},
                        "description": {"type": "string"},
                        "parameters": {"type": "object"},
                    },
                    "required": ["name"],
                },
            },
            "required": ["type", "function"],
        },
    },
    "seed": {"minimum": -(2**63), "maximum": 2**64 - 1},
    "stop": {"items": {"minLength": 1}},
    "n": {"minimum": 1},
    "logprobs": {"minimum": 0, "maximum": 20},
    "top_logprobs": {"minimum": 0, "maximum": 20},
    "cache_salt": {"pattern": r"^[^@/\\\x00]{1,128}$"},
    "max_divergence": {"minimum": 0},
    "tokens": {"items": {"type": "integer", **_TOKEN}},
    "prompt": {"minItems": 1, "items": {"minItems": 1, **_TOKEN, "items": _TOKEN}},
}


def _part(kind: str, value: dict[str, Any], **more: dict[str, Any]) -> dict[str, Any]:
    named = {"type": {"const": kind}, kind: value, **more}
    return {"properties": named, "required": ["type", kind]}


_URL = {"type": "object", "properties": {"url": {"type": "string"}}, "required": ["url"]}
_SOUND = {
    "type": "object",
    "properties": {"data": {"type": "string"}, "format": {"enum": ["wav", "mp3", "flac"]}},
    "required": ["data", "format"],
}
_PARTS = [
    _part("text", {"type": "string"}),
    _part("image_url", {"anyOf": [{"type": "string"}, _URL]}),
    _part("input_audio", _SOUND),
    _part("video_url", {"anyOf": [{"type": "string"}, _URL]}, fps={"type": "number"}),
]


def limits(schema: dict[str, Any]) -> None:
    """Add the ranges of a body's fields to its JSON schema."""
    for name, field in schema.get("properties", {}).items():
        field.update(_LIMITS.get(name, {}))


def kinds_of_parts(schema: dict[str, Any]) -> None:
    """Add the four kinds that a part of a message can be of to its JSON schema."""
    schema["oneOf"] = _PARTS


def content_is_needed(schema: dict[str, Any]) -> None:
    """Say of a message's JSON schema that its content must be there, unless it has calls."""
    kinds = [k for k in schema["properties"]["content"]["anyOf"] if k != {"type": "null"}]
    calls = {"type": "array", "minItems": 1}
    schema["anyOf"] = [
        {"required": ["content"], "properties": {"content": {"anyOf": kinds}}},
        {"required": ["tool_calls"], "properties": {"tool_calls": calls}},
    ]


def _kinds(name: str, /, **fields: dict[str, Any]) -> dict[str, Any]:
    """An object of this type, which needs all of these fields."""
    return {"properties": {"type": {"const": name}, **fields}, "required": ["type", *fields]}


_TEXT: dict[str, Any] = {"type": "string"}
_CONTENT = {
    "anyOf": [
        _TEXT,
        {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "anyOf": [
                    _kinds("input_text", text=_TEXT),
                    _kinds("output_text", text=_TEXT),
                    _kinds("input_image", image_url=_TEXT),
                    _kinds("input_audio", input_audio=_SOUND),
                ],
            },
        },
    ]
}
_SAID = _kinds(
    "message", role={"enum": ["user", "assistant", "system", "developer"]}, content=_CONTENT
)
_RESPONSE_LIMITS: dict[str, dict[str, Any]] = {
    **_LIMITS,
    "input": {
        "minItems": 1,
        "items": {
            "type": "object",
            "anyOf": [
                {**_SAID, "required": ["role", "content"]},
                _kinds("function_call", call_id=_TEXT, name=_TEXT, arguments=_TEXT),
                _kinds("function_call_output", call_id=_TEXT, output=_CONTENT),
            ],
        },
    },
    "max_output_tokens": {"minimum": 1},
    "format": _LIMITS["response_format"],
    "tools": {
        "items": {
            "type": "object",
            "properties": {
                "type": {"const": "function"},
                **_LIMITS["tools"]["items"]["properties"]["function"]["properties"],
            },
            "required": ["type", "name"],
        }
    },
}


def response_limits(schema: dict[str, Any]) -> None:
    """`limits`, of a body of /v1/responses."""
    for name, field in schema.get("properties", {}).items():
        field.update(_RESPONSE_LIMITS.get(name, {}))
