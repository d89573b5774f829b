"""Schemas without `oneOf`, `not`, `allOf` and conditions, for a grammar that knows none of them.

Lists whose items must differ are marked with `UNIQUE`: `unique_items` follows them.

A schema is taken apart into alternatives of one type each, of which two can be intersected and one
taken from another. Where that can be written only in part, less is allowed than the schema allows,
never more: an answer is valid, but some valid ones cannot be given.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

from kvshare_mm.schema_types import (
    KEYWORDS,
    MAX_ALTERNATIVES,
    UNIQUE,
    Alternative,
    CannotEnforceError,
    Left,
    at_least,
    at_most,
    bounds,
    item,
    less,
    less_values,
    meet,
    of_type,
    value_of,
)

_MAX_STEPS = 3_000  # parts looked at: a third of a second
_MAX_NEEDED = 20  # items of a list whose schemas are looked at
_TYPES = ("null", "boolean", "number", "string", "array", "object")
_ASSERTED = {"type", "enum", "const", "allOf", "anyOf", "oneOf", "not", "if"}.union(
    *KEYWORDS.values()
)
_DEFINITIONS = ("$defs", "definitions")
_HAVE_ONE = {"items", "additionalProperties", "contains", "propertyNames", "not", "if", "then",
             "else", "unevaluatedItems", "unevaluatedProperties", "additionalItems"}  # fmt: skip
_HAVE_MANY = {"properties", "patternProperties", "dependentSchemas", *_DEFINITIONS}
_HAVE_LISTS = {"allOf", "anyOf", "oneOf", "prefixItems"}


def plain(schema: Mapping[str, Any]) -> Any:
    """The schema in words that the grammar knows; as it is, if it has no others.

    Raises:
        CannotEnforceError: there is no such schema, or it is not found in time.
    """
    try:
        written = _Reader(schema).written(schema, top=True)
    except RecursionError as error:
        raise CannotEnforceError("allOf, oneOf, not and $ref are nested too far") from error
    if written is False:
        raise CannotEnforceError(
            "allOf, oneOf and not leave nothing that fits the schema and can be enforced"
        )
    return written


def multiplies(part: Any) -> bool:
    """Whether anything in a schema must hold beside another schema."""
    if isinstance(part, list):
        return any(map(multiplies, part))
    if not isinstance(part, dict):
        return False
    return _holds_beside(part) or any(map(multiplies, part.values()))


def _holds_beside(schema: Mapping[str, Any]) -> bool:
    several = schema.get("allOf")
    return (isinstance(several, list) and len(several) > 1) or (
        isinstance(schema.get("$ref"), str) and bool(schema.keys() & _ASSERTED)
    )


def _needs_it(schema: Mapping[str, Any]) -> bool:
    known = {"oneOf", "not", "if"} & schema.keys() or schema.get("uniqueItems") is True
    return bool(known) or _holds_beside(schema)


class _Reader:
    """Reads one schema.

    Args:
        root: where `$ref` leads.
    """

    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        self._left = _MAX_STEPS

    # -- schemas to schemas -----------------------------------------------------------------

    def written(self, schema: Any, top: bool = False) -> Any:
        """The schema without what the grammar does not know; False: nothing fits it."""
        self._step()
        if not isinstance(schema, dict):
            return schema
        if not _needs_it(schema):
            return {name: self._inside(name, value) for name, value in schema.items()}
        if self._only_tells_apart(schema):
            rest = {name: self._inside(name, value) for name, value in schema.items()}
            rest["anyOf"] = rest.pop("oneOf")
            return rest
        alternatives, _ = self.alternatives(schema)
        shown = [self._shown(each) for each in alternatives]
        shown = [each for each in shown if each.get("enum") != []]
        if not shown:
            return False
        one = shown[0] if len(shown) == 1 else {"anyOf": shown}
        definitions = {
            name: self._inside(name, schema[name]) for name in _DEFINITIONS if name in schema
        }
        return {**one, **definitions} if top else one

    def _inside(self, name: str, value: Any) -> Any:
        if name in _HAVE_MANY and isinstance(value, dict):
            return {key: self.written(each) for key, each in value.items()}
        if name in _HAVE_LISTS and isinstance(value, list):
            return [self.written(each) for each in value]
        return self.written(value) if name in _HAVE_ONE else value

    def _only_tells_apart(self, schema: Mapping[str, Any]) -> bool:
        """Whether all that must be rewritten is a `oneOf` whose branches have nothing in common."""
        if {"anyOf", "$ref"} & schema.keys() or "oneOf" not in schema:
            return False
        if _needs_it({name: value for name, value in schema.items() if name != "oneOf"}):
            return False
        branches = [self.alternatives(branch) for branch in _listed(schema, "oneOf")]
        return all(all_of_it for _, all_of_it in branches) and all(
            self._apart(a, b)
            for (some, _), (others, _) in combinations(branches, 2)
            for a in some
            for b in others
        )

    def _shown(self, alternative: Alternative) -> Any:
        if alternative.get("uniqueItems") is True:
            alternative = self._unique(alternative)
        return _worded({name: self._inside(name, value) for name, value in alternative.items()})

    # -- schemas to alternatives --------------------------------------------------------------

    def alternatives(self, schema: Any) -> Left:
        """What fits the schema, and whether that is all that fits."""
        self._step()
        if isinstance(schema, bool):
            schema = {} if schema else {"enum": []}
        if not isinstance(schema, dict):
            raise CannotEnforceError("a schema must be an object or a boolean")
        found, exact = self._own(schema), True
        for part in self._together(schema):
            more, all_of_it = self.alternatives(part)
            found, exact = self._both(found, more), exact and all_of_it
        if "anyOf" in schema:
            parts = [self.alternatives(part) for part in _listed(schema, "anyOf")]
            found = self._both(found, [each for part, _ in parts for each in part])
            exact = exact and all(all_of_it for _, all_of_it in parts)
        if "oneOf" in schema:
            one, all_of_it = self._exactly_one(_listed(schema, "oneOf"))
            found, exact = self._both(found, one), exact and all_of_it
        if "if" in schema:
            yes = {"allOf": [schema["if"], schema.get("then", True)]}
            no = {"allOf": [{"not": schema["if"]}, schema.get("else", True)]}
            one, all_of_it = self.alternatives({"anyOf": [yes, no]})
            found, exact = self._both(found, one), exact and all_of_it
        if "not" in schema:
            found, all_of_it = self._without(found, schema["not"], "not")
            exact = exact and all_of_it
        return found, exact

    def _own(self, schema: Mapping[str, Any]) -> list[Alternative]:
        if "$dynamicRef" in schema:
            raise CannotEnforceError("$dynamicRef cannot be enforced")
        types = schema.get("type", _TYPES)
        found: list[Alternative] = []
        for each in [types] if isinstance(types, str) else types:
            if each in ("null", "boolean"):
                found.append({"enum": [None] if each == "null" else [False, True]})
            elif each in KEYWORDS:
                found.append(of_type(each, schema))
            else:
                raise CannotEnforceError(f"type {str(each)[:60]!r}")
        values = [schema["enum"]] if "enum" in schema else []
        values += [[schema["const"]]] if "const" in schema else []
        for some in values:
            if not isinstance(some, list):
                raise CannotEnforceError("enum must be a list")
            found = self._both(found, [{"enum": some}])
        return [each for each in found if not self._empty(each)]

    def _together(self, schema: Mapping[str, Any]) -> Iterator[Any]:
        if "allOf" in schema:
            yield from _listed(schema, "allOf")
        if "$ref" not in schema:
            return
        match = re.fullmatch(r"#(?:/(\$defs|definitions)/([^/]+))?", str(schema["$ref"]))
        if match is None:
            raise CannotEnforceError(f"$ref to {str(schema['$ref'])[:60]!r} beside other keywords")
        if match[1] is None:
            yield self._root
            return
        name = match[2].replace("~1", "/").replace("~0", "~")
        named = self._root.get(match[1], {})
        if name not in named:
            raise CannotEnforceError(f"$ref to {name[:60]!r}, which there is not")
        yield named[name]

    def _exactly_one(self, branches: Sequence[Any]) -> Left:
        found: list[Alternative] = []
        exact = True
        for i, branch in enumerate(branches):
            left, all_of_it = self.alternatives(branch)
            for other in (*branches[:i], *branches[i + 1 :]):
                left, still = self._without(left, other, "oneOf")
                all_of_it = all_of_it and still
            found += left
            exact = exact and all_of_it
        return found, exact

    # -- lists whose items must differ --------------------------------------------------------

    def _unique(self, a: Alternative) -> Alternative:
        """The same lists without `uniqueItems`: it holds anyway, or they are marked."""
        first, others = a.get("prefixItems", []), a.get("items", True)
        most = len(first) if others is False else math.inf
        most = min(most, at_most(a, "maxItems"))
        if most <= _MAX_NEEDED:
            pairs = combinations([item(a, i) for i in range(int(most))], 2)
            if all(self._never_equal(one, other) for one, other in pairs):
                return {name: value for name, value in a.items() if name != "uniqueItems"}
        values = self._values([*first, others])
        if values is not None and len(values) < at_least(a, "minItems"):
            return {"enum": []}
        return {**{name: a[name] for name in a if name != "uniqueItems"}, UNIQUE: True}

    def _never_equal(self, one: Any, other: Any) -> bool:
        (some, all_of_some), (others, all_of_others) = map(self.alternatives, (one, other))
        known = all_of_some and all_of_others
        return known and all(self._apart(a, b) for a in some for b in others)

    def _values(self, schemas: Sequence[Any]) -> list[Any] | None:
        """All that fits any of these schemas; None: more than a few, or that is not known."""
        found: dict[str, Any] = {}  # by their JSON: Python's 1 is its True
        for schema in schemas:
            alternatives, all_of_it = self.alternatives(schema)
            if not all_of_it or any("enum" not in each for each in alternatives):
                return None
            found |= {
                json.dumps(v, sort_keys=True): v for each in alternatives for v in each["enum"]
            }
        return [*found.values()]

    # -- of alternatives ----------------------------------------------------------------------

    def _both(self, some: Sequence[Alternative], others: Sequence[Alternative]) -> Any:
        found = [self._meet(a, b) for a in some for b in others]
        left = [each for each in found if each is not None and not self._empty(each)]
        if len(left) > MAX_ALTERNATIVES:
            raise CannotEnforceError("allOf, anyOf and oneOf have too many combinations")
        return left

    def _meet(self, a: Alternative, b: Alternative) -> Alternative | None:
        self._step()
        if "enum" not in a and "enum" not in b:
            return meet(a, b)
        a, b = (a, b) if "enum" in a else (b, a)
        fits = self._fitting(b, formats=True)
        return {"enum": [v for v in a["enum"] if fits(v)]}

    def _without(self, some: Sequence[Alternative], schema: Any, keyword: str) -> Left:
        taken, all_of_it = self.alternatives(schema)
        if not all_of_it:  # then more would be left than may be
            raise CannotEnforceError(f"{keyword} around another not or oneOf cannot be enforced")
        left, exact = list(some), True
        for other in taken:
            parts = [self._less(each, other) for each in left]
            left = [each for part, _ in parts for each in part if not self._empty(each)]
            exact = exact and all(still for _, still in parts)
            if len(left) > MAX_ALTERNATIVES:
                raise CannotEnforceError(f"{keyword} has too many combinations")
        return left, exact

    def _less(self, a: Alternative, b: Alternative) -> Left:
        """Of `a` what is not in `b`, and whether that is all of it."""
        self._step()
        if "enum" in a:
            fits = self._fitting(b, formats=False)
            return [{"enum": [v for v in a["enum"] if not fits(v)]}], True
        if self._apart(a, b):
            return [a], True
        if "enum" in b:
            return less_values(a, list(filter(self._fitting(a, formats=False), b["enum"])))
        return less(a, b)

    def _apart(self, a: Alternative, b: Alternative) -> bool:
        """Whether it is known that nothing fits both."""
        try:
            if "enum" in a or "enum" in b:
                a, b = (a, b) if "enum" in a else (b, a)
                # A format may be a remark only: then every string has it.
                return not any(map(self._fitting(b, formats=False), a["enum"]))
            return not self._both([a], [b])
        except CannotEnforceError:
            return False

    def _empty(self, alternative: Alternative) -> bool:
        """Whether it is known that nothing fits."""
        if "enum" in alternative:
            return not alternative["enum"]
        kind = alternative["type"]
        if kind in ("integer", "number"):
            low, high = bounds(alternative)
            return low > high
        if kind == "string":
            return at_least(alternative, "minLength") > at_most(alternative, "maxLength")
        if kind == "array":
            least = at_least(alternative, "minItems")
            needed = [item(alternative, i) for i in range(min(int(least), _MAX_NEEDED))]
            most = at_most(alternative, "maxItems")
        else:
            needed = [value_of(alternative, name) for name in alternative.get("required", ())]
            needed.sort(key=lambda part: len(str(part)))  # tags before what is long to compare
            least = max(at_least(alternative, "minProperties"), len(needed))
            most = at_most(alternative, "maxProperties")
        return least > most or any(map(self._nothing, needed))

    def _nothing(self, schema: Any) -> bool:
        if isinstance(schema, bool) or not schema:
            return schema is False
        if "$ref" in schema and len(schema) == 1:
            return False  # it may lead back here
        left, all_of_it = self.alternatives(schema)
        return all_of_it and not left

    def _fitting(self, alternative: Alternative, formats: bool) -> Callable[[Any], bool]:
        """Whether a value fits."""
        import jsonschema_rs

        def nowhere(uri: str) -> Any:
            raise CannotEnforceError(f"$ref to {uri[:60]!r}")

        shown = _worded(alternative)
        if '"$ref": "#"' in str(shown).replace("'", '"'):
            raise CannotEnforceError("$ref to '#' beside enum or const")
        named = {name: self._root[name] for name in _DEFINITIONS if name in self._root}
        try:
            known = jsonschema_rs.validator_for(
                {**shown, **named},
                validate_formats=formats,
                retriever=nowhere,
                # In linear time, as the grammar: without lookaround and references to groups.
                pattern_options=jsonschema_rs.RegexOptions(),
            )
        except ValueError as error:
            raise CannotEnforceError(str(error).partition("\n")[0][:100]) from error

        def fits(value: Any) -> bool:
            self._step()
            return bool(known.is_valid(value))

        return fits

    def _step(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise CannotEnforceError(
                "allOf, oneOf, not, uniqueItems and $ref are too many or nested too far"
            )


def _worded(alternative: Alternative) -> dict[str, Any]:
    """An alternative as a schema."""
    shown = dict(alternative)
    if patterns := shown.pop("patterns", None):
        shown["pattern"], *more = patterns
        if more:
            shown["allOf"] = [{"pattern": each} for each in more]
    return shown


def _listed(schema: Mapping[str, Any], name: str) -> list[Any]:
    if not isinstance(schema[name], list):
        raise CannotEnforceError(f"{name} must be a list")
    return list(schema[name])
