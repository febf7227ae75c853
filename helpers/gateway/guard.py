"""What a request must pass before its route sees it: the API key, then the type, size and depth of its body."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.requests import ClientDisconnect

from .errors import CLIENT_CLOSED_REQUEST, ApiError
from .records import record_of
from .settings import settings_of

SECONDS_FOR_BODY = 30
"""How long a client may take to send its body."""


class LimitedRequest(Request):
    """A request whose body is JSON of limited size. FastAPI reads it through these two methods."""

    async def body(self) -> bytes:
        """Return the body. Raise an `ApiError` if it is too large, of another type, compressed, or too slow."""
        if not hasattr(self, "_body"):
            self._check_headers()
            try:
                self._body = await asyncio.wait_for(self._read(), SECONDS_FOR_BODY)
            except asyncio.TimeoutError:
                raise ApiError(
                    408, f"The body did not arrive within {SECONDS_FOR_BODY} s. Send it faster.", code="timeout"
                ) from None
            except ClientDisconnect:
                raise ApiError(CLIENT_CLOSED_REQUEST, "The client left.") from None
        return self._body

    async def json(self) -> Any:
        """Return what the body holds. Raise an `ApiError` for text that is not JSON.

        pydantic's parser refuses more than 200 lists and objects inside one another.
        """
        body = await self.body()
        try:
            return from_json(body, allow_inf_nan=False)
        except ValueError as error:
            raise ApiError(400, f"The body is not valid JSON ({error}). Correct it.", code="invalid_json") from None

    def _check_headers(self) -> None:
        kind = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, "The body must be JSON. Send it with the header content-type: application/json.")
        if self.headers.get("content-encoding", "identity").lower() != "identity":
            raise ApiError(415, "The body is compressed. Send it without a content-encoding.")
        length = self.headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > settings_of(self).max_body:
            raise self._too_large()

    async def _read(self) -> bytes:
        body = bytearray()
        async for chunk in self.stream():
            body += chunk
            if len(body) > settings_of(self).max_body:
                raise self._too_large()
        return bytes(body)

    def _too_large(self) -> ApiError:
        limit = settings_of(self).max_body
        # closed, because the server would otherwise read the rest
        return ApiError(
            413,
            f"The body has more than {limit:,} bytes. Shorten it.",
            code="request_too_large",
            headers={"Connection": "close"},
        )


class GuardedRoute(APIRoute):
    """A route that needs a key, if the gateway has any, and reads a `LimitedRequest`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def guarded(request: Request) -> Response:
            check_key(request)
            return await handler(LimitedRequest(request.scope, request.receive))

        return guarded


def check_key(request: Request) -> None:
    """Raise an `ApiError` of status 401 if the gateway has keys, and the request has none of them."""
    keys = settings_of(request).keys
    if not keys:
        return
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    name = keys.name_of(key.strip()) if scheme.lower() == "bearer" else None
    if name is None:
        raise ApiError(
            401,
            "The API key is missing or wrong. Send the header Authorization: Bearer YOUR_KEY.",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
    record_of(request).key = name
