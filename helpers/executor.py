"""The engine behind Jina endpoints: a request in, one document per token out.

`TokenStreamingExecutor` and its ``/stream`` are the article's; ``/chat`` takes messages, ``/count`` tells how
long they are for the model, and ``/info`` which model is behind. No endpoint ever raises because of a request.
Behind Jina's gateway, an exception in a generator is swallowed and the request run again, up to four times;
so a failure travels in the last document of the stream, and nothing is generated twice.

No ``from __future__ import annotations`` here: Jina needs the endpoints' annotations to be classes.
"""

import asyncio
import logging
import os
import sys
import threading
from typing import Any, AsyncIterator, Callable, List, Optional, Tuple

from docarray import BaseDoc
from pydantic import ValidationError

from . import models, prompts
from ._jina import Executor, requests
from .detokenizer import Detokenizer
from .engine import MAX_LIVE, MAX_WAITING, Engine, check_limits
from .errors import HelpersError, InvalidRequest, ServiceUnavailable, to_wire
from .processes import wait_for_end_of_parent
from .schemas import (
    ChatDocument,
    CountDocument,
    ModelDocument,
    ModelOutputDocument,
    PromptDocument,
    Sampling,
    what_is_wrong,
)

log = logging.getLogger(__name__)


class _Received(Sampling):
    """A request as it arrives: one that cannot be read still reaches its endpoint, as a refusal."""

    refusal: Optional[str] = None

    @classmethod
    def from_protobuf(cls, pb_msg: Any) -> "_Received":
        try:
            return super().from_protobuf(pb_msg)
        except Exception as error:
            why = what_is_wrong(error) if isinstance(error, ValidationError) else error
            refusal = f"The request cannot be read: {why}."
            return cls.model_construct(prompt="", messages=[], max_tokens=0, refusal=refusal)


class PromptRequest(_Received, PromptDocument):
    """A `PromptDocument` as the service receives it."""


class ChatRequest(_Received, ChatDocument):
    """A `ChatDocument` as the service receives it."""


