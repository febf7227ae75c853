"""The answer of a server with OpenAI's API as the documents of `helpers.fields.OutputFields`.

A chunk of a stream may hold several tokens, or none. OpenAI's package reads the stream, and `helpers.answer.Answer` the
documents.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import GenerationFailed, HelpersError, InvalidRequest
from ..fields import ChatFields, OutputFields, PromptFields
from ..logprobs import Logprob, to_fields

if TYPE_CHECKING:
    from .openai_services import Server


class OpenAICall:
    """One request to a server. It is sent when its reply is read, in an event loop."""

    def __init__(self, server: Server, request: ChatFields | PromptFields) -> None:
        self._server, self._request = server, request
        self._length = 0  # of the text that has arrived
        self._text = _BeforeStop(request.stop)

    def cancel(self) -> None:
        """Do nothing: the request ends when `documents_async` is closed."""

    def documents(self) -> Generator[OutputFields, None, None]:
        """Raise `NotImplementedError`: a gateway reads in an event loop."""
        raise NotImplementedError("Read documents_async.")

    async def documents_async(self) -> AsyncGenerator[OutputFields, None]:
        """Send the request, and yield documents as text arrives, and a last one with the usage.

        Raise what `Server.failure` returns, and `GenerationFailed` if the answer ends for another reason than its text
        or its length.
        """
        usage, finish_reason = None, None
        try:
            async with await self._server.send(self._request) as chunks:
                async for chunk in chunks:
                    usage = chunk.usage or usage
                    for choice in chunk.choices:
                        for document in self._documents(choice):
                            yield document
                        finish_reason = choice.finish_reason or finish_reason
        except HelpersError:
            raise
        except Exception as error:
            raise self._server.failure(error) from error
        if finish_reason not in (None, "stop", "length"):
            raise GenerationFailed(f"The service ended the answer with {finish_reason!r:.80}. Ask another question.")
        if finish_reason is not None:
            yield _last(self._text.held, "stop" if self._text.stopped else finish_reason, usage)

    def _documents(self, choice: Any) -> list[OutputFields]:
        """Return a document for the text of a chunk, or for each token if it has log-probabilities.

        The last document has the text, so that it arrives with the log-probabilities of all its tokens.
        """
        is_raw, wanted = isinstance(self._request, PromptFields), self._request.logprobs
        text = (choice.text if is_raw else choice.delta.content) or ""
        length, self._length = self._length, self._length + len(text)
        certain = self._text.push(text)
        tokens: list[tuple[list[Logprob], int]] = []
        if wanted is not None and choice.logprobs is not None:
            tokens = list(
                _completion_tokens(choice.logprobs) if is_raw else _chat_tokens(choice.logprobs, wanted, length)
            )
        if not tokens:
            if text and wanted is not None and not length:
                raise InvalidRequest("The service reports no log-probabilities. Leave logprobs out.")
            return [OutputFields(token_id=-1, generated_text=certain)] if certain else []
        last_place = length + max(len(text) - 1, 0)  # `Answer` waits for the text of a token behind it
        texts = [""] * (len(tokens) - 1) + [certain]
        return [
            OutputFields(token_id=-1, generated_text=one, **to_fields(ranked, min(place, last_place)))
            for one, (ranked, place) in zip(texts, tokens, strict=True)
        ]


class _BeforeStop:
    """The text before the first of the stop `strings`: not every server leaves that out, such as `transformers serve`.

    `held` may be the beginning of a stop string. `stopped` is whether one has come.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = [string for string in strings if string]
        self.held, self.stopped = "", False

    def push(self, text: str) -> str:
        """Return the text that becomes certain with `text`."""
        if self.stopped:
            return ""
        self.held += text
        found = [(begin + len(one), begin) for one in self._strings if (begin := self.held.find(one)) >= 0]
        if found:
            self.stopped, (_, end) = True, min(found)
        else:
            beginnings = (n for one in self._strings for n in range(len(one)) if self.held.endswith(one[:n]))
            end = len(self.held) - max(beginnings, default=0)
        certain, self.held = self.held[:end], "" if found else self.held[end:]
        return certain


def _chat_tokens(logprobs: Any, top: int, place: int) -> Iterator[tuple[list[Logprob], int]]:
    """Yield each token of a chunk with the `top` most likely ones. All are at `place`: OpenAI tells none for a chat."""
    for token in logprobs.content or []:
        ranked = [token, *token.top_logprobs[:top]]
        yield [_logprob(one.token, one.logprob, one.bytes) for one in ranked], place


def _completion_tokens(logprobs: Any) -> Iterator[tuple[list[Logprob], int]]:
    """Yield each token of a chunk with the most likely ones, and its place in the text."""
    for number, token in enumerate(logprobs.tokens or []):
        top = (logprobs.top_logprobs or {}) and logprobs.top_logprobs[number] or {}
        ranked = [(token, logprobs.token_logprobs[number]), *top.items()]
        yield [_logprob(*one) for one in ranked], logprobs.text_offset[number]


def _logprob(token: str, logprob: float, utf8: list[int] | None = None) -> Logprob:
    return Logprob(-1, token.encode(errors="replace") if utf8 is None else bytes(utf8), logprob)


def _last(text: str, finish_reason: str, usage: Any) -> OutputFields:
    """Return the last document of a complete answer: the rest of its text, and what the server's usage tells."""
    details = getattr(usage, "prompt_tokens_details", None)
    return OutputFields(
        token_id=-1,
        generated_text=text,
        finish_reason=finish_reason,
        prompt_tokens=getattr(usage, "prompt_tokens", None),
        completion_tokens=getattr(usage, "completion_tokens", None),
        cached_tokens=getattr(details, "cached_tokens", None),
        dropped_turns=getattr(usage, "dropped_turns", None),  # of a gateway of this package
    )
