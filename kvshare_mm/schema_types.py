"""Schemas of one type each: two of them met, and one without the other.

An `Alternative` has a type and the keywords of that type alone, or ``{"enum": [...]}``. Patterns
that must all be found are a list, under ``patterns``. What stands inside stays a schema as it was
written, or an ``allOf`` and a ``not`` of such.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

Alternative = dict[str, Any]
Left = tuple[list[Alternative], bool]  # what is left, and whether that is all of it

_NUMBERS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}
_STRINGS = {"minLength", "maxLength", "pattern", "format"}
_ARRAYS = {"items", "prefixItems", "minItems", "maxItems", "uniqueItems", "contains",
           "minContains", "maxContains", "unevaluatedItems", "additionalItems"}  # fmt: skip
_OBJECTS = {"properties", "required", "additionalProperties", "patternProperties", "minProperties",
            "maxProperties", "propertyNames", "dependentRequired", "dependentSchemas",
            "dependencies", "unevaluatedProperties"}  # fmt: skip
KEYWORDS = {"integer": _NUMBERS, "number": _NUMBERS, "string": _STRINGS, "array": _ARRAYS,
            "object": _OBJECTS}  # fmt: skip
# What can be met and taken away; the others stay where they stand alone.
_KNOWN = {"type", "items", "prefixItems", "minItems", "maxItems", "properties", "required",
          "additionalProperties", "minProperties", "maxProperties", "patterns", "minLength",
          "maxLength", "format", "uniqueItems", *_NUMBERS} - {"multipleOf"}  # fmt: skip
UNIQUE = "x-unique-items"  # `uniqueItems` that is followed beside the grammar
MAX_PATTERN = 200  # characters
MAX_ALTERNATIVES = 100
_MAX_PREFIX = 50


class CannotEnforceError(ValueError):
    """A schema that a grammar cannot express; says the keyword."""


def of_type(kind: str, schema: Mapping[str, Any]) -> Alternative:
    """What a schema says of one type."""
    own: Alternative = {"type": kind, **{k: v for k, v in schema.items() if k in KEYWORDS[kind]}}
    for name in ("exclusiveMinimum", "exclusiveMaximum"):
        if isinstance(own.get(name), bool):
            raise CannotEnforceError(f"{name} must be a number")
    if isinstance(own.get("items"), list):
        raise CannotEnforceError("items must be a schema; for a list of schemas use prefixItems")
    if "pattern" in own:
        own["patterns"] = [own.pop("pattern")]
    if own.get("uniqueItems") is False:
        del own["uniqueItems"]
    return own


def meet(a: Alternative, b: Alternative) -> Alternative | None:
    """What fits both; None: their types have nothing in common.

    Raises:
        CannotEnforceError: it cannot be written.
    """
    if a["type"] != b["type"] and {a["type"], b["type"]} != {"integer", "number"}:
        return None
    kind = "integer" if "integer" in (a["type"], b["type"]) else a["type"]
    a, b = {**a, "type": kind}, {**b, "type": kind}
    for one, other in ((a, b), (b, a)):
        if len(other) == 1 or _same(one, other):
            return one
        for name in one.keys() - _KNOWN:
            if not _same(one[name], other.get(name)) or name == "patternProperties":
                raise CannotEnforceError(f"{name} that other keywords are combined with")
    met = {**a, **b}
    if kind in ("integer", "number"):
        (low, high), (low_b, high_b) = bounds(a), bounds(b)
        return _bounded(met, max(low, low_b), min(high, high_b))
    for name in ("minLength", "minItems", "minProperties"):
        if name in met:
            met[name] = int(max(at_least(a, name), at_least(b, name)))
    for name in ("maxLength", "maxItems", "maxProperties"):
        if name in met:
            met[name] = int(min(at_most(a, name), at_most(b, name)))
    if a.get("format", met.get("format")) != met.get("format"):
        raise CannotEnforceError("two formats at once")
    if "patterns" in met:
        met["patterns"] = list(dict.fromkeys([*a.get("patterns", []), *b.get("patterns", [])]))
    if kind == "array":
        _meet_items(met, a, b)
    if kind == "object":
        _meet_properties(met, a, b)
    return met


def less(a: Alternative, b: Alternative) -> Left:
    """What fits `a` and not `b`, which have a type in common."""
    if wider := b.keys() - (_KNOWN - {"uniqueItems"}) - {"format"}:
        # More is taken away: less is left, which may be.
        if "patternProperties" in wider:
            wider = {*wider, "additionalProperties"}
        return less(a, {k: v for k, v in b.items() if k not in wider})[0], False
    if a["type"] in ("integer", "number"):
        return _less_numbers(a, b)
    if a["type"] == "string":
        return _less_strings(a, b)
    return _less_items(a, b) if a["type"] == "array" else _less_properties(a, b)


def less_values(a: Alternative, values: Sequence[Any]) -> Left:
    """What fits `a` and is none of these values, all of which fit it."""
    left, exact = [a], True
    if a["type"] == "string":
        return ([a], True) if not values else _less_texts(a, values)
    for value in values:
        parts: list[Alternative] = []
        for part in left:
            found, all_of_it = _less_value(part, value)
            parts += found
            exact = exact and all_of_it
        left = [part for part in parts if not _no_number(part)]
        if len(left) > MAX_ALTERNATIVES:
            raise CannotEnforceError("enum or const of values that are too many to be left out")
    return left, exact


def _no_number(a: Alternative) -> bool:
    if a["type"] not in ("integer", "number"):
        return False
    low, high = bounds(a)
    return low > high


def _less_value(a: Alternative, value: Any) -> Left:
    if a["type"] in ("integer", "number"):
        return _less_numbers(a, {"type": "number", "minimum": value, "maximum": value})
    if a["type"] == "array":
        whole = {"prefixItems": [{"const": v} for v in value], "minItems": len(value)}
        return _less_items(a, {"type": "array", **whole, "maxItems": len(value)})
    just: Alternative = {"type": "object", "required": [*value], "additionalProperties": False}
    just["properties"] = {name: {"const": v} for name, v in value.items()}
    return _less_properties(a, just)


# -- numbers --------------------------------------------------------------------------------

Bound = tuple[float, int]  # a number, and -1, 0 or 1: just below it, at it, just above it


def bounds(a: Alternative) -> tuple[Bound, Bound]:
    """The least and the largest number, as what can be compared."""
    low = max((a.get("minimum", -math.inf), 0), (a.get("exclusiveMinimum", -math.inf), 1))
    high = min((a.get("maximum", math.inf), 0), (a.get("exclusiveMaximum", math.inf), -1))
    if a["type"] == "integer":
        if math.isfinite(low[0]):
            low = (math.floor(low[0]) + 1, 0) if low[1] else (math.ceil(low[0]), 0)
        if math.isfinite(high[0]):
            high = (math.ceil(high[0]) - 1, 0) if high[1] else (math.floor(high[0]), 0)
    return low, high


def _bounded(a: Alternative, low: Bound, high: Bound) -> Alternative:
    free = {k: v for k, v in a.items() if k not in _NUMBERS - {"multipleOf"}}
    if math.isfinite(low[0]):
        free["exclusiveMinimum" if low[1] else "minimum"] = low[0]
    if math.isfinite(high[0]):
        free["exclusiveMaximum" if high[1] else "maximum"] = high[0]
    return free


def _less_numbers(a: Alternative, b: Alternative) -> Left:
    (low, high), (low_b, high_b) = bounds(a), bounds(b)
    parts = []
    if math.isfinite(low_b[0]):
        parts.append(_bounded(a, low, min(high, (low_b[0], low_b[1] - 1))))
    if math.isfinite(high_b[0]):
        parts.append(_bounded(a, max(low, (high_b[0], high_b[1] + 1)), high))
    kept = [part for part in parts if not _let_through(part)]
    # Between two integers there are numbers that no schema can name.
    exact = a["type"] == "integer" or b["type"] == "number"
    return kept, exact and len(kept) == len(parts)


def _let_through(a: Alternative) -> bool:
    """Ranges within which llguidance also takes the integer that bounds them and is excluded."""
    (low, above), (high, below) = bounds(a)
    out = (above and float(low).is_integer()) or (below and float(high).is_integer())
    return bool(out) and a["type"] == "number" and high - low < 1


# -- strings --------------------------------------------------------------------------------


def _less_strings(a: Alternative, b: Alternative) -> Left:
    parts = []
    if (least := b.get("minLength", 0)) > 0:
        parts.append({**a, "maxLength": int(min(at_most(a, "maxLength"), least - 1))})
    if "maxLength" in b:
        parts.append({**a, "minLength": int(max(at_least(a, "minLength"), b["maxLength"] + 1))})
    # A format may be a remark only: then every string has it.
    return parts, not {"patterns", "format"} & b.keys()


def _less_texts(a: Alternative, texts: Sequence[str]) -> Left:
    pattern = f"^{_none_of(sorted(set(texts)))}$"
    if len(pattern) > MAX_PATTERN:
        raise CannotEnforceError("enum or const of texts that are too long to be left out")
    return [{**a, "patterns": [*a.get("patterns", []), pattern]}], True


def _none_of(texts: Sequence[str]) -> str:
    """A regular expression of all strings but these."""
    by_first: dict[str, list[str]] = {}
    for text in texts:
        if text:
            by_first.setdefault(text[0], []).append(text[1:])
    ways = [] if "" in texts else [""]
    if by_first:
        ways.append(f"[^{''.join(map(_spelled, by_first))}]{_ANYTHING}")
        ways += [f"{_spelled(first)}{_none_of(rest)}" for first, rest in by_first.items()]
    else:
        ways.append(f"{_ANY}{_ANYTHING}")
    return f"(?:{'|'.join(ways)})"


_ANY, _ANYTHING = r"[\s\S]", r"[\s\S]*"


def _spelled(character: str) -> str:
    return character if character.isalnum() else rf"\x{{{ord(character):x}}}"


# -- lists ----------------------------------------------------------------------------------


def item(a: Alternative, index: int) -> Any:
    """The schema of an item."""
    first = a.get("prefixItems", [])
    return first[index] if index < len(first) else a.get("items", True)


def _meet_items(met: Alternative, a: Alternative, b: Alternative) -> None:
    size = max(len(a.get("prefixItems", [])), len(b.get("prefixItems", [])))
    if size:
        met["prefixItems"] = [_and(item(a, i), item(b, i)) for i in range(size)]
    if "items" in met:
        met["items"] = _and(a.get("items", True), b.get("items", True))


def _less_items(a: Alternative, b: Alternative) -> Left:
    parts = []
    if (least := b.get("minItems", 0)) > 0:
        parts.append({**a, "maxItems": int(min(at_most(a, "maxItems"), least - 1))})
    if "maxItems" in b:
        parts.append({**a, "minItems": int(max(at_least(a, "minItems"), b["maxItems"] + 1))})
    first = b.get("prefixItems", [])
    others = b.get("items", True) is not True and b["items"] != {}
    if len(first) > _MAX_PREFIX:
        raise CannotEnforceError("prefixItems that are too many to be left out")
    for i in range(len(first) + others):
        at = [item(a, j) for j in range(max(i + 1, len(a.get("prefixItems", []))))]
        at[i] = _and(at[i], {"not": item(b, i)})
        parts.append({**a, "prefixItems": at, "minItems": int(max(at_least(a, "minItems"), i + 1))})
    return parts, not others


# -- objects --------------------------------------------------------------------------------


def value_of(a: Alternative, name: str) -> Any:
    """A schema that a property must follow, those for patterns of names aside."""
    named: dict[str, Any] = a.get("properties", {})
    others = True if "patternProperties" in a else a.get("additionalProperties", True)
    return named.get(name, others)


def _meet_properties(met: Alternative, a: Alternative, b: Alternative) -> None:
    names = dict.fromkeys([*a.get("properties", {}), *b.get("properties", {})])
    if names:
        met["properties"] = {name: _and(value_of(a, name), value_of(b, name)) for name in names}
    if "required" in met:
        met["required"] = list(dict.fromkeys([*a.get("required", []), *b.get("required", [])]))
    if "additionalProperties" in met:
        others = (each.get("additionalProperties", True) for each in (a, b))
        met["additionalProperties"] = _and(*others)


def _less_properties(a: Alternative, b: Alternative) -> Left:
    if "patternProperties" in a:
        raise CannotEnforceError("patternProperties that other keywords are combined with")
    parts = []
    properties, required = a.get("properties", {}), a.get("required", [])

    def with_value(name: str, value: Any, needed: bool = True) -> Alternative:
        changed = {**a, "properties": {**properties, name: value}}
        return {**changed, "required": [*dict.fromkeys([*required, name])]} if needed else changed

    parts += [
        with_value(name, False, needed=False)
        for name in b.get("required", [])
        if name not in required
    ]
    parts += [
        with_value(name, _and(value_of(a, name), {"not": value}))
        for name, value in b.get("properties", {}).items()
        if value is not True and value != {} and value_of(a, name) is not False
    ]
    others = b.get("additionalProperties", True)
    others = others is not True and others != {}
    if others:
        parts += [
            with_value(name, _and(value, {"not": b["additionalProperties"]}))
            for name, value in properties.items()
            if name not in b.get("properties", {}) and value is not False
        ]
    some = a.get("additionalProperties", True) is not False
    counted = {"minProperties", "maxProperties"} & b.keys()
    return parts, not ((others and some) or counted)


def _and(a: Any, b: Any) -> Any:
    if b is True or b == {} or _same(a, b):
        return a
    if a is True or a == {}:
        return b
    return False if a is False or b is False else {"allOf": [a, b]}


def _same(a: Any, b: Any) -> bool:
    """Python's 1 is its True."""
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)


def at_least(a: Alternative, name: str) -> float:
    """Of a keyword like `minItems`."""
    return max(0.0, float(a.get(name, 0)))


def at_most(a: Alternative, name: str) -> float:
    """Of a keyword like `maxItems`."""
    return float(a.get(name, math.inf))
