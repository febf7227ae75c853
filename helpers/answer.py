"""A streamed answer: its text so far, its usage and times, and how it ended.

This module knows the meaning of a stream's documents, and nothing about the transport. An answer without the service's
last document is a `ServiceUnavailable`, never a short answer.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from contextlib import aclosing, closing, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from .errors import ServiceUnavailable, from_wire, to_wire
from .logprobs import TokenLogprobs, from_fields

if TYPE_CHECKING:
    from .fields import OutputFields

FINISH_REASONS = {
    "stop": "complete",
    "length": "cut off at max_tokens",
    "cancelled": "stopped",
    "error": "failed",
}
"""`finish_reason` → the words that a user reads."""


class AnswerCall(Protocol):
    """A request, and the documents of its answer. `helpers.transport.Call` is one."""

    def cancel(self) -> None:
        """End the request."""

    def documents(self) -> Generator[OutputFields, None, None]:
        """Send the request and yield the documents as they arrive."""

    def documents_async(self) -> AsyncGenerator[OutputFields, None]:
        """Do the same in an event loop."""


class Answer:
    """A streamed answer. Iterate it once, with ``for`` or ``async for``, for its pieces of text.

    The request is sent when the iteration begins. If you leave the loop or call `stop`, the generation stops.
    In an ``async for``, prefer `stop`: Python may close the iterator much later. If the answer fails, the iteration
    raises an exception of `helpers.errors`, and ``text`` keeps the text so far.

    - ``text``: the text so far, which ``print(answer)`` prints.
    - ``finish_reason``: ``stop`` (the model or a stop string ended it), ``length`` (`max_tokens` reached),
      ``cancelled`` (by the client) or ``error``. None until the answer ends.
    - ``error``: ``"ClassName: what happened and what to do"``, if the answer failed.
    - ``prompt_tokens``, ``completion_tokens``: the usage. ``prompt_tokens`` is None before the first token.
    - ``cached_tokens``: how many tokens of the prompt came from the service's prefix cache.
    - ``queue_seconds``: how long the request waited in the service's queue. Both are None before the first token.
    - ``dropped_turns``: how many of the oldest turns of the dialog were dropped to fit the context window.
    - ``time_to_first_token``, ``seconds``: the seconds from the request to the first and to the latest token.
    - ``logprobs``: the log-probabilities of the tokens of ``text``, if the request asks for them. A token that a stop
      string has cut off has none.

    `on_start` is called when the iteration begins, and may raise to prevent it. `on_end` is called when
    ``finish_reason`` is final. Both get the answer. An answer that has ended can be copied and pickled, without them.
    """

    def __init__(
        self,
        call: AnswerCall | None,
        *,
        on_start: Callable[[Answer], None] = lambda _: None,
        on_end: Callable[[Answer], None] = lambda _: None,
    ) -> None:
        self._call = call
        self._on_start, self._on_end = on_start, on_end
        self._lock = threading.Lock()  # held to add text and to stop, so that a stopped answer never grows
        self._started = 0.0
        self.text = ""
        self.finish_reason: str | None = None
        self.error: str | None = None
        self.prompt_tokens: int | None = None
        self.completion_tokens = 0
        self.cached_tokens: int | None = None
        self.queue_seconds: float | None = None
        self.dropped_turns = 0
        self.logprobs: list[TokenLogprobs] = []
        self._held_logprobs: deque[TokenLogprobs] = deque()  # of tokens whose text has not arrived
        self.time_to_first_token: float | None = None
        self.seconds = 0.0

    @classmethod
    def ended(cls, text: str, finish_reason: str = "stop", error: str | None = None) -> Answer:
        """Return an answer that has ended already, such as one from a file. It cannot be iterated."""
        answer = cls(None)
        answer.text, answer.finish_reason, answer.error = text, finish_reason, error
        return answer

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"<Answer, {self.finish_reason or 'not complete'}: {self.text!r}>"

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            if self.finish_reason is None:
                raise TypeError("An answer that has not ended cannot be copied. Read it to the end, or stop it first.")
            return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Answer.__init__(self, None)
        vars(self).update(state)

    @property
    def tokens_per_second(self) -> float | None:
        """Return the speed after the first token, or None if there are fewer than two tokens."""
        if self.time_to_first_token is None or self.completion_tokens < 2:
            return None
        return (self.completion_tokens - 1) / (self.seconds - self.time_to_first_token)

    @property
    def summary(self) -> str:
        """Return a sentence about the length, the speed and the end of the answer, or "" if there is nothing to say."""
        parts = []
        if self.completion_tokens:
            parts.append(f"{self.completion_tokens} tokens, first after {self.time_to_first_token:.2f} s")
        if self.tokens_per_second:
            parts.append(f"{self.tokens_per_second:.1f} tokens/s")
        if self.finish_reason not in (None, "stop"):
            parts.append(FINISH_REASONS.get(self.finish_reason, self.finish_reason))
        if self.dropped_turns:
            turns = "turn" if self.dropped_turns == 1 else f"{self.dropped_turns} turns"
            parts.append(f"without the oldest {turns}, which did not fit the context window")
        return ", ".join(parts)

    def stop(self) -> None:
        """Stop the generation, from any thread. The text so far stays, and the loop ends without an exception.

        A ``for`` ends at once, an ``async for`` with its next token. An answer that has ended stays as it is.
        """
        with self._lock:
            if self.finish_reason is not None:
                return
            self.finish_reason = "cancelled"
        if (call := self._call) is not None:
            call.cancel()

    def __iter__(self) -> Generator[str, None, None]:
        with self._reading() as call, closing(call.documents()) as documents:
            for document in documents:
                if piece := self._add(document):
                    yield piece
                if self.finish_reason == "cancelled":
                    break

    async def __aiter__(self) -> AsyncGenerator[str, None]:
        with self._reading() as call:
            async with aclosing(call.documents_async()) as documents:
                async for document in documents:
                    if piece := self._add(document):
                        yield piece
                    if self.finish_reason == "cancelled":
                        break

    @contextmanager
    def _reading(self) -> Iterator[AnswerCall]:
        """Yield the request, and set the final `finish_reason` after the block."""
        if self._started or self._call is None:
            raise RuntimeError("This answer has been read already. Ask again for another one.")
        self._on_start(self)
        self._started = time.perf_counter()
        try:
            yield self._call
            if self.finish_reason is None:
                raise ServiceUnavailable(
                    f"The answer broke off after {self.completion_tokens} tokens, without the service's last document. "
                    "Ask again, and restart the service if the answer breaks off again."
                )
        except Exception as error:
            if self.finish_reason is None:  # a call that was cancelled raises too
                self.finish_reason, self.error = "error", to_wire(error)
                raise
        finally:
            self.finish_reason = self.finish_reason or "cancelled"
            self._call = None  # frees the request, which is the whole dialog
            self._on_end(self)

    def _add(self, document: OutputFields) -> str:
        """Update the answer from `document`, and return its text, or "" if the answer has been stopped."""
        if document.error:
            raise from_wire(document.error)
        with self._lock:
            if self.finish_reason:
                return ""
            if document.prompt_tokens is not None:
                self.prompt_tokens = document.prompt_tokens
                self.cached_tokens, self.queue_seconds = document.cached_tokens, document.queue_seconds
                self.dropped_turns = document.dropped_turns or 0
            if document.finish_reason:
                self.finish_reason = document.finish_reason
                if document.completion_tokens is not None:  # a server with OpenAI's API may send several in a piece
                    self.completion_tokens = document.completion_tokens
            else:
                self.seconds = time.perf_counter() - self._started
                self.time_to_first_token = self.time_to_first_token or self.seconds
                self.completion_tokens += 1
            self.text += document.generated_text
            if token := from_fields(document):
                self._held_logprobs.append(token)
            while self._held_logprobs and self._held_logprobs[0].text_offset < len(self.text):
                self.logprobs.append(self._held_logprobs.popleft())
        return document.generated_text
