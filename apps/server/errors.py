"""Errors in OpenAI's shape, with the status that tells a client what to do."""

from __future__ import annotations

import logging
import math
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from kvshare_mm.errors import (
    EngineClosedError,
    InvalidRequestError,
    ModelOutputError,
    QueueFullError,
)
from kvshare_mm.modalities.decoding import DecoderFailedError

logger = logging.getLogger(__name__)

_LONGEST_MESSAGE = 1000
_LONGEST_PARAM = 200

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    421: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """What every error looks like."""

    error: ErrorDetail


class ApiError(Exception):
    """An error that is answered as it stands.

    Attributes:
        status: HTTP status.
        param: the offending field, or None.
        code: a short name for programs, or None.
        retry_after: seconds after which to try again, or None.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        """The JSON that OpenAI's clients expect."""
        return {
            "error": {
                "message": _bounded(str(self), _LONGEST_MESSAGE),
                "type": _TYPES.get(self.status, "internal_error"),
                "param": None if self.param is None else _bounded(self.param, _LONGEST_PARAM),
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        headers = {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after)))
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body, self.status, headers)


def clean(text: str) -> str:
    """Text that can be sent: JSON can spell half surrogate pairs, UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _bounded(text: str, most: int) -> str:
    # What was sent is quoted: a megabyte of it need not come back, nor fill a client's log.
    return clean(text if len(text) <= most else f"{text[:most]}...")


def as_api_error(error: Exception, retry_after: float = 1.0) -> ApiError:
    """What a client is told of an error of the engine."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InvalidRequestError):
        return ApiError(400, str(error), error.field)
    if isinstance(error, QueueFullError):
        return ApiError(429, str(error), code="queue_full", retry_after=retry_after)
    if isinstance(error, EngineClosedError):
        return ApiError(503, "the server is shutting down", retry_after=5)
    if isinstance(error, DecoderFailedError):
        logger.error("%s", error)
        return ApiError(503, str(error), code="decoder_failed", retry_after=5)
    if isinstance(error, TimeoutError):
        return ApiError(408, "the request took longer than this server allows", code="timeout")
    logger.error("a request failed", exc_info=error)
    if isinstance(error, ModelOutputError):
        return ApiError(500, str(error), code="model_output")
    return ApiError(500, "internal error; the server's log has more under this request's id")


def _place(error: Any, body: Any) -> list[str | int]:
    """Where in the request it is; names of types that pydantic tried in vain are no fields."""
    # The first part is "body", "query" or "path".
    location: tuple[Any, ...] = error["loc"]
    origin, *parts = location
    if origin != "body":
        return parts
    place: list[str | int] = []
    for i, part in enumerate(parts):
        inside = isinstance(part, int) and part < len(body) if isinstance(body, list) else None
        if inside or (isinstance(body, dict) and part in body):
            body = body[part]
        elif not (error["type"] == "missing" and i == len(parts) - 1):
            continue
        place.append(part)
    return place


def install(app: FastAPI) -> None:
    """Answer every error of `app` in OpenAI's shape."""

    @app.exception_handler(ApiError)
    @app.exception_handler(InvalidRequestError)
    @app.exception_handler(DecoderFailedError)
    @app.exception_handler(EngineClosedError)
    async def known(_: Request, error: Exception) -> JSONResponse:
        return as_api_error(error).response()

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = [str(part) for part in _place(first, error.body)]
        if first["type"] == "json_invalid":
            return ApiError(400, f"the body is no JSON: {first['ctx']['error']}").response()
        if not place:
            return ApiError(
                400, "the body must be a JSON object, sent as application/json"
            ).response()
        param = ".".join(place)
        return ApiError(400, f"{param}: {first['msg']}", param).response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        message = str(error.detail)
        if error.status_code == 404:
            message = f"there is no {request.url.path} here"
        response = ApiError(error.status_code, message).response()
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def unknown(_: Request, error: Exception) -> JSONResponse:
        return as_api_error(error).response()
