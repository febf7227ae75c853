"""Server-sent events: how a stream is framed, kept alive and ended.

A failure before the first event gets an HTTP status of its own. A later one becomes an event, because the status has
been sent.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

import anyio
from fastapi.sse import KEEPALIVE_COMMENT
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..errors import HelpersError
from .disconnects import cancel, client_left, unless_client_leaves
from .errors import SHUTTING_DOWN, ApiError, to_api_error
from .records import Record, log_without_text, record_of

DONE = b"data: [DONE]\n\n"
"""OpenAI's last event of a stream that is complete."""
SECONDS_TO_READ = 60
"""How long a client may read nothing before its stream ends."""

Events = AsyncGenerator[bytes, None]
_to_json = json.JSONEncoder(separators=(",", ":")).encode


def event(data: dict[str, Any], name: str | None = None) -> bytes:
    """Return `data` as an event.

    All text is ASCII: some clients split lines with Python's `str.splitlines`, which also splits at U+2028.
    """
    head = "" if name is None else f"event: {name}\n"
    return f"{head}data: {_to_json(data)}\n\n".encode()


def error_event(error: Exception) -> bytes:
    """Return `error` as the event that OpenAI's clients raise."""
    return event(to_api_error(error).body())


async def stream(
    request: Request, events: Events, *, keep_alive: float, on_error: Callable[[Exception], bytes] = error_event
) -> Response:
    """Return the response that sends `events`, with a comment whenever none arrives for `keep_alive` seconds.

    Raise what the first event raises, if it does so within `keep_alive` seconds. `on_error` returns the event for a
    later exception, after which the stream ends. If the client leaves, close `events`.
    """
    first = asyncio.ensure_future(anext(events, None))
    try:
        await unless_client_leaves(request, asyncio.wait({first}, timeout=keep_alive))
        if first.done():
            first.result()
    except BaseException:
        await cancel(first)
        await events.aclose()
        raise
    return EventStream(events, first, keep_alive=keep_alive, on_error=on_error, record=record_of(request))


class EventStream(Response):
    """The response of `stream`. It watches the connection, which Starlette's own does only with some servers.

    If the server cancels it, because it stops and has waited long enough, the stream ends with an error.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: Events,
        first: asyncio.Future[bytes | None],
        *,
        keep_alive: float,
        on_error: Callable[[Exception], bytes],
        record: Record,
    ) -> None:
        self.status_code, self.background = 200, None
        # X-Accel-Buffering: nginx must pass each event on at once
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._events, self._first, self._keep_alive = events, first, keep_alive
        self._on_error, self._record = on_error, record
        self._is_sending, self._since = False, time.monotonic()  # whether an event is being sent, and since when

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send(send))
        leaving = asyncio.ensure_future(client_left(receive))
        try:
            await self._watch({sending, leaving}, send)
        except asyncio.CancelledError:
            # nothing is awaited before the event is sent: the server cancels this task again in its next step
            await send({**_body(self._failed(SHUTTING_DOWN)), "more_body": False})
            sending.cancel()
            leaving.cancel()
            return
        if not (sending.done() or self._record.is_answered):  # some clients close the connection right after [DONE]
            self._record.client_left()
        await cancel(sending, leaving)
        if not sending.cancelled():
            sending.result()  # raises what sending raised

    async def _send(self, send: Send) -> None:
        """Send the events, without a task or a timer for each: they would take longer than the rest."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self._chunks()) as chunks:
            async for chunk in chunks:
                self._is_sending, self._since = True, time.monotonic()
                await send(_body(chunk))
                self._is_sending = False
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _watch(self, tasks: set[asyncio.Future[None]], send: Send) -> None:
        """Return when one of the tasks ends, or if the client does not read. While no event comes, send comments."""
        while True:
            silent = time.monotonic() - self._since
            done, _ = await asyncio.wait(
                tasks, timeout=self._keep_alive - silent % self._keep_alive, return_when=asyncio.FIRST_COMPLETED
            )
            silent = time.monotonic() - self._since
            if done or (self._is_sending and silent > SECONDS_TO_READ):
                return
            if not self._is_sending and silent >= self._keep_alive:
                with anyio.move_on_after(SECONDS_TO_READ) as patience:
                    await send(_body(KEEPALIVE_COMMENT))
                if patience.cancelled_caught:
                    return

    async def _chunks(self) -> Events:
        """Yield the events, and an event for an exception."""
        try:
            chunk = await self._first
            while chunk is not None:
                yield chunk
                chunk = await anext(self._events, None)
        except Exception as error:
            yield self._failed(error)
        finally:
            await cancel(self._first)
            await self._events.aclose()

    def _failed(self, error: Exception) -> bytes:
        if not isinstance(error, (HelpersError, ApiError)):
            log_without_text(error, self._record)
        self._record.failure = to_api_error(error).details.code or "invalid_request"
        return self._on_error(error)


def _body(chunk: bytes) -> dict[str, Any]:
    return {"type": "http.response.body", "body": chunk, "more_body": True}
