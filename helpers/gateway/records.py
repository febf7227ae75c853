"""What happens to each HTTP request: its id, its place in the log and in the metrics. Never its text."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import traceback
import uuid
from dataclasses import dataclass, field

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..answer import Answer
from .errors import CLIENT_CLOSED_REQUEST, SHUTTING_DOWN, to_api_error
from .metrics import Metrics

log = logging.getLogger(__name__)

_IN_SCOPE = "helpers.gateway.record"
_QUIET = ("/health", "/ready", "/metrics", "/page/{name}")
"""Routes that programs and the page ask again and again. The log has only their failures."""
_REQUEST_ID = "x-request-id"


@dataclass
class Record:
    """One HTTP request. The log and the metrics are written from it when the request has ended.

    - `status`: of the response, or 499 if the client left before the answer was complete.
    - `key`: the name of the API key.
    - `prompts`: the number of each prompt → its tokens, and how many of them came from the service's prefix cache.
    - `queue_times`: seconds that each answer waited in the service's queue.
    - `intervals`: seconds between two pieces of text of one answer.
    - `failure`: OpenAI's code of an error in the middle of a stream, whose status is 200.
    - `is_answered`: all answers are complete.
    """

    request_id: str
    method: str
    route: str = "other"
    status: int = 500
    key: str = ""
    prompts: dict[int, tuple[int, int]] = field(default_factory=dict)
    completion_tokens: int = 0
    started: float = field(default_factory=time.perf_counter)
    first_token: float | None = None
    queue_times: list[float] = field(default_factory=list)
    intervals: list[float] = field(default_factory=list)
    failure: str | None = None
    is_answered: bool = False

    @property
    def prompt_tokens(self) -> int:
        """Return the tokens of all prompts, each counted once."""
        return sum(tokens for tokens, _ in self.prompts.values())

    @property
    def cached_tokens(self) -> int:
        """Return how many tokens of the prompts came from the service's prefix cache."""
        return sum(cached for _, cached in self.prompts.values())

    def prompt_is_read(self, prompt: int, answer: Answer) -> None:
        """Note how long the prompt number `prompt` is, as soon as an answer to it tells.

        Several answers may share a prompt. The first of them reads it, and only the others find it in the cache.
        """
        _, cached = self.prompts.get(prompt, (0, answer.cached_tokens or 0))
        self.prompts[prompt] = answer.prompt_tokens or 0, min(cached, answer.cached_tokens or 0)
        if answer.queue_seconds is not None:
            self.queue_times.append(answer.queue_seconds)

    def client_left(self) -> None:
        """Note that the client left before its answer was complete."""
        self.status = CLIENT_CLOSED_REQUEST

    def token_arrived(self) -> None:
        """Note that a piece of text arrived."""
        if self.first_token is None:
            self.first_token = time.perf_counter() - self.started

    def line(self) -> str:
        """Return the line for the log."""
        words = [self.method, self.route, str(self.status), f"id={self.request_id}"]
        if self.key:
            words.append(f"key={self.key}")
        if self.first_token is not None:
            words += [f"prompt_tokens={self.prompt_tokens}", f"completion_tokens={self.completion_tokens}"]
            words.append(f"first_token={self.first_token:.3f}s")
        if self.failure:
            words.append(f"failure={self.failure}")
        return " ".join([*words, f"total={time.perf_counter() - self.started:.3f}s"])


def record_of(connection: HTTPConnection) -> Record:
    """Return the record of a request."""
    record: Record = connection.scope[_IN_SCOPE]
    return record


class RecordRequests:
    """ASGI middleware: give each request an id, and write its record when it ends. Answer unexpected exceptions."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = Record(_request_id(Headers(scope=scope)), method=scope["method"])
        scope[_IN_SCOPE] = record
        has_started = False

        async def send_with_id(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started, record.status = True, message["status"]
                MutableHeaders(scope=message)[_REQUEST_ID] = record.request_id
            await send(message)

        try:
            with self._metrics.in_progress.track_inprogress():
                await self._app(scope, receive, send_with_id)
        except Exception as error:
            log_without_text(error, record)  # not raised: the server would log its text
            if not has_started:
                await to_api_error(error).response()(scope, receive, send_with_id)
        except asyncio.CancelledError:  # the server stops, and has waited long enough
            if has_started:
                raise
            await SHUTTING_DOWN.response()(scope, receive, send_with_id)
        finally:
            record.route = getattr(scope.get("route"), "path", record.route)
            self._metrics.add(record)
            is_quiet = record.route in _QUIET and record.status == 200
            log.log(logging.DEBUG if is_quiet else logging.INFO, "%s", record.line())


def _request_id(headers: Headers) -> str:
    """Return the id that the client or a proxy gave, if it is harmless in a log, or a new one."""
    given = headers.get(_REQUEST_ID, "")
    return given if re.fullmatch(r"[\w.-]{1,64}", given, re.ASCII) else f"req-{uuid.uuid4().hex}"


def log_without_text(error: Exception, record: Record) -> None:
    """Log where an unexpected exception was raised, but not its message, which may quote a prompt."""
    frames = traceback.extract_tb(error.__traceback__)
    places = " > ".join(f"{frame.filename}:{frame.lineno}" for frame in frames[-5:])
    log.error("%s in id=%s at %s", type(error).__name__, record.request_id, places)
