"""The engine behind Jina endpoints: a request in, one document per token out.

`TokenStreamingExecutor` and ``/stream`` are the article's. ``/chat`` answers a dialog, ``/count`` counts its tokens,
and ``/info`` describes the model. No endpoint raises because of a request: Jina's gateway would swallow
an exception in a generator and repeat the request up to four times. So a failure travels in the last document of the
stream, and nothing is generated twice.
"""

# Jina reads the annotations of an endpoint. They must be classes, so no `from __future__ import annotations`; and the
# return type must be the class that the endpoint yields, which a type checker does not expect of a generator.
# mypy: disable-error-code="misc"
import asyncio
import logging
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any, Dict, List, Optional, Tuple, TypeVar, cast

from pydantic import ValidationError

from . import prompts
from ._jina import BaseDoc, Executor, prepare_service, requests
from .detokenizer import Detokenizer
from .errors import HelpersError, InvalidRequest, ServiceUnavailable, to_wire
from .fields import own_refusal, validation_message
from .loading import LoadedModel, load_model
from .logprobs import Logprob, to_fields
from .options import EngineArgs
from .processes import exit_with_parent_process
from .schemas import (
    ChatDocument,
    CountDocument,
    ModelDocument,
    ModelOutputDocument,
    PromptDocument,
    SamplingDocument,
)
from .sequence import TokenStream

prepare_service()
log = logging.getLogger(__name__)

SWITCH_INTERVAL = 0.0001
"""Seconds after which a thread releases Python's lock. The engine's thread needs the lock between any two operations
of the model: with Python's default, 5 ms, eight clients together get 2 % fewer tokens per second."""

Result = TypeVar("Result")


class _Received(SamplingDocument):
    """A request as it arrives. If it cannot be read, it still reaches its endpoint, with the reason in `refusal`."""

    refusal: Optional[str] = None

    @classmethod
    def from_protobuf(cls, pb_msg: Any) -> "_Received":
        try:
            return super().from_protobuf(pb_msg)
        except Exception as error:
            why = validation_message(error) if isinstance(error, ValidationError) else error
            refusal = str(own_refusal(error) or f"The request cannot be read: {why}. Correct it.")
            return cls.model_construct(prompt="", messages=[], max_tokens=0, refusal=refusal)


class PromptRequest(_Received, PromptDocument):
    """A `PromptDocument` as the service receives it."""


class ChatRequest(_Received, ChatDocument):
    """A `ChatDocument` as the service receives it."""


