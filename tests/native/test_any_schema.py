"""Schemas that hypothesis makes up, and a model without a mind: its answers are valid.

``KVSHARE_SCHEMAS=500`` tries that many; how many were refused, and why, is printed (``pytest -s``).
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from kvshare_mm import InvalidRequestError, KVShare

from .schemas import json_schema

_WHOLE = st.integers(-(2**53), 2**53)
_LEAVES: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.sampled_from(
        [{"type": "boolean"}, {"type": "null"}, {"type": "integer"}, {"type": "number"},
         {"type": ["string", "null"], "maxLength": 3}, {"$ref": "#/$defs/Colour"},
         {"$ref": "#/$defs/Point"}, {"type": "string", "format": "date"},
         {"type": "string", "format": "uuid"}, {"type": "string", "pattern": "^[a-c]{1,3}$"},
         {"type": "string", "pattern": "[0-9]$"}, {"type": "number", "exclusiveMinimum": 0.5},
         {"type": "integer", "multipleOf": 5}, {"not": {"type": "string"}}, {},
         {"type": "array", "uniqueItems": True},
         {"type": "array", "uniqueItems": True, "items": {"enum": ["a", "b", 1, True, None]}}]
    ),
    st.tuples(st.integers(-99, 99), st.integers(0, 99)).map(
        lambda at: {"type": "integer", "minimum": at[0], "maximum": sum(at)}
    ),
    st.tuples(st.integers(0, 3), st.integers(0, 3)).map(
        lambda at: {"type": "string", "minLength": at[0], "maxLength": sum(at)}
    ),
    st.lists(st.one_of(st.text(max_size=4), _WHOLE, st.booleans(), st.none()),
             min_size=1, max_size=4).map(lambda values: {"enum": values}),
    st.one_of(st.text(max_size=4), _WHOLE, st.none()).map(lambda value: {"const": value}),
)  # fmt: skip


def _object(drawn: tuple[dict[str, Any], list[bool], bool | None]) -> dict[str, Any]:
    properties, needed, more = drawn
    required = [name for name, yes in zip(properties, needed, strict=False) if yes]
    named = {"type": "object", "properties": properties, "required": required}
    return named if more is None else {**named, "additionalProperties": more}


def _tagged(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """As pydantic writes discriminated unions."""
    return {
        "discriminator": {"propertyName": "kind"},
        "oneOf": [
            _object(({"kind": {"const": f"k{i}"}, "value": part}, [True, True], False))
            for i, part in enumerate(parts)
        ],
    }


def _around(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    names = st.text('ab $é"', min_size=1, max_size=4)
    flags = st.lists(st.booleans(), min_size=4, max_size=4)
    few = st.lists(inner, min_size=1, max_size=3)
    return st.one_of(
        st.tuples(st.dictionaries(names, inner, max_size=4), flags,
                  st.sampled_from([None, False, False])).map(_object),
        st.tuples(inner, st.integers(0, 2), st.integers(0, 2)).map(
            lambda at: {"type": "array", "items": at[0], "minItems": at[1],
                        "maxItems": at[1] + at[2]}
        ),
        few.map(lambda parts: {"type": "array", "prefixItems": parts, "minItems": len(parts),
                               "items": False}),
        few.map(lambda parts: {"anyOf": parts}),
        few.map(lambda parts: {"oneOf": parts}),
        few.map(_tagged),
        few.map(lambda parts: {"allOf": parts}),
        inner.map(lambda part: {"anyOf": [part, {"type": "null"}], "default": None}),
    )  # fmt: skip


_ANY = st.recursive(_LEAVES, _around, max_leaves=8)
_DEFINITIONS = {
    "Colour": {"enum": ["red", "blue"], "title": "Colour"},
    "Point": _object(({"x": {"type": "integer", "maximum": 9, "minimum": 0}}, [True], False)),
}


def _with_definitions(schema: dict[str, Any]) -> dict[str, Any]:
    return {**schema, "$defs": _DEFINITIONS}


def _finite(number: str) -> float:
    """JSON's numbers have any size."""
    return min(max(float(number), -1e300), 1e300)


_NUM = int(os.environ.get("KVSHARE_SCHEMAS", "60"))


@pytest.fixture
def roomy_llm(tiny_folder: Path, tmp_path: Path) -> Iterator[KVShare]:
    """Has room for what a model says that does not know when to end."""
    folder = tmp_path / "roomy"
    shutil.copytree(tiny_folder, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 8192}))
    with KVShare(str(folder), embedder=None, max_num_seqs=1, audit_share=0) as llm:
        yield llm


def test_answers_are_valid_or_there_are_none(roomy_llm: KVShare) -> None:
    counts: Counter[str] = Counter()
    seen: list[Any] = [None, True, 0, 0.5, 60, -3, "", "a", "aaa", "a0", [], [0], ["a"], {}]

    @settings(
        max_examples=_NUM, deadline=None, database=None, suppress_health_check=list(HealthCheck),
        phases=[Phase.generate], derandomize=True,
    )  # fmt: skip
    @given(_ANY.map(_with_definitions), st.integers(0, 1000))
    def check(schema: Any, seed: int) -> None:
        try:
            output = roomy_llm.generate(
                "x", max_tokens=None, temperature=1.0, seed=seed,
                response_format=json_schema(schema),
            )  # fmt: skip
        except InvalidRequestError as error:
            assert error.field == "response_format"
            counts["refused: " + str(error)[17:]] += 1
            assert "too many" in str(error) or not any(
                jsonschema_rs.is_valid(schema, v) for v in seen
            )
            return
        counts[output.finish_reason] += 1
        if output.finish_reason == "stop":
            answer = json.loads(output.text, parse_float=_finite)
            assert jsonschema_rs.is_valid(schema, answer), (schema, output.text)
            seen.append(answer)

    check()
    for reason, count in counts.most_common():
        print(count, reason)
    assert counts["stop"] > 0.9 * _NUM
