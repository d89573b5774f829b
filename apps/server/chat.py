"""``POST /v1/chat/completions``."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from kvshare_mm.apps.server.errors import ErrorBody
from kvshare_mm.apps.server.generation import Generation, num_choices, request_options
from kvshare_mm.apps.server.json_bodies import json_route
from kvshare_mm.apps.server.replies import chat_logprobs, finish_reason, tool_call
from kvshare_mm.apps.server.schema import ChatBody
from kvshare_mm.apps.server.service import Service
from kvshare_mm.calls import CallReader
from kvshare_mm.outputs import RequestOutput, TokenLogprob, ToolCall

ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "what is wrong with the request"},
    "5XX": {"model": ErrorBody, "description": "loading, shutting down, or a bug"},
}

# The 200 of a route that streams, beside its JSON.
STREAMS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "the answer; with `stream`, as server-sent events",
        "content": {"text/event-stream": {}},
    }
}


async def chat_generation(
    service: Service, request: Request, body: ChatBody, head: dict[str, Any]
) -> Generation:
    """The answers to a chat, not begun. Raises ApiError, InvalidRequestError."""
    caller = request.state.caller
    body.check(service.options.model_name)
    n = num_choices(body.n, 1, service.options.max_choices)
    params = [body.params(body.limit, body.num_logprobs, i) for i in range(n)]
    options = request_options(service, caller, body.cache_salt, body.kvshare)
    messages = await service.with_media(body.messages, caller.tenant)
    runs = [(messages, each) for each in params]
    return Generation(service, request, runs, options, head, body.kvshare.spans, body.offered)


def router(service: Service) -> APIRouter:
    """The route, for one service."""
    routes = APIRouter(route_class=json_route(service.lines.parsing))

    @routes.post("/v1/chat/completions", responses={**ERRORS, **STREAMS})
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        """Answer a chat; with `stream`, as server-sent events."""
        llm = service.llm
        head = {
            "id": f"chatcmpl-{request.state.request_id}",
            "created": int(time.time()),
            "model": service.options.model_name,
        }
        generation = await chat_generation(service, request, body, head)
        readers: dict[int, CallReader] = {}
        num_calls: Counter[int] = Counter()

        def logged(logprobs: Sequence[TokenLogprob]) -> dict[str, Any] | None:
            return chat_logprobs(logprobs, llm.tokenizer) if logprobs else None

        def whole(index: int, output: RequestOutput) -> dict[str, Any]:
            calls = [tool_call(call) for call in output.tool_calls]
            message: dict[str, Any] = {
                "role": "assistant",
                "content": output.content,
                "refusal": None,
            }
            if calls:
                message |= {"content": output.content or None, "tool_calls": calls}
            return {
                "index": index,
                "message": message,
                "logprobs": logged(output.logprobs or ()),
                "finish_reason": finish_reason(output.finish_reason, bool(calls)),
            }

        def first(index: int) -> dict[str, Any]:
            delta = {"role": "assistant", "content": ""}
            return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

        def piece(
            index: int, text: str, logprobs: Sequence[TokenLogprob], reason: str | None
        ) -> dict[str, Any]:
            told: list[str | ToolCall] = [text] if text else []
            if (make := generation.specs[index].calls) is not None:
                reader = readers.setdefault(index, make())
                told = [*reader.feed(text), *(reader.end() if reason else ())]
            delta: dict[str, Any] = {}
            if words := "".join(each for each in told if isinstance(each, str)):
                delta["content"] = words
            # A call is sent when it is complete, and known to be one.
            if calls := [each for each in told if isinstance(each, ToolCall)]:
                delta["tool_calls"] = [
                    {"index": num_calls[index] + i, **tool_call(each)}
                    for i, each in enumerate(calls)
                ]
            num_calls[index] += len(calls)
            return {
                "index": index,
                "delta": delta,
                "logprobs": logged(logprobs),
                "finish_reason": finish_reason(reason, bool(num_calls[index])),
            }

        if body.stream:
            with_usage = body.stream_options is not None and body.stream_options.include_usage
            return await generation.stream("chat.completion.chunk", first, piece, with_usage)
        return await generation.whole("chat.completion", whole)

    return routes
