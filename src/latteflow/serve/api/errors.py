"""Errors as OpenAI's clients read them: one object, everywhere, which says nothing of the machine."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Scope

from latteflow.errors import UserError
from latteflow.serve.engine.requests import (
    Cancelled,
    DeadlineExceeded,
    Draining,
    EngineFailed,
    OutOfMemory,
    QueueFull,
    Refused,
)

_KINDS = {408: "timeout_error", 429: "rate_limit_error", 499: "timeout_error"}
"""What ``type`` is; other 4xx are the client's mistake, 5xx the server's."""
_CODES = {404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}
_WORDS = {
    400: "the body cannot be read: send one JSON object",
    404: "there is nothing at this address",
    405: "this address does not take that method",
    413: "the request is too large",
}
_VALIDATION_CODES = {"extra_forbidden": "unknown_parameter", "missing": "missing_required_parameter"}
_CLIENT_CLOSED = 499
_LONGEST_ECHO = 80
_NO_RETRY = {"x-should-retry": "false"}
"""OpenAI's clients ask again by themselves after 408, 429 and 5xx, unless they are told not to."""


class ApiError(HTTPException):
    """What is answered in place of a result.

    Args:
        status: of HTTP.
        code: for programs, such as ``model_not_found``.
        message: for people; it is sent as it is.
        param: the field that is at fault.
        headers: to send along.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.code, self.message, self.param = code, message, param

    def body(self) -> dict[str, Any]:
        """Return the error object."""
        kind = _KINDS.get(self.status_code, "invalid_request_error" if self.status_code < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """Return the answer that holds it."""
        return JSONResponse(self.body(), self.status_code, self.headers)


def error_of(error: Exception) -> ApiError:
    """Return what is said of an exception: the whole truth of those meant to be shown, nothing of any other."""
    match error:
        case ApiError():
            return error
        case UserError():
            return ApiError(400, "invalid_value", str(error))
        case QueueFull():
            return ApiError(429, "queue_full", str(error), headers=_retry_after(error.retry_after))
        case Draining():
            return ApiError(503, "draining", "the server is about to stop: ask again", headers=_retry_after(1))
        case EngineFailed():
            return ApiError(503, "engine_failed", "the engine broke down: ask again", headers=_retry_after(1))
        case OutOfMemory():
            return ApiError(
                503, "out_of_memory", "this alone needs more memory than there is: ask for less", headers=_NO_RETRY
            )
        case DeadlineExceeded():
            return ApiError(408, "deadline_exceeded", "it was not finished within its timeout", headers=_NO_RETRY)
        case Cancelled() | ClientDisconnect():
            return ApiError(_CLIENT_CLOSED, "cancelled", "it was given up")
        case Refused():
            return ApiError(503, "refused", "the server cannot do this now: ask again", headers=_retry_after(1))
        case RequestValidationError():
            return _of_validation(error.errors())
        case StarletteHTTPException():
            status = error.status_code
            words = _WORDS.get(status, "the request cannot be served")
            return ApiError(status, _CODES.get(status, "invalid_request"), words, headers=error.headers)
        case _:
            return ApiError(500, "internal_error", "something broke here; the server's log says what")


def install(app: FastAPI) -> None:
    """Have an application answer every exception with an error object."""
    for kind in (ApiError, UserError, Refused, ClientDisconnect, RequestValidationError, StarletteHTTPException):
        app.add_exception_handler(kind, _answer)
    app.add_exception_handler(Exception, _answer_broken)


def answer_headers(scope: Scope) -> dict[str, str]:
    """Return the headers that every answer has."""
    request_id = scope.get("state", {}).get("request_id", "")
    return {"x-request-id": request_id, "x-content-type-options": "nosniff", "cache-control": "no-store"}


async def _answer(request: Request, error: Exception) -> Response:
    return error_of(error).response()


async def _answer_broken(request: Request, error: Exception) -> Response:
    """Answer what nobody expected: outside all middleware, so the headers have to be added here."""
    response = error_of(error).response()
    response.headers.update({**answer_headers(request.scope), "connection": "close"})  # as uvicorn does after it
    return response


def _of_validation(errors: Any) -> ApiError:
    """Return the first of pydantic's complaints, without what it was given."""
    first = errors[0]
    kind, places = first["type"], [str(place) for place in first["loc"] if place != "body"]
    if kind == "json_invalid":
        return ApiError(400, "invalid_json", _WORDS[400])
    param = ".".join(places)[:_LONGEST_ECHO] or None
    code = _VALIDATION_CODES.get(kind, "invalid_value")
    if code == "unknown_parameter":
        return ApiError(400, code, f"there is no parameter {param!r}", param=param)
    if code == "missing_required_parameter":
        return ApiError(400, code, f"the parameter {param!r} is missing", param=param)
    words = str(first["msg"]).removeprefix("Value error, ")[:300]
    return ApiError(400, code, f"{param or 'the body'}: {words}", param=param)


def _retry_after(seconds: float) -> dict[str, str]:
    return {"Retry-After": str(max(1, math.ceil(seconds)))}
