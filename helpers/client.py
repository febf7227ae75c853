"""Reading a service: `stream`, `ask` and `Conversation`, with or without a running event loop.

Knows the wire and nothing behind it: no torch, no model, no tokenizer. What goes wrong on the other
side, or in between, is raised here as an exception of `helpers.errors`. An answer that ends without the
service's own last document is a `ServiceUnavailable`, never a short answer.
"""

from __future__ import annotations

import functools
import time
from contextlib import aclosing, closing, contextmanager
from typing import Any, AsyncGenerator, AsyncIterator, Generator, Generic, Iterator, Sequence, Type, TypeVar

from docarray import BaseDoc
from pydantic import ValidationError

from ._jina import (
    Client,
    Empty,
    JinaGatewayDryRunRPCStub,
    JinaSingleDocumentRequestRPCStub,
    RpcError,
    SingleDocumentRequest,
    StatusProto,
    get_grpc_channel,
    init_grpc_aio,
)
from .errors import InvalidRequest, ServiceUnavailable, from_wire
from .prompts import Message
from .schemas import (
    ChatDocument,
    ModelDocument,
    ModelOutputDocument,
    PromptDocument,
    Sampling,
    what_is_wrong,
)

HOST = "127.0.0.1"
PORT = 12345
"""The article's port."""
MAX_TOKENS = 256
"""How long an answer may get where nothing else is said, in tokens."""

Doc = TypeVar("Doc", bound=BaseDoc)


class Answer:
    """An answer on its way: iterate it once, with ``for`` or ``async for``, for its pieces of text.

    Iterating raises an exception of `helpers.errors` where the answer fails; `text` then holds what came
    before. Leaving the loop stops the generation in the service. ``print(answer)`` prints the text.
    """

    def __init__(self, endpoint: str, request: Sampling, *, host: str, port: int) -> None:
        self._service = _Wire(endpoint, request, ModelOutputDocument, host, port)
        self._started = 0.0
        self.text = ""
        """What has come so far."""
        self.finish_reason: str | None = None
        """``stop``, ``length``, ``cancelled`` (you left), ``error``; None while it is coming."""
        self.prompt_tokens: int | None = None
        self.completion_tokens = 0
        self.dropped_turns = 0
        """The oldest turns of the dialog that the model did not see, because its window is full."""
        self.time_to_first_token: float | None = None
        """Seconds from asking to the first token."""
        self.seconds = 0.0
        """From asking to the latest token."""

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"<Answer, {self.finish_reason or 'not complete'}: {self.text!r}>"

    @property
    def tokens_per_second(self) -> float | None:
        """Of the tokens after the first; None where there were fewer than two."""
        if self.time_to_first_token is None or self.completion_tokens < 2:
            return None
        return (self.completion_tokens - 1) / (self.seconds - self.time_to_first_token)

    def __iter__(self) -> Iterator[str]:
        with self._reading(), closing(self._service.documents()) as documents:
            for document in documents:
                if piece := self._take(document):
                    yield piece

    async def __aiter__(self) -> AsyncIterator[str]:
        with self._reading():
            async with aclosing(self._service.documents_async()) as documents:
                async for document in documents:
                    if piece := self._take(document):
                        yield piece

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """From asking to the service's last word; `finish_reason` tells afterwards how it went."""
        if self._started:
            raise RuntimeError("This answer has been read already: ask again for another one.")
        self._started = time.perf_counter()
        try:
            yield
            if self.finish_reason is None:
                raise ServiceUnavailable(
                    f"The answer broke off after {self.completion_tokens} tokens without the service's "
                    "last word, so it is not whole. Ask again; if that fails too, start the service again."
                )
        except Exception:
            self.finish_reason = "error"
            raise
        finally:
            self.finish_reason = self.finish_reason or "cancelled"

    def _take(self, document: ModelOutputDocument) -> str:
        """Note what the document tells; its piece of text."""
        if document.error:
            raise from_wire(document.error)
        if document.finish_reason:
            self.finish_reason = document.finish_reason
            self.prompt_tokens = document.prompt_tokens
            self.dropped_turns = document.dropped_turns or 0
        else:
            self.completion_tokens += 1
            self.seconds = time.perf_counter() - self._started
            self.time_to_first_token = self.time_to_first_token or self.seconds
        self.text += document.generated_text
        return document.generated_text


def stream(
    messages: str | Sequence[Message] | None = None,
    *,
    prompt: str | None = None,
    system: str | None = None,
    max_tokens: int = MAX_TOKENS,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    stop: Sequence[str] = (),
    host: str = HOST,
    port: int = PORT,
) -> Answer:
    """Ask the service at `host` and `port`; returns at once, and reading the `Answer` asks.

    - `messages`: a question, or a dialog ``[{"role": "user", "content": ...}, ...]``, for ``/chat``;
      `system` is put in front of it as the system prompt.
    - `prompt`: instead, the raw text of a prompt, for ``/stream``.
    - the rest as in `helpers.schemas.Sampling`.

    Raises `InvalidRequest` for values of a wrong type. What the service refuses, and that no service
    answers (`ServiceUnavailable`), is raised where the answer is read.
    """
    if (messages is None) == (prompt is None):
        raise InvalidRequest("Give either messages (or a question), or prompt=, the raw text of one.")
    options = dict(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed, stop=stop
    )
    if prompt is not None:
        if system is not None:
            raise InvalidRequest("A raw prompt holds its own system prompt: leave system= out.")
        return Answer("/stream", _checked(PromptDocument, prompt=prompt, **options), host=host, port=port)
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if system is not None and isinstance(messages, Sequence):
        messages = [{"role": "system", "content": system}, *messages]
    return Answer("/chat", _checked(ChatDocument, messages=messages, **options), host=host, port=port)


