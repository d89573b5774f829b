"""``POST /v1/chat/completions``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from kvshare_mm.apps.server.generation import Generation, num_choices, request_options
from kvshare_mm.apps.server.json_bodies import json_route
from kvshare_mm.apps.server.replies import chat_logprobs
from kvshare_mm.apps.server.schema import ChatBody, ErrorBody
from kvshare_mm.apps.server.service import Service
from kvshare_mm.outputs import RequestOutput, TokenLogprob

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


def router(service: Service) -> APIRouter:
    """The route, for one service."""
    routes = APIRouter(route_class=json_route(service.lines.parsing))

    @routes.post("/v1/chat/completions", responses={**ERRORS, **STREAMS})
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        """Answer a chat; with `stream`, as server-sent events."""
        llm = service.llm
        body.check(service.options.model_name)
        n = num_choices(body.n, 1, service.options.max_choices)
        params = [body.params(body.limit, body.num_logprobs, i) for i in range(n)]
        options = request_options(service, request.state.caller, body.cache_salt, body.kvshare)
        messages = await service.with_media(body.messages, request.state.caller.tenant)
        head = {
            "id": f"chatcmpl-{request.state.request_id}",
            "created": int(time.time()),
            "model": service.options.model_name,
        }
        runs = [(messages, each) for each in params]
        generation = Generation(service, request, runs, options, head, body.kvshare.spans)

        def logged(logprobs: Sequence[TokenLogprob]) -> dict[str, Any] | None:
            return chat_logprobs(logprobs, llm.tokenizer) if logprobs else None

        def whole(index: int, output: RequestOutput) -> dict[str, Any]:
            return {
                "index": index,
                "message": {"role": "assistant", "content": output.text, "refusal": None},
                "logprobs": logged(output.logprobs or ()),
                "finish_reason": output.finish_reason,
            }

        def first(index: int) -> dict[str, Any]:
            delta = {"role": "assistant", "content": ""}
            return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

        def piece(
            index: int, text: str, logprobs: Sequence[TokenLogprob], reason: str | None
        ) -> dict[str, Any]:
            return {
                "index": index,
                "delta": {"content": text} if text or reason is None else {},
                "logprobs": logged(logprobs),
                "finish_reason": reason,
            }

        if body.stream:
            with_usage = body.stream_options is not None and body.stream_options.include_usage
            return await generation.stream("chat.completion.chunk", first, piece, with_usage)
        return await generation.whole("chat.completion", whole)

    return routes
