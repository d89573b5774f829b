"""What answers may be asked to look like, written out for llguidance, within bounds.

llguidance reads what it is given without limits of its own, and where memory ends it ends the
process; so all of it is measured before.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any, Literal, NamedTuple

from kvshare_mm.errors import InvalidRequestError
from kvshare_mm.json_places import Places
from kvshare_mm.plain_schema import multiplies, plain
from kvshare_mm.schema_types import MAX_PATTERN, UNIQUE, CannotEnforceError
from kvshare_mm.tools import SEPARATORS, Style, Tools, closed, spelled

_MAX_SCHEMA = 1 << 15  # characters: one of 2500 properties, which takes half a second to read
# Some numbers are written out; patterns that must hold at once are multiplied with one another.
_MOST = {"minItems": 1_000, "maxItems": 1_000, "minProperties": 1_000, "maxProperties": 1_000,
         "minLength": 10_000, "maxLength": 10_000}  # fmt: skip
_MAX_PATTERNS = 8
_MAX_MULTIPLES = 1_000  # remainders are counted, those of all `multipleOf` together
_MAX_NUMBER = 2**53  # what JSON keeps; far larger negative ones end the process
_MAX_REGEX, _MAX_GRAMMAR, _MAX_CHOICES = MAX_PATTERN, 1 << 12, 1_000
_MAX_REPEATS = 200
_MAX_CALLS = 16  # in one answer
# As templates write a call into the next prompt, so that this answer's KV fits it.
_COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Form(NamedTuple):
    """A form of answers.

    Attributes:
        kind: what `value` is: a JSON schema, a regular expression, a grammar (Lark's or GBNF), or
            a list of whole answers.
        field: of the request, for errors.
    """

    kind: Literal["json", "regex", "grammar", "choice"]
    value: Any
    field: str = "response_format"


def source(form: Form | None, tools: Tools | None, style: Style) -> tuple[str, str] | None:
    """What a grammar is made from, as JSON, and the request's field that it is from; None: answers
    are free.

    Raises:
        InvalidRequestError: what is asked for is no JSON.
    """
    calls: dict[str, Any] = {}
    if tools is not None and tools.choice != "none" and (tools.must_call or form is not None):
        calls = dict(tools.callable)
    field = form.field if form is not None else "tools"
    if tools is not None and tools.must_call:
        form, field = None, "tools"
    if form is not None and form.kind != "json":
        calls = {}
    if form is None and not calls:
        return None
    asked = {
        "form": None if form is None else [form.kind, form.value],
        "calls": calls,
        "most": _MAX_CALLS if tools is not None and tools.several else 1,
        "style": style,
        "field": field,
    }
    try:
        return json.dumps(asked, allow_nan=False), field
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequestError(f"{field}: no JSON: {error}", field) from error


class Written(NamedTuple):
    """A grammar.

    Attributes:
        text: as llguidance reads it.
        unique: what stands before each JSON that has lists marked with `UNIQUE`, and its schema.
    """

    text: str
    unique: Sequence[tuple[bytes, Places]] = ()


def grammar(asked: str) -> Written:
    """llguidance's grammar of what `source` says.

    Raises:
        InvalidRequestError: it is too long, may cost too much, or cannot be enforced.
    """
    read = json.loads(asked)
    field = read["field"]
    kind, value = read["form"] or (None, None)
    schemas = [*read["calls"].values(), *([value] if kind == "json" else [])]
    if (size := sum(len(json.dumps(schema)) for schema in schemas)) > _MAX_SCHEMA:
        raise InvalidRequestError(
            f"{field}: the schema has {size} characters; at most {_MAX_SCHEMA}", field
        )
    if costly := _too_costly(schemas) or _too_long(kind, value):
        raise InvalidRequestError(f"{field}: {costly}", field)
    try:
        read["calls"] = {n: closed(_enforceable(each)) for n, each in read["calls"].items()}
        if kind == "json":
            value = _enforceable(value)
        if costly := _too_costly([*read["calls"].values(), *([value] if kind == "json" else [])]):
            raise InvalidRequestError(f"{field}: {costly}", field)
        return Written(_written(kind, value, read), _unique(kind, value, read))
    except InvalidRequestError:
        raise
    except Exception as error:  # the reader of GBNF raises what it likes
        raise InvalidRequestError(f"{field}: {error}", field) from error


def _enforceable(schema: Any) -> Any:
    """The schema in words that llguidance knows.

    Raises:
        CannotEnforceError: it cannot be enforced.
    """
    from llguidance import LLMatcher

    try:
        return plain(schema)
    except CannotEnforceError:
        # What it takes as it is need not be rewritten, unless it would multiply what is in it.
        if multiplies(schema) or LLMatcher.validate_grammar(
            LLMatcher.grammar_from_json_schema(json.dumps(schema))
        ):
            raise
        return schema


def _written(kind: str | None, value: Any, read: Mapping[str, Any]) -> str:
    from llguidance import LLMatcher, grammar_from

    if read["calls"]:
        return _as_lark(_calls(value if kind == "json" else None, read))
    if kind == "json":
        return str(LLMatcher.grammar_from_json_schema(json.dumps(value)))
    if kind == "regex":
        return str(LLMatcher.grammar_from_regex(value))
    if kind == "choice":
        return _as_lark("start: " + " | ".join(json.dumps(each) for each in value))
    return _as_lark(str(grammar_from("grammar", value)))


def _unique(kind: str | None, value: Any, read: Mapping[str, Any]) -> list[tuple[bytes, Places]]:
    """What must be followed beside the grammar.

    Raises:
        CannotEnforceError: it is not known where it begins.
    """
    calls = {spelled(read["style"], name)[0]: each for name, each in read["calls"].items()}
    if kind == "json" and UNIQUE in json.dumps(value):
        if calls:
            raise CannotEnforceError("uniqueItems of an answer that may be a call instead")
        return [(b"", Places(value))]
    if UNIQUE not in json.dumps([*calls.values()]):
        return []
    return [(before.encode(), Places(schema)) for before, schema in calls.items()]


def _as_lark(text: str) -> str:
    # Said, not guessed: what looks like JSON would be taken for llguidance's own form.
    return json.dumps({"grammars": [{"lark_grammar": text}]})


def _calls(answer: Any, read: Mapping[str, Any]) -> str:
    """Calls, or an answer that follows a schema."""
    style: Style = read["style"]
    rules = [] if answer is None else [f"answer: %json {json.dumps(answer)}"]
    for i, (name, schema) in enumerate(read["calls"].items()):
        before, behind = (json.dumps(text) for text in spelled(style, name))
        arguments = json.dumps({**schema, "x-guidance": _COMPACT})
        rules += [f"call_{i}: {before} arguments_{i} {behind}", f"arguments_{i}: %json {arguments}"]
    one = " | ".join(f"call_{i}" for i in range(len(read["calls"])))
    more = f" ({json.dumps(SEPARATORS[style])} call){{0,{read['most'] - 1}}}"
    calls = f"calls: call{more if read['most'] > 1 else ''}"
    start = "start: calls" if answer is None else "start: calls | answer"
    return "\n".join([start, calls, f"call: {one}", *rules])


def _too_long(kind: str | None, value: Any) -> str | None:
    """Why a regular expression, a grammar or a list of choices is not taken; None: it is."""
    if kind == "choice":
        if len(value) > _MAX_CHOICES or sum(map(len, value)) > _MAX_SCHEMA:
            return f"{_MAX_CHOICES} choices of {_MAX_SCHEMA} characters are possible"
        return None
    if kind not in ("regex", "grammar"):
        return None
    most = _MAX_REGEX if kind == "regex" else _MAX_GRAMMAR
    if len(value) > most:
        return f"{len(value)} characters; {most} are possible"
    repeats = re.findall(r"\{\s*(\d+)\s*(?:,\s*(\d*)\s*)?\}|~\s*(\d+)(?:\s*\.\.\s*(\d+))?", value)
    times = 1
    for found in repeats:
        times *= max(1, *(int(number[:9]) for number in found if number))
    if times > _MAX_REPEATS:
        return f"repetitions of more than {_MAX_REPEATS} times, all multiplied"
    if kind == "grammar" and (used := re.search(r"%(?!ignore\b)\w+", value)):
        return f"{used.group()} is not taken in a grammar"
    return None


def _without_point(number: float) -> int:
    """1 for 0.01, 25 for 0.25 and 2.5: what remainders are counted of."""
    _, digits, exponent = Decimal(str(number)).as_tuple()
    value = int("".join(map(str, digits)))
    return (
        value * 10 ** min(int(exponent), 9) if isinstance(exponent, int) and exponent > 0 else value
    )


def _too_costly(schemas: Sequence[Any]) -> str | None:
    """Why reading a schema might take more time or memory than there is; None: it does not.

    Names of properties look like keywords; those have schemas, keywords have numbers and the like.
    """
    num_patterns, multiples, parts = 0, 1, [*schemas]
    while parts:
        part = parts.pop()
        if isinstance(part, int) and abs(part) > _MAX_NUMBER:
            return f"numbers can be {_MAX_NUMBER} at most"
        if isinstance(part, list):
            parts += part
        if not isinstance(part, dict):
            continue
        for name, value in part.items():
            if isinstance(value, int | float) and value > _MOST.get(name, value):
                return f"{name} can be {_MOST[name]} at most"
            if name == "multipleOf" and isinstance(value, int | float):
                multiples *= _without_point(value)
                if multiples > _MAX_MULTIPLES:
                    return f"multipleOf can be {_MAX_MULTIPLES} at most, all multiplied"
            if name == "pattern" and isinstance(value, str):
                num_patterns += 1
                if len(value) > MAX_PATTERN:
                    return f"a pattern can have {MAX_PATTERN} characters at most"
            if name == "patternProperties" and isinstance(value, dict):
                num_patterns += len(value)
                if any(len(each) > MAX_PATTERN for each in value):
                    return f"a pattern can have {MAX_PATTERN} characters at most"
        parts += part.values()
    if num_patterns > _MAX_PATTERNS:
        return f"{num_patterns} patterns; {_MAX_PATTERNS} are possible"
    return None
