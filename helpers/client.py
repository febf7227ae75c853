"""Reading a service: `stream`, `ask` and `Conversation`, with or without a running event loop.

Knows the wire and nothing behind it: no torch, no model, no tokenizer. What goes wrong on the other
side, or in between, is raised here as an exception of `helpers.errors`. An answer that ends without the
service's own last document is a `ServiceUnavailable`, never a short answer.
"""

from __future__ import annotations

import errno
import functools
import json
import shutil
import threading
import time
import uuid
from contextlib import aclosing, closing, contextmanager, nullcontext, suppress
from itertools import zip_longest
from pathlib import Path
from typing import (
    Any,
    AsyncGenerator,
    AsyncIterator,
    Callable,
    ContextManager,
    Generator,
    Generic,
    Iterator,
    NamedTuple,
    Sequence,
    Type,
    TypeVar,
)

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
from .errors import InvalidRequest, ServiceUnavailable, from_wire, to_wire
from .prompts import Message, check_history
from .schemas import (
    ChatDocument,
    CountDocument,
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

ENDS = {"cancelled": "stopped", "length": "cut off at the limit of tokens", "error": "failed"}
"""Words for the kinds of `finish_reason` that a reader is to be told; ``stop`` is what everybody expects."""

Doc = TypeVar("Doc", bound=BaseDoc)


class Answer:
    """An answer on its way: iterate it once, with ``for`` or ``async for``, for its pieces of text.

    Iterating raises an exception of `helpers.errors` where the answer fails; `text` then holds what came
    before. Leaving the loop stops the generation in the service, and so does `stop`; an ``async for`` that is left
    does it when Python gets to closing it, so `stop` is surer there. ``print(answer)`` prints the text.
    """

    def __init__(self, service: _Wire[ModelOutputDocument] | None = None) -> None:
        self._service = service
        self._lock = threading.Lock()  # nothing is added once it has been stopped
        self._being_read: Callable[[], ContextManager[None]] = nullcontext
        self._started = 0.0
        self.text = ""
        """What has come so far."""
        self.finish_reason: str | None = None
        """``stop``, ``length``, ``cancelled`` (you left), ``error``; None while it is coming."""
        self.error: str | None = None
        """What went wrong, as in the last document of a stream: ``"ClassName: what happened and what to do"``."""
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

    @property
    def summary(self) -> str:
        """In words how long it is, how long it took and how it ended; empty where there is nothing to tell."""
        said = []
        if self.completion_tokens:
            said.append(f"{self.completion_tokens} tokens, first after {self.time_to_first_token:.2f} s")
        if self.tokens_per_second:
            said.append(f"{self.tokens_per_second:.1f} tokens/s")
        if self.finish_reason in ENDS:
            said.append(ENDS[self.finish_reason])
        if self.dropped_turns:
            turns = "turn" if self.dropped_turns == 1 else f"{self.dropped_turns} turns"
            said.append(f"without the oldest {turns}, for which the window has no room")
        return ", ".join(said)

    def stop(self) -> None:
        """Stop the generation; what has come stays. The loop that reads the answer ends without an exception.

        May be called from any thread, at any time: an answer that has ended stays as it is. A ``for`` ends at
        once, an ``async for`` with its next token, once it is read on.
        """
        with self._lock:
            if self.finish_reason is not None:
                return
            self.finish_reason = "cancelled"
        if (service := self._service) is not None:
            service.leave()

    def __iter__(self) -> Iterator[str]:
        with self._reading() as service, closing(service.documents()) as documents:
            for document in documents:
                if piece := self._take(document):
                    yield piece
                if self.finish_reason == "cancelled":
                    break

    async def __aiter__(self) -> AsyncIterator[str]:
        with self._reading() as service:
            async with aclosing(service.documents_async()) as documents:
                async for document in documents:
                    if piece := self._take(document):
                        yield piece
                    if self.finish_reason == "cancelled":
                        break

    @contextmanager
    def _reading(self) -> Iterator[_Wire[ModelOutputDocument]]:
        """From asking to the service's last word; `finish_reason` tells afterwards how it went."""
        if self._started or self._service is None:
            raise RuntimeError("This answer has been read already: ask again for another one.")
        self._started = time.perf_counter()
        with self._being_read(), self._noting_the_end():
            yield self._service

    @contextmanager
    def _noting_the_end(self) -> Iterator[None]:
        try:
            yield
            if self.finish_reason is None:
                raise ServiceUnavailable(
                    f"The answer broke off after {self.completion_tokens} tokens without the service's "
                    "last word, so it is not whole. Ask again; if that fails too, start the service again."
                )
        except Exception as error:
            if self.finish_reason is None:  # a call that was stopped raises too
                self.finish_reason, self.error = "error", to_wire(error)
                raise
        finally:
            self.finish_reason = self.finish_reason or "cancelled"
            self._service = None  # it holds the request, which is the whole dialog

    def _take(self, document: ModelOutputDocument) -> str:
        """Note what the document tells; its piece of text, or nothing where the answer was stopped before it."""
        if document.error:
            raise from_wire(document.error)
        with self._lock:
            if self.finish_reason:
                return ""
            if document.prompt_tokens is not None:
                self.prompt_tokens = document.prompt_tokens
                self.dropped_turns = document.dropped_turns or 0
            if document.finish_reason:
                self.finish_reason = document.finish_reason
            else:
                self.seconds = time.perf_counter() - self._started
                self.time_to_first_token = self.time_to_first_token or self.seconds
                self.completion_tokens += 1
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
        request = _checked(PromptDocument, prompt=prompt, **options)
        return Answer(_Wire("/stream", request, ModelOutputDocument, host, port))
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if system is not None and isinstance(messages, Sequence):
        messages = [{"role": "system", "content": system}, *messages]
    request = _checked(ChatDocument, messages=messages, **options)
    return Answer(_Wire("/chat", request, ModelOutputDocument, host, port))


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
    return _Wire("/info", BaseDoc(), ModelDocument, host, port).document()


def is_ready(*, host: str = HOST, port: int = PORT) -> bool:
    """Whether a service behind Jina's gateway answers there: gateway, executor and all."""
    try:
        with get_grpc_channel(f"{host}:{port}") as channel:
            return JinaGatewayDryRunRPCStub(channel).dry_run(Empty(), timeout=2).code == StatusProto.SUCCESS
    except RpcError:
        return False


class Turn(NamedTuple):
    """A question and what came back; `answer.finish_reason` says what kind of answer that is."""

    question: str
    answer: Answer


class Window(NamedTuple):
    """How much of the model's window a conversation takes, in tokens.

    `tokens` are counted with the shortest of questions at the end, because a prompt always ends in one; they may
    be more than `size`, and the service then leaves out the oldest turns.
    """

    tokens: int
    size: int

    @property
    def left(self) -> int:
        """What the next question and its answer may take before the oldest turn is left out."""
        return max(0, self.size - self.tokens)


class Conversation:
    """The memory that the model lacks: each question is sent with all that was said before it.

    `system` is the system prompt and `options` are those of `stream`; both may be changed between two
    questions. Raises what `stream` does for options that do not fit.

    `turns` is what was said, oldest first. A question is there as soon as it is asked, and stays whatever
    becomes of its answer: one that was stopped or has failed is part of the conversation as far as it came, and
    says so in its `finish_reason`. The model is sent such a partial answer too, but no question without any answer.
    With `keep_partial=False` a stopped or failed answer is dropped, with its question, as if it had not been asked.

    Asking while an answer is still coming stops that one. Threads may share a conversation, as a chat box does.
    """

    def __init__(self, system: str | None = None, *, keep_partial: bool = True, **options: Any) -> None:
        stream("?", **options)
        self.system = system
        self.keep_partial = keep_partial
        self.options = options
        self.turns: list[Turn] = []
        self._earlier: list[list[Turn]] = []
        self._unsettled: Turn | None = None  # of which it is still open whether it stays
        self._lock = threading.RLock()

    def __repr__(self) -> str:
        return f"<Conversation, turns: {len(self.turns)}>"

    @property
    def messages(self) -> list[Message]:
        """The dialog as the service is sent it: without the questions that got no answer. It leaves out the oldest
        turns where the model's window has no room for them."""
        return self._messages([turn for turn in self.turns if turn.answer.text])

    @property
    def answer(self) -> Answer | None:
        """The latest one, with its usage and times."""
        turns = self.turns
        return turns[-1].answer if turns else None

    def stream(self, question: str) -> Answer:
        """The next answer; read it with ``for`` or ``async for``. It is asked for when it is read."""
        return self._next(question)

    def ask(self, question: str) -> str:
        """The text of the next answer, once it is complete."""
        return "".join(self.stream(question))

    async def aask(self, question: str) -> str:
        """`ask` for a program with an event loop."""
        return "".join([piece async for piece in self.stream(question)])

    def edit(self, turn: int, question: str) -> Answer:
        """Ask another question in place of that of ``turns[turn]``; the turns after it go.

        `undo` brings them back. Where the new answer fails or is stopped before its first word, they have
        never been away. Raises `InvalidRequest` where there is no such turn.
        """
        turns = self.turns
        if not -len(turns) <= turn < len(turns):
            raise InvalidRequest(f"There is no turn {turn}: the conversation has {len(turns)}, and the first is turn 0.")
        return self._next(question, turns[: turn % len(turns)])

    def regenerate(self) -> Answer:
        """Ask the latest question once more; the new answer takes the place of the old one, as in `edit`."""
        turns = self.turns
        if not turns:
            raise InvalidRequest("Nothing has been asked yet, so there is nothing to answer once more.")
        return self._next(turns[-1].question, turns[:-1])

    def undo(self) -> bool:
        """Take back the latest change: a question with its answer goes, what was replaced by an edited or
        regenerated turn returns. Whether there was anything to take back."""
        with self._lock:
            if self._unsettled:
                self._unsettled.answer.stop()
                self._unsettled = None
            if not self._earlier:
                return False
            self.turns = self._earlier.pop()
            return True

    def fork(self, turns: int | None = None) -> Conversation:
        """Another conversation that begins with the same turns, or with the first `turns` of them, and then goes
        its own way. An answer that is still coming stays here alone."""
        other = Conversation(self.system, keep_partial=self.keep_partial, **self.options)
        other._set_turns([turn for turn in self.turns[:turns] if turn.answer.finish_reason])
        return other

    def window(self) -> Window:
        """How much of the model's window the conversation takes, counted by the service, and how much is left.

        Raises `ServiceUnavailable` where no service answers, `ServiceBusy` where it has no place for another
        reader, `InvalidRequest` for a system prompt that it would refuse.
        """
        shortest: Message = {"role": "user", "content": "?"}
        request = _checked(ChatDocument, messages=[*self.messages, shortest], max_tokens=1)
        where = {"host": HOST, "port": PORT, **self.options}
        counted = _Wire("/count", request, CountDocument, where["host"], where["port"]).document()
        if counted.error:
            raise from_wire(counted.error)
        return Window(counted.prompt_tokens, counted.context_length)

    def save(self, path: str | Path) -> None:
        """Write all turns to a JSON file, as ``{"messages": [...], "answers": [...]}``.

        The messages are in OpenAI's format, as other tools read them; a question that got no answer is followed by an
        empty one. The answers say of each turn how it ended (`finish_reason`, and in words the `error`).
        A file that is there is replaced, once the new one is complete. Raises `OSError` where that fails, and
        `UnicodeEncodeError` for a system prompt that is no valid Unicode.
        """
        path = Path(path).resolve()
        turns = self.turns
        ends = [{"finish_reason": answer.finish_reason or "cancelled", "error": answer.error} for _, answer in turns]
        saved = {"messages": self._messages(turns), "answers": ends}
        new = path.with_name(f".{uuid.uuid4().hex}")
        try:
            new.touch()
            if path.exists():
                if not path.is_file():  # such as /dev/null
                    raise FileExistsError(errno.EEXIST, "it is there, and is no file", str(path))
                shutil.copymode(path, new)
            new.write_text(json.dumps(saved, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
            new.replace(path)
        except OSError as error:
            error.filename = str(path)  # the only one that was asked for
            raise
        finally:
            with suppress(OSError):
                new.unlink()

    @classmethod
    def load(cls, path: str | Path, **options: Any) -> Conversation:
        """The conversation in a JSON file that `save` or another tool has written: a list of messages, or a dict
        with one as ``"messages"``. `options` as for a new one.

        Raises `OSError` where the file cannot be read, `InvalidRequest` where it holds no conversation.
        """
        try:
            saved = json.loads(Path(path).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"{path} is no JSON file ({error}), so no conversation can be read from it.") from None
        saved = saved if isinstance(saved, dict) else {"messages": saved}
        try:
            messages = check_history(saved.get("messages"))
        except InvalidRequest as error:
            raise InvalidRequest(f"{path} holds no conversation. {error}") from None
        talk = cls(messages.pop(0)["content"] if messages and messages[0]["role"] == "system" else None, **options)
        texts = [message["content"] for message in messages]
        ends = saved.get("answers")
        turns = []
        for number, (question, text) in enumerate(zip_longest(texts[::2], texts[1::2])):
            answer = Answer()
            answer.text = text or ""
            answer.finish_reason = "cancelled" if text is None else "stop"
            end = ends[number] if isinstance(ends, list) and number < len(ends) else None
            if isinstance(end, dict) and end.get("finish_reason") in ("stop", *ENDS):
                answer.finish_reason = end["finish_reason"]
                answer.error = str(end["error"]).encode("utf-8", "replace").decode() if end.get("error") else None
            turns.append(Turn(question, answer))
        talk._set_turns(turns)
        return talk

    def _messages(self, turns: Sequence[Turn]) -> list[Message]:
        messages: list[Message] = [] if self.system is None else [{"role": "system", "content": self.system}]
        for question, answer in turns:
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer.text})
        return messages

    def _set_turns(self, turns: list[Turn]) -> None:
        """Begin with these, as if they had been asked one by one."""
        self.turns = turns
        self._earlier = [turns[:number] for number in range(len(turns))]

    def _next(self, question: str, before: list[Turn] | None = None) -> Answer:
        """The answer to a question that follows on `before`, a beginning of `turns`; by default on all of them."""
        stream(question, system=self.system, **self.options)  # what cannot be asked stops nothing
        with self._lock:
            if self._unsettled:
                self._unsettled.answer.stop()
                self._settle(self._unsettled)
            known = self.turns
        kept = known if before is None else before
        sent = self._messages([turn for turn in kept if turn.answer.text])
        answer = stream([*sent, {"role": "user", "content": question}], **self.options)
        turn = Turn(question, answer)

        @contextmanager
        def being_read() -> Iterator[None]:
            with self._lock:
                if self.turns is not known:
                    raise RuntimeError("The conversation has gone on since this question was put: ask it again.")
                self._earlier.append(known)
                self.turns = [*kept, turn]
                self._unsettled = turn
            try:
                yield
            finally:
                self._settle(turn)

        answer._being_read = being_read
        return answer

    def _settle(self, turn: Turn) -> None:
        """Now that its answer has ended: does the turn stay?"""
        with self._lock:
            if self._unsettled is not turn:
                return
            self._unsettled = None
            replaced = len(self._earlier[-1]) >= len(self.turns)
            has_ended_well = turn.answer.finish_reason not in ("cancelled", "error")
            if not has_ended_well and (not self.keep_partial or (replaced and not turn.answer.text)):
                self.turns = self._earlier.pop()


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
        self._channel: Any = None
        self._left = False

    def leave(self) -> None:
        """Cancel the request that `documents` has sent, and let neither send one from now on; from any thread."""
        self._left = True
        if self._channel is not None:
            self._channel.close()

    def document(self) -> Doc:
        """The only one that comes."""
        for document in self.documents():
            return document
        raise ServiceUnavailable(f"What answers at {self.host}:{self.port} does not know {self.endpoint}.")

    def documents(self) -> Generator[Doc, None, None]:
        message = SingleDocumentRequest()
        message.header.exec_endpoint = self.endpoint
        message.document_cls = type(self.request)
        message.data.doc = self.request
        # from the pool of the program, gRPC repeats for seconds that nobody is there, back or not
        options = {"grpc.use_local_subchannel_pool": 1}
        if threading.current_thread() is not threading.main_thread():
            # this thread reads by itself: to be handed each document by another one takes longer than the rest.
            # Not the main one: where Ctrl-C interrupts its wait, gRPC would keep the connection for good
            options["SingleThreadedUnaryStream"] = 1
        with self._telling_failures(), get_grpc_channel(f"{self.host}:{self.port}", options=options) as self._channel:
            if self._left:
                return
            call = JinaSingleDocumentRequestRPCStub(self._channel).stream_doc(message)
            try:
                for response in call:
                    yield self.returns.from_protobuf(response.document)
            finally:
                self._channel.close()
                with suppress(RpcError):  # gRPC keeps the connection until the end of the call has been read
                    for _ in call:
                        pass

    async def documents_async(self) -> AsyncGenerator[Doc, None]:
        if self._left:
            return
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