class TokenStreamingExecutor(Executor):
    """A chat model that streams its answers.

    `model` and `precision` are those of `helpers.models.load`, which runs while the executor starts;
    `max_live`, `max_waiting` and `cache_memory` (bytes) those of `helpers.engine.Engine`, and `context_length`
    too: by default it is the model's own window, and it cannot be longer.
    With `parent`, the id of the process that starts this one, it ends when that does, however that ends.
    """

    def __init__(
        self,
        model: str = "auto",
        precision: str = "auto",
        parent: Optional[int] = None,
        context_length: Optional[int] = None,
        max_live: int = MAX_LIVE,
        max_waiting: int = MAX_WAITING,
        cache_memory: Optional[int] = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        # the model's thread needs Python's lock between any two operations, and the event loop holds it for
        # this long: with the 5 ms of Python itself, eight readers get 2 % fewer tokens
        sys.setswitchinterval(0.0001)
        if parent is not None:
            threading.Thread(target=_die_with, args=(parent,), name="die-with-parent", daemon=True).start()
        self._tokenizing = 0
        try:
            check_limits(max_live, max_waiting, context_length)
            self.chat_model = models.load(model, precision)
            self.engine = Engine(
                self.chat_model.model,
                eos_token_ids=self.chat_model.eos_token_ids,
                context_length=min(filter(None, (self.chat_model.context_length, context_length))),
                max_live=max_live,
                max_waiting=max_waiting,
                cache_memory=cache_memory,
            )
        except HelpersError as error:  # Jina swallows it: whoever started the service reads it here
            print(to_wire(error), file=sys.stderr, flush=True)
            logging.disable()  # of Jina, which has less to say about it
            raise
        self._longest_token = max(map(len, self.chat_model.tokenizer.get_vocab()))

    @requests(on="/stream")
    async def task(self, doc: PromptRequest, **kwargs: Any) -> ModelOutputDocument:
        """Continue the raw text of a prompt."""
        async for output in self._answer(doc, self._prompt_ids):
            yield output

    @requests(on="/chat")
    async def chat(self, doc: ChatRequest, **kwargs: Any) -> ModelOutputDocument:
        """Answer a dialog; its oldest turns are left out where it outgrows the model's window."""
        async for output in self._answer(doc, self._dialog_ids):
            yield output

    @requests(on="/info")
    async def info(self, doc: BaseDoc, **kwargs: Any) -> ModelDocument:
        """Tell which model is behind, and how busy it is."""
        yield ModelDocument(
            model=self.chat_model.name,
            precision=self.chat_model.precision,
            device=self.chat_model.device,
            context_length=self.engine.context_length,
            steps=self.engine.steps,
            live=self.engine.live,
            waiting=self.engine.waiting,
        )

    @requests(on="/count")
    async def count(self, doc: ChatRequest, **kwargs: Any) -> CountDocument:
        """Tell how many tokens of the model's window a dialog takes."""
        counted = CountDocument(prompt_tokens=0, context_length=self.engine.context_length)
        try:
            if doc.refusal:
                raise InvalidRequest(doc.refusal)
            counted.prompt_tokens = await self._tokenized(doc, self._count)
        except Exception as error:
            counted.error = to_wire(error)
        yield counted

    @requests
    async def unknown(self, doc: BaseDoc, **kwargs: Any) -> ModelOutputDocument:
        """Any other endpoint."""
        yield _failed(InvalidRequest("This service has no such endpoint: use /stream, /chat, /count or /info."))

    def close(self) -> None:
        if hasattr(self, "engine"):
            self.engine.close()
        super().close()

    async def _tokenized(self, doc: Any, work: Callable[[Any], Any]) -> Any:
        """What `work` makes of a request, in a thread: it may take long, and the event loop belongs to all."""
        self.engine.check_place(self._tokenizing)
        self._tokenizing += 1
        try:
            return await asyncio.to_thread(work, doc)
        finally:
            self._tokenizing -= 1

    def _count(self, doc: ChatRequest) -> int:
        self._check_lengths(doc)
        return prompts.count_tokens(doc.messages, self.chat_model.tokenizer)

    def _prompt_ids(self, doc: PromptRequest) -> Tuple[List[int], int]:
        self._check_length(len(doc.prompt))
        return prompts.token_ids(doc.prompt, self.chat_model.tokenizer), 0

    def _dialog_ids(self, doc: ChatRequest) -> Tuple[List[int], int]:
        self._check_lengths(doc)
        fitted = prompts.fit_to_window(
            doc.messages,
            self.chat_model.tokenizer,
            window=self.engine.context_length,
            max_tokens=doc.max_tokens,
        )
        return fitted.token_ids, fitted.dropped_turns

    def _check_lengths(self, doc: ChatRequest) -> None:
        for message in doc.messages[:1] + doc.messages[-1:]:  # those that are never left out
            self._check_length(len(message.get("content", "")))

    def _check_length(self, characters: int) -> None:
        """Refuse, before it is tokenised, what cannot fit even if it were all of the longest token."""
        if characters > self._longest_token * self.engine.context_length:
            raise InvalidRequest(
                f"The request has {characters:,} characters, far more than the model's window of "
                f"{self.engine.context_length:,} tokens can hold. Shorten it."
            )

    async def _answer(
        self, doc: _Received, ids_of: Callable[[Any], Tuple[List[int], int]]
    ) -> AsyncIterator[ModelOutputDocument]:
        """The whole stream for one request: a document per token, and the last one."""
        generation = None
        try:
            if doc.refusal:
                raise InvalidRequest(doc.refusal)
            prompt_ids, dropped_turns = await self._tokenized(doc, ids_of)
            generation = self.engine.submit(
                prompt_ids,
                max_tokens=doc.max_tokens,
                temperature=doc.temperature,
                top_p=doc.top_p,
                seed=doc.seed,
            )
            text = Detokenizer(self.chat_model.tokenizer, stop=doc.stop)
            sent = 0
            read = {"prompt_tokens": len(prompt_ids), "dropped_turns": dropped_turns}
            async for token_id in generation:
                first = {} if sent else read  # for those who leave before the last
                sent += 1
                yield ModelOutputDocument(token_id=token_id, generated_text=text.push(token_id), **first)
                if text.stopped:
                    break
            if generation.finish_reason == "cancelled":
                raise ServiceUnavailable(
                    "The service was stopped before the answer was complete. Start it, and ask again."
                )
            yield ModelOutputDocument(
                token_id=-1,
                generated_text=text.finish(),
                finish_reason="stop" if text.stopped else generation.finish_reason,
                completion_tokens=sent,
                **read,
            )
        except Exception as error:
            if not isinstance(error, HelpersError):
                log.exception("a request failed")
            yield _failed(error)
        finally:
            if generation is not None:
                generation.cancel()


def _failed(error: Exception) -> ModelOutputDocument:
    return ModelOutputDocument(
        token_id=-1, generated_text="", finish_reason="error", error=to_wire(error)
    )


def _die_with(parent: int) -> None:
    """End this process when its parent does: a parent that is killed cannot stop its children."""
    wait_for_end_of_parent(parent)
    os._exit(1)
