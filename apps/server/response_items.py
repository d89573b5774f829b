"""What /v1/responses takes as a chat, and the answer to a chat as what it gives."""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from pydantic import ValidationError

from kvshare_mm.apps.server.errors import ApiError
from kvshare_mm.apps.server.replies import tool_call, usage
from kvshare_mm.apps.server.schema import ChatBody, ResponsesBody, Sampling
from kvshare_mm.calls import CallReader
from kvshare_mm.outputs import RequestOutput, ToolCall

_ROLES = ("user", "assistant", "system", "developer")
_NAMES = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "response_format": "text.format",
    "'image_url'": "'input_image'",
}
_NAMED = re.compile(
    r"messages\[\d+\](\.content|\.tool_calls\[\d+\]\.function)?"
    r"|(?<=tools\[)(\d+\])\.function\b"
    r"|^(messages|max_tokens|response_format)$|\bmax_tokens(?==)|(?<=of type )'image_url'"
)

Event = dict[str, Any]


class AsChat(NamedTuple):
    """A request as a chat.

    Attributes:
        body: the chat.
        places: where its messages and calls come from, by their place in the chat.
    """

    body: ChatBody
    places: Mapping[str, str]

    def renamed(self, error: ApiError) -> ApiError:
        """An error of the chat, with the names that the fields have in the request."""
        param = None if error.param is None else _NAMED.sub(self._name, error.param)
        text = _NAMED.sub(self._name, str(error))
        return ApiError(error.status, text, param, error.code, error.retry_after)

    def _name(self, found: re.Match[str]) -> str:
        name = found[0]
        return found[2] or self.places.get(name) or _NAMES.get(name, name)


def as_chat(asked: ResponsesBody) -> AsChat:
    """The chat that a request asks for. Raises ApiError: what no chat has."""
    messages: list[dict[str, Any]] = []
    places: dict[str, str] = {}

    def add(place: str, content: str | list[dict[str, Any]], inside: str, **more: Any) -> None:
        at = f"messages[{len(messages)}]"
        places.update({at: place, f"{at}.content": f"{place}{inside}"})
        messages.append({"content": content, **more})

    if asked.instructions:
        add("instructions", asked.instructions, "", role="system")
    if not asked.input:
        raise ApiError(400, "the input is empty", "input")
    if isinstance(asked.input, str):
        add("input", asked.input, "", role="user")
    for i, item in enumerate(asked.input if isinstance(asked.input, list) else ()):
        where = f"input[{i}]"
        kind = item.get("type", "message")
        if kind == "message":
            if item.get("role") not in _ROLES:
                raise ApiError(400, f"{where}.role must be one of {', '.join(_ROLES)}", where)
            content = _content(item.get("content"), f"{where}.content")
            add(where, content, ".content", role=item["role"])
        elif kind == "function_call":
            name, arguments = _text(item, "name", where), _text(item, "arguments", where)
            call = {"name": name, "arguments": arguments}
            if not messages or messages[-1]["role"] != "assistant":
                add(where, "", "", role="assistant")
            calls = messages[-1].setdefault("tool_calls", [])
            places[f"messages[{len(messages) - 1}].tool_calls[{len(calls)}].function"] = where
            call_id = _text(item, "call_id", where)
            calls.append({"id": call_id, "type": "function", "function": call})
        elif kind == "function_call_output":
            content = _content(item.get("output"), f"{where}.output")
            add(where, content, ".output", role="tool", tool_call_id=_text(item, "call_id", where))
        else:
            raise ApiError(
                400,
                f"{where} is of type {kind!r}; message, function_call and function_call_output "
                "are taken",
                where,
                "unsupported",
            )
    shared = {name: getattr(asked, name) for name in Sampling.model_fields}
    asked_for = {
        **shared,
        "messages": messages,
        "max_tokens": asked.max_output_tokens,
        "response_format": _format(asked.form),
        "tools": [_tool(tool, f"tools[{i}]") for i, tool in enumerate(asked.tools or ())],
        "tool_choice": _choice(asked.tool_choice),
        "parallel_tool_calls": asked.parallel_tool_calls,
    }
    try:
        return AsChat(ChatBody(**asked_for), places)
    except ValidationError as error:  # one message too many, or one of too many calls
        raise ApiError(400, f"input: {error.errors()[0]['msg']}", "input") from error


