"""The service behind the gateway: its model, and answers from it as they are generated."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from ..addresses import host_to_ask
from ..answer import Answer
from ..client import endpoint_of
from ..errors import QueueFull, ServiceUnavailable
from ..fields import ChatFields, ModelFields, NoFields, OutputFields, PromptFields
from ..logprobs import TokenLogprobs
from ..options import check_port
from ..transport import Call
from .records import Record

log = logging.getLogger(__name__)

_SECONDS_TO_REMEMBER = 10
"""How long the description of the model is used before the service is asked again: it may have been restarted."""
_SECONDS_TO_ANSWER = 10
"""How long the service may take to describe its model."""


@dataclass(frozen=True)
class Piece:
    """A piece of the answer number `choice`. The last piece of each choice has no text, but the complete `answer`.

    `logprobs` are those of the tokens whose text begins in `text`.
    """

    choice: int
    text: str
    answer: Answer | None = None
    logprobs: Sequence[TokenLogprobs] = ()


class Backend:
    """The service at `host` and `port`. Nothing is sent before the first request."""

    def __init__(self, host: str, port: int) -> None:
        self.host, self.port = host_to_ask(host), check_port(port)
        self._model: ModelFields | None = None
        self._asked_at = 0.0

    async def info(self) -> ModelFields:
        """Return the service's model and its load now. Raise `ServiceUnavailable` if it does not answer in time."""
        try:
            self._model = await asyncio.wait_for(self._ask(), _SECONDS_TO_ANSWER)
        except (asyncio.TimeoutError, ServiceUnavailable) as error:
            reason = str(error) or f"It did not describe its model within {_SECONDS_TO_ANSWER} s."
            self._is_unavailable(reason)
            raise ServiceUnavailable(reason) from None
        self._asked_at = time.monotonic()
        return self._model

    async def model(self) -> ModelFields:
        """Return the service's model, as it was seconds ago at most. Raise `ServiceUnavailable`."""
        if self._model is None or time.monotonic() - self._asked_at > _SECONDS_TO_REMEMBER:
            return await self.info()
        return self._model

    async def generate(
        self, requests: Sequence[ChatFields | PromptFields], record: Record, *, n: int = 1
    ) -> AsyncGenerator[Piece, None]:
        """Send all requests at once, and yield the pieces of their answers as they arrive.

        Each `n` requests have the same prompt, and share its KV cache in the service. If a request fails, cancel the
        others and raise its exception of `helpers.errors`. If the generator is closed, all generation stops.
        """
        pieces: asyncio.Queue[Piece | Exception] = asyncio.Queue()

        async def read(choice: int, request: ChatFields | PromptFields) -> None:
            try:
                async for piece in self._pieces(choice, request, record, prompt=choice // n):
                    pieces.put_nowait(piece)
            except Exception as error:
                if isinstance(error, ServiceUnavailable) and not isinstance(error, QueueFull):
                    self._is_unavailable(str(error))
                pieces.put_nowait(error)

        tasks = [asyncio.ensure_future(read(choice, request)) for choice, request in enumerate(requests)]
        try:
            unfinished = len(tasks)
            while unfinished:
                piece = await pieces.get()
                if isinstance(piece, Exception):
                    raise piece
                unfinished -= piece.answer is not None
                record.is_answered = not unfinished
                yield piece
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _pieces(
        self, choice: int, request: ChatFields | PromptFields, record: Record, *, prompt: int
    ) -> AsyncGenerator[Piece, None]:
        """Yield the pieces of one answer to the prompt number `prompt`.

        Count its tokens as they arrive, because the client may leave at any time.
        """
        answer = Answer(Call(endpoint_of(request), request, OutputFields, self.host, self.port))
        counted, with_logprobs, arrived_at = 0, 0, 0.0
        async with aclosing(answer.__aiter__()) as texts:
            async for text in texts:
                if counted:
                    record.intervals.append(time.perf_counter() - arrived_at)
                else:
                    record.answer_begins(prompt, answer)
                arrived_at = time.perf_counter()
                record.token_arrived()
                record.completion_tokens += answer.completion_tokens - counted
                counted = answer.completion_tokens
                yield Piece(choice, text, logprobs=answer.logprobs[with_logprobs:])
                with_logprobs = len(answer.logprobs)
        record.completion_tokens += answer.completion_tokens - counted  # the last ones may have no text
        yield Piece(choice, "", answer)

    def _is_unavailable(self, reason: str) -> None:
        """Log why the service does not answer, and forget its model: another one may run when it is back."""
        log.warning("%s", reason)
        self._model = None

    async def _ask(self) -> ModelFields:
        call = Call("/info", NoFields(), ModelFields, self.host, self.port)
        async with aclosing(call.documents_async()) as documents:
            async for document in documents:
                return document
        raise ServiceUnavailable("The service does not describe its model. Check the gateway's --service.")


def model_id(model: ModelFields) -> str:
    """Return the model's name for clients: a Hub id as it is, and of a folder's path only the last part."""
    is_path = re.match(r"[/\\~.]|[A-Za-z]:[/\\]", model.model)
    return re.split(r"[/\\]", model.model.rstrip("/\\"))[-1] if is_path else model.model
