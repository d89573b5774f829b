"""``POST /v1/responses``: a chat in OpenAI's newer words. Nothing is stored."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from kvshare_mm.apps.server.answering import Answers, server_sent
from kvshare_mm.apps.server.chat import ERRORS, STREAMS, chat_generation
from kvshare_mm.apps.server.errors import ApiError, as_api_error
from kvshare_mm.apps.server.json_bodies import json_route
from kvshare_mm.apps.server.response_items import Answer, as_chat, head
from kvshare_mm.apps.server.schema import ResponsesBody
from kvshare_mm.apps.server.service import Service
from kvshare_mm.errors import InvalidRequestError
from kvshare_mm.outputs import RequestOutput


def router(service: Service) -> APIRouter:
    """The routes, for one service."""
    routes = APIRouter(route_class=json_route(service.lines.parsing))

    @routes.post("/v1/responses", responses={**ERRORS, **STREAMS})
    async def responses(body: ResponsesBody, request: Request) -> Response:
        """Answer texts, pictures and results of tools; with `stream`, as server-sent events."""
        body.check(service.options.model_name)
        chat = as_chat(body)

        def answer() -> Answer:
            make = generation.specs[0].calls
            known = head(body, request.state.request_id, service.options.model_name)
            return Answer(known, make() if make is not None else None)

        def whole(outputs: Sequence[RequestOutput]) -> dict[str, Any]:
            told, [output] = answer(), outputs
            for _ in (*told.go_on(output.text), *told.end(output, generation.provenance())):
                pass  # of events nobody hears
            return told.reply

        async def events(running: Answers) -> AsyncIterator[str]:
            told = answer()
            try:
                for event in told.begin():
                    yield server_sent(event, event["type"])
                async for _, chunk in generation.chunks(running):
                    for event in told.go_on(chunk.text):
                        yield server_sent(event, event["type"])
                    if chunk.output is not None:
                        for event in told.end(chunk.output, generation.provenance()):
                            yield server_sent(event, event["type"])
            except Exception as error:
                for event in told.fail(as_api_error(error)):
                    yield server_sent(event, event["type"])

        try:
            generation = await chat_generation(service, request, chat.body, {})
            if body.stream:
                return await generation.tell(events)
            return await generation.answer(whole)
        except (ApiError, InvalidRequestError) as error:
            raise chat.renamed(as_api_error(error)) from error

    @routes.get("/v1/responses/{response_id}", include_in_schema=False)
    @routes.delete("/v1/responses/{response_id}", include_in_schema=False)
    @routes.get("/v1/responses/{response_id}/input_items", include_in_schema=False)
    @routes.post("/v1/responses/{response_id}/cancel", include_in_schema=False)
    async def stored(response_id: str) -> None:
        raise ApiError(
            404, f"no response is stored here, {response_id!r} neither", code="not_stored"
        )

    return routes
