"""Where in a schema the parts of a JSON text stand, and where items of a list must differ."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import unquote

from kvshare_mm.schema_types import UNIQUE, CannotEnforceError

_KEPT = 256  # places whose parts are remembered


class Places:
    """The places of one schema; a place is the numbers of the schemas that may hold there.

    Args:
        schema: lists whose items must differ are marked with `UNIQUE`.

    Raises:
        CannotEnforceError: a `$ref` of which it is not known where it leads.
    """

    def __init__(self, schema: Mapping[str, Any]) -> None:
        self._whole = schema
        self._schemas: list[Mapping[str, Any]] = []
        self._numbers: dict[int, int] = {}  # by the schema's id
        self._num_first = 0  # items at most that have a schema of their own
        self._check()
        self.root = self._place([schema])
        self._found = lru_cache(_KEPT)(self._inside)

    def unique(self, place: tuple[int, ...]) -> bool:
        """Whether items of a list there must differ."""
        return any(self._schemas[i].get(UNIQUE) is True for i in place)

    def inside(self, place: tuple[int, ...], at: str | int) -> tuple[int, ...]:
        """Where the property of that name is, or the item of that number."""
        return self._found(place, min(at, self._num_first) if isinstance(at, int) else at)

    def _inside(self, place: tuple[int, ...], at: str | int) -> tuple[int, ...]:
        found: list[Any] = []
        for schema in map(self._schemas.__getitem__, place):
            if isinstance(at, int):
                first = schema.get("prefixItems", ())
                found.append(first[at] if at < len(first) else schema.get("items"))
                continue
            named = schema.get("properties", {})
            found.append(named[at] if at in named else schema.get("additionalProperties"))
            found += schema.get("patternProperties", {}).values()
        return self._place(found)

    def _place(self, schemas: Iterable[Any]) -> tuple[int, ...]:
        """All that may hold where one of these does."""
        found: set[int] = set()
        left = [*schemas]
        while left:
            schema = left.pop()
            if not isinstance(schema, dict):
                continue
            number = self._numbers.setdefault(id(schema), len(self._schemas))
            if number == len(self._schemas):
                self._schemas.append(schema)
            if number in found:
                continue
            found.add(number)
            for name in ("anyOf", "oneOf", "allOf"):
                left += schema.get(name, ())
            if "$ref" in schema:
                left.append(self._named(schema["$ref"]))
        return tuple(sorted(found))

    def _named(self, reference: str) -> Any:
        if not re.match("#(/|$)", reference):
            raise CannotEnforceError(f"$ref to {reference[:60]!r} beside uniqueItems")
        found: Any = self._whole
        for part in unquote(reference).split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            try:
                found = found[int(name) if isinstance(found, list) else name]
            except (LookupError, TypeError, ValueError) as error:
                raise CannotEnforceError(
                    f"$ref to {reference[:60]!r} beside uniqueItems"
                ) from error
        return found

    def _check(self) -> None:
        parts: list[Any] = [self._whole]
        while parts:
            part = parts.pop()
            if isinstance(part, dict):
                if isinstance(part.get("$ref"), str):
                    self._named(part["$ref"])
                if isinstance(first := part.get("prefixItems"), list):
                    self._num_first = max(self._num_first, len(first))
                if isinstance(part.get("$id"), str) and part is not self._whole:
                    raise CannotEnforceError("$id beside uniqueItems")
                parts += part.values()
            elif isinstance(part, list):
                parts += part
