"""Tools that a model may call: what a request offers, and how calls are written.

A call is written as the model's chat template writes it: Hermes' and Qwen's form, which templates
without tools get too,

    <tool_call>
    {"name": "search", "arguments": {"city": "Rome"}}
    </tool_call>

or Llama's, in which the whole answer is ``{"name": "search", "parameters": {"city": "Rome"}}``,
several of them with ``;`` between.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

from kvshare_mm.errors import InvalidRequestError

Style = Literal["hermes", "llama"]

_MAX_TOOLS = 128  # as OpenAI's
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
OPEN, CLOSE = "<tool_call>", "</tool_call>"
_CHOICES = ("none", "auto", "required")
_SYSTEM = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within \
<tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


@dataclass(frozen=True, slots=True)
class Tools:
    """What a request offers, and what it asks to be called.

    Attributes:
        offered: OpenAI's objects, as templates take them.
        choice: "none", "auto", "required", or the name of the function to call.
        parallel: whether an answer may have several calls.
    """

    offered: tuple[Mapping[str, Any], ...]
    choice: str = "auto"
    parallel: bool = True

    @classmethod
    def of(cls, tools: Any, choice: Any = None, parallel: bool | None = None) -> Self | None:
        """The tools of a request, as OpenAI's API has them; None: it offers none.

        Raises:
            InvalidRequestError: what is no tool; a choice of what is not offered; with its field.
        """
        if not tools:
            if choice not in (None, "none", "auto"):
                raise InvalidRequestError("tool_choice needs tools", "tool_choice")
            return None
        if not isinstance(tools, Sequence) or isinstance(tools, str | bytes):
            raise InvalidRequestError("tools must be a list of functions", "tools")
        if len(tools) > _MAX_TOOLS:
            raise InvalidRequestError(f"{len(tools)} tools; at most {_MAX_TOOLS}", "tools")
        offered = tuple(_function(tool, f"tools[{i}]") for i, tool in enumerate(tools))
        names = [tool["function"]["name"] for tool in offered]
        for i, name in enumerate(names):
            if name in names[:i]:
                raise InvalidRequestError(f"two tools are called {name}", f"tools[{i}].function")
        if parallel is not None and not isinstance(parallel, bool):
            raise InvalidRequestError("parallel_tool_calls is a boolean", "parallel_tool_calls")
        return cls(offered, _chosen(choice, names), parallel is not False)

    @property
    def callable(self) -> dict[str, Mapping[str, Any]]:
        """Schemas of the arguments, by name, of what an answer may call."""
        if self.choice == "none":
            return {}
        functions = (tool["function"] for tool in self.offered)
        return {
            function["name"]: function.get("parameters") or {}
            for function in functions
            if self.choice in ("auto", "required", function["name"])
        }

    @property
    def must_call(self) -> bool:
        """Whether the answer must be a call."""
        return self.choice not in ("none", "auto")

    @property
    def several(self) -> bool:
        """Whether an answer may have more than one call."""
        return self.parallel and self.choice in ("auto", "required")

    @property
    def texts(self) -> list[str]:
        """What a prompt gets of them, about."""
        return [json.dumps(tool, ensure_ascii=False) for tool in self.offered]

    @property
    def system(self) -> str:
        """What a model is told whose template does not know tools."""
        return _SYSTEM.format(tools="\n".join(self.texts))


def _function(tool: Any, where: str) -> dict[str, Any]:
    if not isinstance(tool, Mapping) or tool.get("type") != "function":
        raise InvalidRequestError(f"{where} must be an object of type function", where)
    function, where = tool.get("function"), f"{where}.function"
    if not isinstance(function, Mapping):
        raise InvalidRequestError(f"{where} must be an object with a name", where)
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidRequestError(
            f"{where}.name must be 1 to 64 letters, digits, and _ . -", f"{where}.name"
        )
    if not isinstance(function.get("description"), str | None):
        raise InvalidRequestError(f"{where}.description must be text", f"{where}.description")
    if parameters is not None and (
        not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object"
    ):
        raise InvalidRequestError(
            f"{where}.parameters must be the JSON schema of an object", f"{where}.parameters"
        )
    told = {k: v for k, v in function.items() if v is not None}
    try:
        json.dumps(told, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequestError(f"{where}: no JSON: {error}", where) from error
    told.setdefault("description", "")  # some templates ask for both
    told.setdefault("parameters", {"type": "object", "properties": {}})
    return {"type": "function", "function": told}


def _chosen(choice: Any, names: Sequence[str]) -> str:
    if choice is None:
        return "auto"
    if isinstance(choice, str) and choice in _CHOICES:
        return choice
    function = choice.get("function") if isinstance(choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if name is None or choice.get("type") != "function":
        raise InvalidRequestError(
            'tool_choice is none, auto, required, or {"type": "function", "function": {"name": '
            "...}}",
            "tool_choice",
        )
    if name not in names or name in _CHOICES:
        raise InvalidRequestError(f"tool_choice: no tool is called {name!r}", "tool_choice")
    return str(name)


_FREE = {"additionalProperties", "patternProperties", "unevaluatedProperties"}
_COMBINED = {"anyOf", "oneOf", "allOf", "if", "$ref", "dependentSchemas"}


# Values; and what is narrower inside `not`, `if` and `oneOf` is not narrower outside.
_KEPT = {"not", "if", "oneOf", "const", "enum", "default", "examples"}


def closed(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema of arguments without those that it does not name; as it is, where they may be
    named elsewhere. Its own default would let a model make up any."""
    if "$ref" not in schema:
        schema = {"type": "object", **schema}
        if not (_FREE | _COMBINED) & schema.keys():
            schema.setdefault("properties", {})  # a tool without any is called with {}
    try:
        return schema if _is_combined(schema) else _close(schema)
    except RecursionError:
        return schema


