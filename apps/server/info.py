"""What a server says of itself: models, health, version, metrics; and its tokenizer."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

import kvshare_mm
from kvshare_mm.apps.server.chat import ERRORS
from kvshare_mm.apps.server.errors import ApiError, clean
from kvshare_mm.apps.server.media import resolved
from kvshare_mm.apps.server.schema import DetokenizeBody, TokenizeBody
from kvshare_mm.apps.server.service import Service
from kvshare_mm.metrics import CONTENT_TYPE


def router(service: Service) -> APIRouter:
    """The routes, for one service."""
    routes = APIRouter(responses=ERRORS)

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
        """Status 200 while requests can be answered, 503 before, and once the engine fails."""
        if not service.llm.healthy:
            raise ApiError(503, "the engine does not answer requests any more", code="unhealthy")
        return {"status": "ok"}

    @routes.get("/version")
    async def version() -> dict[str, str]:
        """The version of this package."""
        return {"version": kvshare_mm.__version__}

    @routes.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Metrics in Prometheus' format."""
        return Response(await service.prepared(service.metrics.render), media_type=CONTENT_TYPE)

    @routes.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> dict[str, Any]:
        """Token ids of a prompt, or of a chat as the model gets it."""
        llm = service.llm
        body.check(service.options.model_name)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "either prompt or messages", "prompt")
        if body.messages is not None:
            messages = await resolved(
                [message.model_dump() for message in body.messages],
                service.fetcher,
                service.options.max_media,
            )
            tokens = list(await service.prepared(llm.tokenize, messages))
        else:
            prompt = clean(body.prompt or "")
            special = body.add_special_tokens
            encoded = await service.prepared(
                lambda: llm.tokenizer(prompt, add_special_tokens=special)
            )
            tokens = list(encoded["input_ids"])
        reply: dict[str, Any] = {
            "count": len(tokens),
            "max_model_len": llm.max_model_len,
            "tokens": tokens,
        }
        if body.return_token_strs:
            reply["token_strs"] = llm.tokenizer.convert_ids_to_tokens(tokens)
        return reply

    @routes.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> dict[str, str]:
        """The text of token ids."""
        llm = service.llm
        body.check(service.options.model_name)
        size = len(llm.tokenizer)
        if any(not 0 <= token < size for token in body.tokens):
            raise ApiError(400, f"token ids must lie in 0..{size - 1}", "tokens")
        text = await service.prepared(llm.tokenizer.decode, body.tokens)
        return {"prompt": clean(text)}

    return routes