def ask(messages: str | Sequence[Message] | None = None, **options: Any) -> Answer:
    """The whole `Answer`, once it is complete; arguments and errors as for `stream`."""
    answer = stream(messages, **options)
    for _ in answer:
        pass
    return answer


async def aask(messages: str | Sequence[Message] | None = None, **options: Any) -> Answer:
    """`ask` for a program with an event loop: ``await aask(...)``."""
    answer = stream(messages, **options)
    async for _ in answer:
        pass
    return answer


def info(*, host: str = HOST, port: int = PORT) -> ModelDocument:
    """Which model is behind the service, and how busy it is; `ServiceUnavailable` where none answers."""
    for document in _Wire("/info", BaseDoc(), ModelDocument, host, port).documents():
        return document
    raise ServiceUnavailable(f"What answers at {host}:{port} does not tell which model it is.")


def is_ready(*, host: str = HOST, port: int = PORT) -> bool:
    """Whether a service behind Jina's gateway answers there: gateway, executor and all."""
    try:
        with get_grpc_channel(f"{host}:{port}") as channel:
            return JinaGatewayDryRunRPCStub(channel).dry_run(Empty(), timeout=2).code == StatusProto.SUCCESS
    except RpcError:
        return False


class Conversation:
    """The memory that the model lacks: each question is sent with all that was said before it.

    `messages` is the dialog so far. An answer that failed or was left is not kept, nor its question.
    `options` are those of `stream`.
    """

    def __init__(self, system: str | None = None, **options: Any) -> None:
        self.messages: list[Message] = []
        if system is not None:
            self.messages.append({"role": "system", "content": system})
        self._options = options
        self.answer: Answer | None = None
        """The latest one, with its usage and times."""

    def stream(self, question: str) -> Iterator[str]:
        """The pieces of the next answer; once complete, it and its question are part of `messages`."""
        asked: list[Message] = [*self.messages, {"role": "user", "content": question}]
        self.answer = stream(asked, **self._options)
        yield from self.answer
        self.messages = [*asked, {"role": "assistant", "content": self.answer.text}]

    def ask(self, question: str) -> str:
        """The next answer, complete."""
        return "".join(self.stream(question))

    def undo(self) -> bool:
        """Forget the last question and its answer; whether there was one."""
        has_turn = bool(self.messages) and self.messages[-1]["role"] == "assistant"
        if has_turn:
            del self.messages[-2:]
        return has_turn


class _Wire(Generic[Doc]):
    """One request to an endpoint, and the documents that come back.

    Whatever the transport raises becomes a `ServiceUnavailable`. With an event loop Jina's own client
    reads; without one, plain gRPC on Jina's stub, because a second event loop in one process, such as a
    notebook's, makes gRPC's asyncio print `BlockingIOError` at random (grpc/grpc#25364).
    """

    def __init__(
        self, endpoint: str, request: BaseDoc, returns: Type[Doc], host: str, port: int
    ) -> None:
        if not 1 <= port <= 65535:
            raise InvalidRequest(f"{port} is no port of a service: give the one that it said it is ready on.")
        self.endpoint, self.request, self.returns = endpoint, request, returns
        self.host, self.port = host, port

    def documents(self) -> Generator[Doc, None, None]:
        message = SingleDocumentRequest()
        message.header.exec_endpoint = self.endpoint
        message.document_cls = type(self.request)
        message.data.doc = self.request
        address = f"{self.host}:{self.port}"
        # this thread reads by itself: to be handed each document by another one takes longer than the rest
        alone = {"SingleThreadedUnaryStream": 1}
        with self._telling_failures(), get_grpc_channel(address, options=alone) as channel:
            for response in JinaSingleDocumentRequestRPCStub(channel).stream_doc(message):
                yield self.returns.from_protobuf(response.document)

    async def documents_async(self) -> AsyncGenerator[Doc, None]:
        _keep_grpc_running()
        client = Client(host=self.host, port=self.port, protocol="grpc", asyncio=True, proxy=True)
        stream = client.stream_doc(
            on=self.endpoint, inputs=self.request, return_type=self.returns
        )
        with self._telling_failures():
            async with aclosing(stream) as documents:
                async for document in documents:
                    yield document

    @contextmanager
    def _telling_failures(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            why = error.details() if hasattr(error, "details") else str(error)
            raise ServiceUnavailable(
                f"The service at {self.host}:{self.port} does not answer, or went away "
                f"({' '.join(str(why).split())[:300]}). Look whether it runs, or start one with "
                f"`python -m helpers serve --port {self.port}`, and ask again."
            ) from error


def _checked(schema: Type[Sampling], **fields: Any) -> Any:
    """A request document, or `InvalidRequest` with what is wrong about its fields."""
    try:
        request = schema(**fields)
        request.to_protobuf()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"The text is no valid Unicode: {error.object[error.start]!a} at character {error.start + 1} "
            "is half of a surrogate pair. Take it out, or read the text again with the right encoding."
        ) from None
    except ValidationError as error:
        raise InvalidRequest(f"The request has a value that does not fit: {what_is_wrong(error)}.") from None
    except ValueError as error:  # such as a whole number beyond 32 bit
        raise InvalidRequest(f"The request has a value that does not fit: {error}.") from None
    return request


@functools.lru_cache(maxsize=None)
def _keep_grpc_running() -> None:
    """Hold gRPC's asyncio side up from the first use to the end of the program.

    It shuts down with its last channel, in the event loop's thread, and waits for a thread that may itself
    be waiting for that loop: many streams cancelled at once then hang the program (seen with grpcio 1.68).
    """
    init_grpc_aio()
