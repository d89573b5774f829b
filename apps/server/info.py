"""What a server says of itself: models, health, version, metrics; and its tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

import kvshare_mm
from kvshare_mm.apps.server.chat import ERRORS
from kvshare_mm.apps.server.errors import ApiError, clean
from kvshare_mm.apps.server.json_bodies import json_route
from kvshare_mm.apps.server.schema import DetokenizeBody, TokenizeBody
from kvshare_mm.apps.server.service import Service
from kvshare_mm.metrics import CONTENT_TYPE


def router(service: Service) -> APIRouter:
    """The routes, for one service."""
    routes = APIRouter(responses=ERRORS, route_class=json_route(service.lines.parsing))

    def card() -> dict[str, Any]:
        return {
            "id": service.options.model_name,
            "object": "model",
            "created": service.started_s,
            "owned_by": "kvshare-mm",
            "max_model_len": service.llm.max_model_len,
        }

    @routes.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The one model that is served."""
        return {"object": "list", "data": [card()]}

    @routes.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        """The model of this name."""
        if model != service.options.model_name:
            raise ApiError(404, f"there is no model {model!r} here", "model", "model_not_found")
        return card()

    @routes.get("/health")
    @routes.get("/ping", include_in_schema=False)
    @routes.post("/ping", include_in_schema=False)
    async def health() -> dict[str, str]:
        """Status 200 while requests can be answered, 503 before, once the engine fails, and while
        requests are there and nothing moves (code `stalled`)."""
        if not service.llm.healthy:
            raise ApiError(503, "the engine does not answer requests any more", code="unhealthy")
        stuck = service.stuck_s
        if stuck > service.options.stall_after_s:
            raise ApiError(503, f"nothing has moved for {stuck:.0f} s", code="stalled")
        return {"status": "ok"}

    @routes.get("/version")
    async def version() -> dict[str, str]:
        """The version of this package."""
        return {"version": kvshare_mm.__version__}

    @routes.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Metrics in Prometheus' format."""
        return Response(
            await service.lines.metrics.run("", service.metrics.render), media_type=CONTENT_TYPE
        )

    def told(tokens: Sequence[int], with_strings: bool) -> Response:
        """Made in a thread, like the tokens: they may be a million."""
        llm = service.llm
        reply: dict[str, Any] = {
            "count": len(tokens),
            "max_model_len": llm.max_model_len,
            "tokens": list(tokens),
        }
        if with_strings:
            reply["token_strs"] = llm.tokenizer.convert_ids_to_tokens(list(tokens))
        return JSONResponse(reply)

    @routes.post("/tokenize", response_class=JSONResponse)
    async def tokenize(body: TokenizeBody, request: Request) -> Response:
        """Token ids of a prompt, or of a chat as the model gets it."""
        llm, tenant = service.llm, request.state.caller.tenant
        body.check(service.options.model_name)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "either prompt or messages", "prompt")
        if body.messages is not None:
            messages = await service.with_media(body.messages, tenant)
            reply: Response = await service.lines.of(messages).run(
                tenant, lambda: told(llm.tokenize(messages), body.return_token_strs)
            )
            return reply

        def tokenized() -> Response:
            prompt = clean(body.prompt or "")
            llm.text_bound.check([prompt], "prompt")
            tokens = llm.tokenizer(prompt, add_special_tokens=body.add_special_tokens)
            return told(tokens["input_ids"], body.return_token_strs)

        reply = await service.lines.tokens.run(tenant, tokenized)
        return reply

    @routes.post("/detokenize")
    async def detokenize(body: DetokenizeBody, request: Request) -> dict[str, str]:
        """The text of token ids."""
        llm = service.llm
        body.check(service.options.model_name)
        most = llm.text_bound.max_bytes  # of a text that /tokenize takes: a token has a byte
        if len(body.tokens) > most:
            raise ApiError(400, f"{len(body.tokens)} tokens; at most {most} are taken", "tokens")

        def decoded() -> str:
            size = len(llm.tokenizer)
            if any(not 0 <= token < size for token in body.tokens):
                raise ApiError(400, f"token ids must lie in 0..{size - 1}", "tokens")
            return clean(llm.tokenizer.decode(body.tokens))

        return {"prompt": await service.lines.tokens.run(request.state.caller.tenant, decoded)}

    return routes
