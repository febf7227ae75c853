"""Failures in OpenAI's shape: which status a client sees, and the JSON that explains it."""

from __future__ import annotations

import re
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException as StarletteHTTPException

from ..errors import HelpersError, InvalidRequest, QueueFull, ServiceUnavailable

CLIENT_CLOSED_REQUEST = 499
"""The status in the log if the client leaves before its answer is complete (nginx's number)."""
_SECONDS_TO_RETRY = 1
"""If the service does not say when to ask again."""


class ErrorDetails(BaseModel):
    """What went wrong: a sentence for people, and OpenAI's codes for programs."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorReply(BaseModel):
    """The body of every answer that is not a success."""

    error: ErrorDetails


class ApiError(HTTPException):
    """A failure that a client sees as `status_code` and an `ErrorReply`."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
        self.details = ErrorDetails(message=message, type=kind, param=param, code=code)

    def body(self) -> dict[str, Any]:
        """Return the JSON of an `ErrorReply`."""
        return ErrorReply(error=self.details).model_dump()

    def response(self) -> JSONResponse:
        """Return the failure as an HTTP response."""
        return JSONResponse(self.body(), self.status_code, self.headers)


class WrongSetup(ServiceUnavailable):
    """A service answers, but not to a gateway with these options. The text names no address: clients see it."""


SHUTTING_DOWN = ApiError(503, "The gateway is shutting down. Ask again later.", code="shutting_down")
"""What the clients see whose answers are not complete when the gateway has waited long enough."""


def to_api_error(error: Exception) -> ApiError:
    """Return `error` as the client sees it. The text of an unexpected exception stays inside: it may quote a prompt."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InvalidRequest):
        return ApiError(400, str(error))
    if isinstance(error, QueueFull):
        return ApiError(
            429, str(error), code="rate_limit_exceeded", headers={"Retry-After": str(_seconds_to_retry(error))}
        )
    if isinstance(error, WrongSetup):
        return ApiError(503, str(error), code="wrong_setup")
    if isinstance(error, ServiceUnavailable):  # its text names the service's address
        return ApiError(
            503,
            "The service behind the gateway does not answer, or went away. Ask again later.",
            code="service_unavailable",
            headers={"Retry-After": str(_SECONDS_TO_RETRY)},
        )
    # OpenAI's clients repeat a request after a 5xx, unless this header forbids it
    headers = {"x-should-retry": "false"}
    if isinstance(error, HelpersError):
        return ApiError(500, str(error), code="generation_failed", headers=headers)
    return ApiError(
        500,
        f"The gateway failed ({type(error).__name__}). Look into its log for the request id.",
        code="internal_error",
        headers=headers,
    )


def _seconds_to_retry(error: QueueFull) -> int:
    """Return the seconds that the service's message names: "Ask again in 3 s."."""
    named = re.search(r"in (\d+) s\b", str(error))
    return int(named[1]) if named else _SECONDS_TO_RETRY


def handle_errors(app: FastAPI) -> None:
    """Answer every exception of `app` in OpenAI's shape."""

    async def on_error(_: Request, error: Exception) -> JSONResponse:
        return to_api_error(error).response()

    async def on_validation_error(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return _invalid_field(error).response()

    async def on_http_error(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, StarletteHTTPException)
        headers = dict(error.headers or {})
        message = {404: "There is no such path.", 405: "The path does not take this method."}.get(error.status_code)
        message = f"{message} /openapi.json lists the paths." if message else f"{error.detail}."
        return ApiError(error.status_code, message, headers=headers).response()

    app.add_exception_handler(ApiError, on_error)
    app.add_exception_handler(HelpersError, on_error)
    app.add_exception_handler(RequestValidationError, on_validation_error)
    app.add_exception_handler(StarletteHTTPException, on_http_error)


def _invalid_field(error: RequestValidationError) -> ApiError:
    """Return the first field that is wrong, and why. The field's value is not quoted: it may be a whole prompt."""
    first = error.errors()[0]
    reason = first.get("ctx", {}).get("error")
    if isinstance(reason, UnsupportedField):
        return ApiError(400, str(reason), code="unsupported_parameter", param=reason.name)
    if isinstance(reason, InvalidRequest):
        return ApiError(400, str(reason))
    name = ".".join(str(part) for part in first["loc"][1:])
    if not name:
        return ApiError(400, "The body is not a JSON object. Send one, with the header content-type: application/json.")
    if first["type"] == "missing":
        return ApiError(400, f"{name} is missing. Add it.", code="missing_required_parameter", param=name)
    return ApiError(400, f"{name} is wrong: {first['msg']}. Correct it.", code="invalid_value", param=name)


class UnsupportedField(InvalidRequest):
    """A field of a request that the gateway does not support."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name!r:.80} is not supported, or not with this value. Leave it out.")
        self.name = name
