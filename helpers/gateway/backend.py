"""What the services behind the gateway do for it: name their model, and answer as the text is generated."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import NamedTuple

from ..answer import Answer
from ..client import endpoint_of
from ..errors import QueueFull, ServiceUnavailable
from ..fields import ChatFields, ModelFields, OutputFields, PromptFields
from ..logprobs import TokenLogprobs
from .errors import ApiError, WrongSetup
from .openai_services import OpenAIServices, ServerModel
from .records import Record
from .services import Services

log = logging.getLogger(__name__)

_SECONDS_TO_REMEMBER = 10
"""How long the description of the model is used before the service is asked again: it may have been restarted."""
_SECONDS_BEFORE_RETRY = 0.25
"""In this time, the health check reports that the service which failed is not serving, so another one is tried."""


class Piece(NamedTuple):
    """A piece of the answer number `choice`. The last piece of each choice has no text, but the complete `answer`.

    `logprobs` are those of the tokens whose text begins in `text`.
    """

    choice: int
    text: str
    answer: Answer | None = None
    logprobs: Sequence[TokenLogprobs] = ()


class Backend:
    """What all requests share: the services, and their model as it was last seen."""

    def __init__(self, services: Services | OpenAIServices) -> None:
        self.services = services
        self._model: ModelFields | ServerModel | None = None
        self._asked_at = 0.0

    async def info(self) -> ModelFields | ServerModel:
        """Return the model that the services run now, and the load of one of them.

        Raise `ServiceUnavailable` if none describes its model in time, and an `ApiError` if their models differ.
        """
        self._model = None
        replies = (await self.services.describe()).values()
        models = [reply for reply in replies if not isinstance(reply, ServiceUnavailable)]
        failures = [reply for reply in replies if isinstance(reply, ServiceUnavailable)]
        for failure in failures:
            log.warning("%s", failure)
        if not models:
            wrong = [failure for failure in failures if isinstance(failure, WrongSetup)]
            raise wrong[0] if wrong else ServiceUnavailable("No service describes its model.")
        names = sorted({model_id(model) for model in models})
        if len(names) > 1:
            message = f"The services behind the gateway run different models: {', '.join(names)}."
            log.error("%s", message)
            raise ApiError(503, f"{message} Start all of them with the same --model.", code="models_differ")
        self._model, self._asked_at = min(models, key=lambda model: model.context_length or 0), time.monotonic()
        return self._model

    async def model(self) -> ModelFields | ServerModel:
        """Return the services' model, as it was seconds ago at most. Raise as `info` does."""
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
        answers = [self._pieces(choice, request, record, prompt=choice // n) for choice, request in enumerate(requests)]
        unfinished = len(answers)
        try:
            async with aclosing(_merge(answers)) as pieces:
                async for piece in pieces:
                    unfinished -= piece.answer is not None
                    record.is_answered = not unfinished
                    yield piece
        except ServiceUnavailable as error:
            if not isinstance(error, QueueFull):
                log.warning("%s", error)
                self._model = None  # another one may run when the service is back
            raise

    async def _pieces(
        self, choice: int, request: ChatFields | PromptFields, record: Record, *, prompt: int
    ) -> AsyncGenerator[Piece, None]:
        """Yield the pieces of one answer to the prompt number `prompt`.

        If the answer fails before its first token, ask once more, if there are several services.
        """
        may_retry = self.services.count > 1
        while True:
            answer = Answer(self.services.call(endpoint_of(request), request, OutputFields))
            try:
                async with aclosing(self._read(answer, choice, record, prompt=prompt)) as pieces:
                    async for piece in pieces:
                        yield piece
                return
            except ServiceUnavailable as error:
                if answer.completion_tokens or not may_retry:
                    raise
                log.warning("%s A request is sent again.", error)
            may_retry = False
            await asyncio.sleep(_SECONDS_BEFORE_RETRY)

    async def _read(self, answer: Answer, choice: int, record: Record, *, prompt: int) -> AsyncGenerator[Piece, None]:
        """Yield the pieces of `answer`, and count its tokens as they arrive: the client may leave at any time."""
        counted, with_logprobs, arrived_at, told = 0, 0, 0.0, False
        async with aclosing(answer.__aiter__()) as texts:
            async for text in texts:
                if counted:
                    record.intervals.append(time.perf_counter() - arrived_at)
                elif told := answer.prompt_tokens is not None:
                    record.prompt_is_read(prompt, answer)
                arrived_at = time.perf_counter()
                record.token_arrived()
                record.completion_tokens += answer.completion_tokens - counted
                counted = answer.completion_tokens
                yield Piece(choice, text, logprobs=answer.logprobs[with_logprobs:])
                with_logprobs = len(answer.logprobs)
        record.completion_tokens += answer.completion_tokens - counted  # the last ones may have no text
        if not told:  # a server with OpenAI's API tells it at the end
            record.prompt_is_read(prompt, answer)
        yield Piece(choice, "", answer)


async def _merge(sources: Sequence[AsyncGenerator[Piece, None]]) -> AsyncGenerator[Piece, None]:
    """Yield what all sources yield, as it arrives. If one raises, close the others, and raise its exception."""
    if len(sources) == 1:  # without a task and a queue: they take much of the gateway's time for a token
        async with aclosing(sources[0]):
            async for piece in sources[0]:
                yield piece
        return
    arrived: asyncio.Queue[Piece | Exception | None] = asyncio.Queue()

    async def read(source: AsyncGenerator[Piece, None]) -> None:
        try:
            async with aclosing(source):
                async for piece in source:
                    arrived.put_nowait(piece)
            arrived.put_nowait(None)
        except Exception as error:
            arrived.put_nowait(error)

    tasks = [asyncio.ensure_future(read(source)) for source in sources]
    try:
        running = len(tasks)
        while running:
            item = await arrived.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def model_id(model: ModelFields | ServerModel) -> str:
    """Return the model's name for clients: a Hub id as it is, and of a folder's path only the last part."""
    is_path = re.match(r"[/\\~.]|[A-Za-z]:[/\\]", model.model)
    return re.split(r"[/\\]", model.model.rstrip("/\\"))[-1] if is_path else model.model