class TokenStreamingExecutor(Executor):
    """A chat model that streams its answers.

    - `model` and `precision`: as in `helpers.models.load`, which runs while the executor starts.
    - `engine_args`: fields of `helpers.options.EngineArgs`.
    - `loaded`: the model, if it is loaded already. The other three are then not read.

    If the model or a limit is refused, the constructor prints the reason on stderr as `helpers.errors.to_wire` writes
    it, because Jina swallows the exception.
    """

    def __init__(
        self,
        model: str = "auto",
        precision: str = "auto",
        engine_args: Optional[Dict[str, Any]] = None,
        loaded: Optional[LoadedModel] = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        exit_with_parent_process()
        sys.setswitchinterval(SWITCH_INTERVAL)
        self._tokenizing = 0
        try:
            loaded = loaded or load_model(model, precision, EngineArgs(**(engine_args or {})))
        except HelpersError as error:
            print(to_wire(error), file=sys.stderr, flush=True)
            logging.disable()  # Jina's own log says less about it
            raise
        self.chat_model, self.engine, self._longest_token = loaded.chat_model, loaded.engine, loaded.longest_token

    @requests(on="/stream")
    async def task(self, doc: PromptRequest, **kwargs: Any) -> ModelOutputDocument:
        """Continue the raw text of a prompt."""
        async for output in self._answer(doc, self._prompt_ids):
            yield output

    @requests(on="/chat")
    async def chat(self, doc: ChatRequest, **kwargs: Any) -> ModelOutputDocument:
        """Answer a dialog. If it exceeds the context window, its oldest turns are dropped."""
        async for output in self._answer(doc, self._dialog_ids):
            yield output

    @requests(on="/count")
    async def count(self, doc: ChatRequest, **kwargs: Any) -> CountDocument:
        """Count the tokens of a dialog."""
        counted = CountDocument(prompt_tokens=0, context_length=self.engine.context_length)
        try:
            _check_readable(doc)
            counted.prompt_tokens = await self._tokenize(doc, self._count)
        except Exception as error:
            counted.error = to_wire(error)
        yield counted

    @requests(on="/info")
    async def info(self, doc: BaseDoc, **kwargs: Any) -> ModelDocument:
        """Describe the model and its load."""
        yield ModelDocument(
            model=self.chat_model.name,
            precision=self.chat_model.precision,
            device=self.chat_model.device,
            context_length=self.engine.context_length,
            steps=self.engine.steps,
            running=self.engine.running,
            waiting=self.engine.waiting,
        )

    @requests
    async def unknown(self, doc: BaseDoc, **kwargs: Any) -> ModelOutputDocument:
        """Refuse any other endpoint."""
        yield _failed(InvalidRequest("This service has no such endpoint. Use /stream, /chat, /count or /info."))

    def has_room(self) -> bool:
        """Return whether the queue has room for another request, and the engine runs."""
        try:
            self.engine.check_queue(pending=self._tokenizing)
        except ServiceUnavailable:
            return False
        return True

    def close(self) -> None:
        """Cancel all answers and stop the engine. Jina calls this when the service stops."""
        if hasattr(self, "engine"):
            self.engine.close()
        super().close()

    async def _answer(
        self, doc: SamplingDocument, ids_of: Callable[[Any], Tuple[List[int], int]]
    ) -> AsyncIterator[ModelOutputDocument]:
        """Yield the whole stream for one request: a document per token, and the last one.

        `ids_of` returns the prompt's token ids and the number of dropped turns. If the client disconnects, Jina closes
        this generator, and that cancels the generation.
        """
        stream = None
        try:
            _check_readable(doc)
            params = doc.sampling_params()
            prompt_ids, dropped_turns = await self._tokenize(doc, ids_of)
            stream = self.engine.submit(prompt_ids, params)
            is_dialog = isinstance(doc, ChatDocument)
            text = Detokenizer(
                self.chat_model.tokenizer,
                stop=params.stop,
                continues=[] if is_dialog else prompt_ids,
                lstrip=is_dialog,
            )
            sent = 0
            async for token_id in stream:
                sent += 1
                # the first one has the usage for a client that cancels before the last document
                more = _usage(stream, len(prompt_ids), dropped_turns) if sent == 1 else {}
                if params.logprobs is not None:
                    ranked = [Logprob(one, text.utf8_of(one), logprob) for one, logprob in stream.logprobs[sent - 1]]
                    more |= to_fields(ranked, text.length)
                yield ModelOutputDocument(token_id=token_id, generated_text=text.push(token_id), **more)
                if text.stopped:
                    break
            if stream.finish_reason == "cancelled":
                raise ServiceUnavailable(
                    "The service was stopped before the answer was complete. Start it, and ask again."
                )
            yield ModelOutputDocument(
                token_id=-1,
                generated_text=text.finish(),
                finish_reason="stop" if text.stopped else stream.finish_reason,
                completion_tokens=sent,
                **_usage(stream, len(prompt_ids), dropped_turns),
            )
        except Exception as error:
            if not isinstance(error, HelpersError):
                log.exception("a request failed")
            yield _failed(error)
        finally:
            if stream is not None:
                stream.cancel()

    async def _tokenize(self, doc: SamplingDocument, work: Callable[[Any], Result]) -> Result:
        """Return the result of `work` for a request. It runs in a thread, because the event loop serves all clients.

        Raise `QueueFull` or `ServiceUnavailable` before any work, as `Engine.check_queue` does.
        """
        self.engine.check_queue(pending=self._tokenizing)
        self._tokenizing += 1
        try:
            return await asyncio.to_thread(work, doc)
        finally:
            self._tokenizing -= 1

    def _prompt_ids(self, doc: PromptRequest) -> Tuple[List[int], int]:
        self._check_length(doc.prompt)
        return prompts.token_ids(doc.prompt, self.chat_model.tokenizer), 0

    def _dialog_ids(self, doc: ChatRequest) -> Tuple[List[int], int]:
        fitted = prompts.fit_to_window(
            self._messages(doc),
            self.chat_model.tokenizer,
            window=self.engine.context_length,
            max_tokens=doc.max_tokens,
        )
        return fitted.token_ids, fitted.dropped_turns

    def _count(self, doc: ChatRequest) -> int:
        return prompts.count_tokens(self._messages(doc), self.chat_model.tokenizer, window=self.engine.context_length)

    def _messages(self, doc: ChatRequest) -> List[prompts.Message]:
        """Return the dialog. Raise `InvalidRequest` if its first or last message is certainly too long."""
        for message in doc.messages[:1] + doc.messages[-1:]:
            self._check_length(message.get("content", ""))
        return cast(List[prompts.Message], doc.messages)

    def _check_length(self, text: str) -> None:
        """Raise `InvalidRequest` without tokenizing if a text cannot fit even if all its tokens are the longest."""
        if len(text) > self._longest_token * self.engine.context_length:
            raise InvalidRequest(
                f"The request has {len(text):,} characters, far more than the {self.engine.context_length:,} tokens of "
                "the context window can hold. Shorten it."
            )


def _check_readable(doc: SamplingDocument) -> None:
    """Raise `InvalidRequest` if `doc` is a `_Received` with a refusal."""
    if refusal := getattr(doc, "refusal", None):
        raise InvalidRequest(refusal)


def _usage(stream: TokenStream, prompt_tokens: int, dropped_turns: int) -> Dict[str, Any]:
    """Return what the first and the last document of a stream tell about its prompt."""
    return {
        "prompt_tokens": prompt_tokens,
        "dropped_turns": dropped_turns,
        "cached_tokens": stream.cached_tokens,
        "queue_seconds": stream.queue_seconds,
    }


def _failed(error: Exception) -> ModelOutputDocument:
    """Return the last document of a stream that failed."""
    return ModelOutputDocument(token_id=-1, generated_text="", finish_reason="error", error=to_wire(error))
