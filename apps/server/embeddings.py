"""``POST /v1/embeddings``: what the embedder that finds donors makes of texts."""

from __future__ import annotations

import base64
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from kvshare_mm.apps.server.chat import ERRORS
from kvshare_mm.apps.server.errors import ApiError, clean
from kvshare_mm.apps.server.json_bodies import json_route
from kvshare_mm.apps.server.limits import Bill
from kvshare_mm.apps.server.schema import EmbeddingsBody
from kvshare_mm.apps.server.service import Service
from kvshare_mm.errors import ConfigError, ModelLoadError

_BYTES_PER_TOKEN = 4


def router(service: Service) -> APIRouter:
    """The route, for one service."""
    routes = APIRouter(responses=ERRORS, route_class=json_route(service.lines.parsing))

    @routes.post("/v1/embeddings", response_class=JSONResponse)
    async def embeddings(body: EmbeddingsBody, request: Request) -> Response:
        """Embed one text or several; rows of unit length."""
        llm, caller = service.llm, request.state.caller
        name = llm.config.embedder
        body.check(name if name and body.model == name else service.options.model_name)
        texts = [clean(t) for t in ([body.input] if isinstance(body.input, str) else body.input)]

        def made() -> tuple[Response, int]:
            try:
                vectors, num_tokens = llm.embed(texts)
            except (ConfigError, ModelLoadError) as error:
                raise ApiError(400, str(error), "model", "no_embedder") from error
            if body.dimensions not in (None, vectors.shape[1]):
                raise ApiError(
                    400, f"this embedder has {vectors.shape[1]} dimensions", "dimensions"
                )
            in_base64 = body.encoding_format == "base64"
            rows: list[Any] = (
                [base64.b64encode(row.astype("<f4").tobytes()).decode() for row in vectors]
                if in_base64
                else vectors.tolist()
            )
            data = [
                {"object": "embedding", "index": i, "embedding": row} for i, row in enumerate(rows)
            ]
            used = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
            reply = {"object": "list", "data": data, "model": name, "usage": used}
            return JSONResponse(reply), num_tokens

        meter = service.meters.of(caller.key, caller.limits)
        size = sum(map(len, texts)) // _BYTES_PER_TOKEN
        bill = Bill() if meter is None else meter.reserve(size, 0)
        num_tokens: int | None = None
        reply: Response
        try:
            reply, num_tokens = await service.lines.tokens.run(caller.tenant, made)
        finally:
            bill.settle(num_tokens)
        return reply

    return routes