def _content(content: Any, where: str) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise ApiError(400, f"{where} must be text or a list of parts", where)
    return [_part(part, f"{where}[{i}]") for i, part in enumerate(content)]


def _part(part: Any, where: str) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in ("input_text", "output_text"):
        return {"type": "text", "text": _text(part, "text", where)}
    if kind == "input_image":
        if part.get("image_url") is None and part.get("file_id") is not None:
            raise ApiError(400, f"{where}.file_id: no files are kept here", where, "unsupported")
        return {"type": "image_url", "image_url": {"url": _text(part, "image_url", where)}}
    if kind == "input_audio":
        return {"type": "input_audio", "input_audio": part.get("input_audio")}
    raise ApiError(
        400,
        f"{where} is of type {kind!r}; input_text, output_text, input_image and input_audio are "
        "taken",
        where,
        "unsupported",
    )


def _text(item: Mapping[str, Any], name: str, where: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise ApiError(400, f"{where}.{name} must be text", f"{where}.{name}")
    return value


def _format(asked: dict[str, Any]) -> dict[str, Any]:
    kind, field = asked.get("type"), "text.format"
    if kind in ("text", "json_object"):
        return {"type": kind}
    if kind != "json_schema":
        raise ApiError(400, f"{field}.type must be text, json_object or json_schema", field)
    try:
        json.dumps(asked, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"{field}: no JSON: {error}", field) from error
    return {"type": kind, "json_schema": {k: v for k, v in asked.items() if k != "type"}}


def _tool(tool: dict[str, Any], where: str) -> dict[str, Any]:
    if (kind := tool.get("type")) != "function":
        raise ApiError(
            400, f"{where} is of type {kind!r}; only functions are supported", where, "unsupported"
        )
    return {"type": kind, "function": {k: v for k, v in tool.items() if k != "type"}}


def _choice(choice: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
    if not isinstance(choice, dict):
        return choice
    if choice.get("type") != "function" or not isinstance(choice.get("name"), str):
        raise ApiError(
            400,
            'tool_choice is none, auto, required, or {"type": "function", "name": ...}',
            "tool_choice",
            "unsupported",
        )
    return {"type": "function", "function": {"name": choice["name"]}}


def head(asked: ResponsesBody, request_id: str, model: str) -> dict[str, Any]:
    """The fields that a reply has from the beginning."""
    form = asked.form
    if form["type"] != "json_schema":
        form = {"type": form["type"]}
    return {
        "id": f"resp_{request_id}",
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": asked.instructions,
        "max_output_tokens": asked.max_output_tokens,
        "metadata": asked.metadata or {},
        "model": model,
        "output": [],
        "parallel_tool_calls": asked.parallel_tool_calls is not False,
        "previous_response_id": None,
        "store": False,
        "temperature": 1.0 if asked.temperature is None else asked.temperature,
        "text": {"format": form},
        "tool_choice": asked.tool_choice or "auto",
        "tools": asked.tools or [],
        "top_p": 1.0 if asked.top_p is None else asked.top_p,
        "truncation": "disabled",
        "usage": None,
    }


class Answer:
    """An answer as it comes: the events that tell of it, and the reply that they add up to.

    Args:
        reply: its `head`.
        reader: tells calls from words; None: there are no calls.

    Attributes:
        reply: as far as it is known.
    """

    def __init__(self, reply: Mapping[str, Any], reader: CallReader | None) -> None:
        self.reply = dict(reply)
        self._reader = reader
        self._items: list[dict[str, Any]] = []
        self._message: str | None = None  # id of the one that is being written
        self._texts: list[str] = []
        self._num_events = 0

    def begin(self) -> Iterator[Event]:
        yield self._event("response.created", response=self._known())
        yield self._event("response.in_progress", response=self._known())

    def go_on(self, text: str) -> Iterator[Event]:
        """The answer has more text."""
        yield from self._told(self._reader.feed(text) if self._reader else (text,))

    def end(self, output: RequestOutput, kvshare: Mapping[str, Any]) -> Iterator[Event]:
        """All its text is told."""
        if self._reader:
            yield from self._told(self._reader.end())
        status = "completed" if output.finish_reason == "stop" else "incomplete"
        if self._message is None and not self._items:
            yield from self._open()
        yield from self._close(status)
        used = usage([output])
        self.reply |= {
            "status": status,
            "usage": {
                "input_tokens": used["prompt_tokens"],
                "input_tokens_details": used["prompt_tokens_details"],
                "output_tokens": used["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": used["total_tokens"],
            },
            "kvshare": kvshare,
        }
        if output.finish_reason == "length":
            self.reply["incomplete_details"] = {"reason": "max_output_tokens"}
        yield self._event(f"response.{status}", response=self._known())

    def fail(self, error: ApiError) -> Iterator[Event]:
        """It ends here, and why."""
        code = "rate_limit_exceeded" if error.status == 429 else "server_error"
        told = {"code": code, "message": error.body["error"]["message"]}
        self.reply |= {"status": "failed", "error": told}
        yield self._event("response.failed", response=self._known())

    def _told(self, told: Iterable[str | ToolCall]) -> Iterator[Event]:
        for each in told:
            if isinstance(each, ToolCall):
                yield from self._close("completed")
                yield from self._call(each)
            elif each:
                if self._message is None:
                    yield from self._open()
                self._texts.append(each)
                yield self._of_text("output_text.delta", delta=each, logprobs=[])

    def _open(self) -> Iterator[Event]:
        self._message = f"msg_{uuid.uuid4().hex}"
        self._texts = []
        yield self._of_item("added", self._said("in_progress"))
        yield self._of_text("content_part.added", part=_output_text(""))

    def _close(self, status: str) -> Iterator[Event]:
        if self._message is None:
            return
        text = "".join(self._texts)
        yield self._of_text("output_text.done", text=text, logprobs=[])
        yield self._of_text("content_part.done", part=_output_text(text))
        message = self._said(status, _output_text(text))
        yield self._of_item("done", message)
        self._items.append(message)
        self._message = None

    def _said(self, status: str, *content: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": self._message,
            "type": "message",
            "status": status,
            "role": "assistant",
            "content": content,
        }

    def _call(self, call: ToolCall) -> Iterator[Event]:
        item = {
            "id": f"fc_{uuid.uuid4().hex}",
            "type": "function_call",
            "status": "completed",
            "call_id": tool_call(call)["id"],
            "name": call.name,
            "arguments": call.arguments,
        }
        yield self._of_item("added", {**item, "status": "in_progress", "arguments": ""})
        name = "response.function_call_arguments"
        place = {"item_id": item["id"], "output_index": len(self._items)}
        # A call is sent when it is complete, and known to be one.
        yield self._event(f"{name}.delta", **place, delta=call.arguments)
        yield self._event(f"{name}.done", **place, name=call.name, arguments=call.arguments)
        yield self._of_item("done", item)
        self._items.append(item)

    def _of_item(self, kind: str, item: dict[str, Any]) -> Event:
        index = len(self._items)
        return self._event(f"response.output_item.{kind}", output_index=index, item=item)

    def _of_text(self, kind: str, **fields: Any) -> Event:
        index = len(self._items)
        place = {"item_id": self._message, "output_index": index, "content_index": 0}
        return self._event(f"response.{kind}", **place, **fields)

    def _event(self, kind: str, **fields: Any) -> Event:
        self._num_events += 1
        return {"type": kind, "sequence_number": self._num_events - 1, **fields}

    def _known(self) -> dict[str, Any]:
        self.reply["output"] = [*self._items]
        return dict(self.reply)


def _output_text(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