def _is_combined(part: Any) -> bool:
    if isinstance(part, list):
        return any(map(_is_combined, part))
    if not isinstance(part, dict):
        return False
    both = isinstance(part.get("properties"), dict) and _COMBINED & part.keys()
    return bool(both) or any(map(_is_combined, part.values()))


def _close(part: Any) -> Any:
    if isinstance(part, list):
        return [_close(each) for each in part]
    if not isinstance(part, dict):
        return part
    named, needed = part.get("properties"), part.get("required", [])
    closed = {name: value if name in _KEPT else _close(value) for name, value in part.items()}
    if (
        part.get("type") == "object"
        and isinstance(named, dict)
        and not _FREE & part.keys()
        and isinstance(needed, list)
        and all(name in named for name in needed)
    ):
        closed["additionalProperties"] = False
    return closed


def style_of(template: object) -> Style | None:
    """How models of this chat template write calls; None: it does not know tools."""
    text = json.dumps(template)  # one, or several by name
    if not re.search(r"\btools\b", text):
        return None
    # Llama's template tells the model so.
    return "llama" if OPEN not in text and re.search(r'\bparameters\W+"', text) else "hermes"


def spelled(style: Style, name: str) -> tuple[str, str]:
    """What stands before and behind the arguments of a call."""
    if style == "llama":
        return f'{{"name": "{name}", "parameters": ', "}"
    return f'{OPEN}\n{{"name": "{name}", "arguments": ', f"}}\n{CLOSE}"


SEPARATORS: Mapping[Style, str] = {"hermes": "\n", "llama": "; "}


def earlier_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Calls of an earlier answer as templates take them: their arguments are an object.

    Raises:
        InvalidRequestError: they are none.
    """
    if not isinstance(calls, Sequence) or isinstance(calls, str | bytes):
        raise InvalidRequestError(f"{where} must be a list of calls", where)
    made = []
    for i, call in enumerate(calls):
        place = f"{where}[{i}].function"
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise InvalidRequestError(f"{place} must be an object with a name", place)
        arguments = function.get("arguments")
        try:
            given = json.loads(arguments or "{}") if isinstance(arguments, str) else arguments or {}
            json.dumps(given, allow_nan=False)
        except (TypeError, ValueError, RecursionError):
            given = None
        if not isinstance(given, Mapping):
            raise InvalidRequestError(
                f"{place}.arguments must be a JSON object", f"{place}.arguments"
            )
        named = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        told = {"name": function["name"], "arguments": given}
        made.append({**named, "type": "function", "function": told})
    return made


def told_in_words(
    messages: Sequence[Mapping[str, Any]], tools: Tools | None
) -> list[Mapping[str, Any]]:
    """Messages for a template that does not know tools: the tools are in the system message, calls
    in the assistant's content, results in the user's."""
    told: list[Mapping[str, Any]] = []
    for message in messages:
        role, content = message["role"], message["content"]
        if calls := message.get("tool_calls"):
            said = [content] if content else []
            for call in calls:
                before, behind = spelled("hermes", call["function"]["name"])
                arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
                said.append(f"{before}{arguments}{behind}")
            content = "\n".join(said)
        if role == "tool":
            content = f"<tool_response>\n{content}\n</tool_response>"
            role = "user"
        told.append({"role": role, "content": content})
    if tools is None:
        return told
    if told[0]["role"] == "system" and isinstance(told[0]["content"], str):
        first, rest = told[0]["content"], told[1:]
        return [{"role": "system", "content": f"{first}\n\n{tools.system}"}, *rest]
    return [{"role": "system", "content": tools.system}, *told]
