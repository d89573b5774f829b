"""``POST /v1/completions``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from kvshare_mm.apps.server.chat import ERRORS, STREAMS
from kvshare_mm.apps.server.generation import Generation, num_choices, request_options
from kvshare_mm.apps.server.json_bodies import json_route
from kvshare_mm.apps.server.replies import completion_logprobs
from kvshare_mm.apps.server.schema import CompletionBody
from kvshare_mm.apps.server.service import Service
from kvshare_mm.outputs import RequestOutput, TokenLogprob

_DEFAULT_MAX_TOKENS = 16  # as OpenAI's


def router(service: Service) -> APIRouter:
    """The route, for one service."""
    routes = APIRouter(route_class=json_route(service.lines.parsing))

    @routes.post("/v1/completions", responses={**ERRORS, **STREAMS})
    async def completions(body: CompletionBody, request: Request) -> Response:
        """Continue prompts of text or token ids; with `stream`, as server-sent events."""
        llm = service.llm
        body.check(service.options.model_name)
        prompts = body.prompts
        n = num_choices(body.n, len(prompts), service.options.max_choices)
        limit = _DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
        options = request_options(service, request.state.caller, body.cache_salt, body.kvshare)
        runs = [
            (prompt, body.params(limit, body.logprobs, i)) for prompt in prompts for i in range(n)
        ]
        head = {
            "id": f"cmpl-{request.state.request_id}",
            "created": int(time.time()),
            "model": service.options.model_name,
        }
        generation = Generation(service, request, runs, options, head, body.kvshare.spans)
        lengths: dict[int, int] = {}

        def whole(index: int, output: RequestOutput) -> dict[str, Any]:
            return piece(index, output.text, output.logprobs or (), output.finish_reason)

        def piece(
            index: int, text: str, logprobs: Sequence[TokenLogprob], reason: str | None
        ) -> dict[str, Any]:
            offset = lengths.get(index, 0)
            lengths[index] = offset + len(text)
            return {
                "index": index,
                "text": text,
                "logprobs": completion_logprobs(logprobs, llm.tokenizer, offset)
                if logprobs
                else None,
                "finish_reason": reason,
            }

        if body.stream:
            with_usage = body.stream_options is not None and body.stream_options.include_usage
            return await generation.stream("text_completion", None, piece, with_usage)
        return await generation.whole("text_completion", whole)

    return routes
