"""Ask a service: `stream`, `ask`, `aask` and `info`.

This module knows how to write a request, and nothing about the model that answers it: no torch, no tokenizer. Failures
are raised as exceptions of `helpers.errors`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from .answer import Answer
from .errors import InvalidRequest
from .fields import ChatFields, ModelFields, NoFields, OutputFields, PromptFields, own_refusal, validation_message
from .messages import Message
from .options import HOST, PORT, SamplingParams
from .transport import Call
from .wire import write_request


def stream(
    messages: str | Sequence[Message] | None = None,
    *,
    prompt: str | None = None,
    system: str | None = None,
    max_tokens: int | None = SamplingParams.max_tokens,
    temperature: float | None = SamplingParams.temperature,
    top_p: float | None = SamplingParams.top_p,
    seed: int | None = None,
    stop: str | Sequence[str] | None = (),
    logprobs: int | None = None,
    host: str = HOST,
    port: int = PORT,
) -> Answer:
    """Return the `Answer` of the service at `host` and `port`. The request is sent when the answer is read.

    - `messages`: a question, or a dialog ``[{"role": "user", "content": ...}, ...]``, for ``/chat``.
      `system` is put in front of it as the system prompt; an empty one is left out.
    - `prompt`: instead, the raw text of a prompt, for ``/stream``.
    - the others: `helpers.options.SamplingParams`.

    Raise `InvalidRequest` at once for a value of the wrong type or out of range. If only the service can check a value,
    such as the length of the prompt, the iteration raises it. It raises `ServiceUnavailable` if no service answers.
    """
    request = build_request(
        messages,
        prompt=prompt,
        system=system,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stop=stop,
        logprobs=logprobs,
    )
    return Answer(Call(endpoint_of(request), request, OutputFields, host, port))


def ask(messages: str | Sequence[Message] | None = None, **options: Any) -> Answer:
    """Return the complete `Answer`. The arguments and the errors are those of `stream` and its answer."""
    answer = stream(messages, **options)
    for _ in answer:
        pass
    return answer


async def aask(messages: str | Sequence[Message] | None = None, **options: Any) -> Answer:
    """Return the complete `Answer`, as `ask` does, in a program with an event loop: ``await aask(...)``."""
    answer = stream(messages, **options)
    async for _ in answer:
        pass
    return answer


def info(*, host: str = HOST, port: int = PORT) -> ModelFields:
    """Return which model the service runs, and its load. Raise `ServiceUnavailable` if no service answers."""
    return Call("/info", NoFields(), ModelFields, host, port).document()


def endpoint_of(request: ChatFields | PromptFields) -> str:
    """Return the endpoint that answers `request`."""
    return "/chat" if isinstance(request, ChatFields) else "/stream"


def build_request(
    messages: str | Sequence[Message] | None = None,
    *,
    prompt: str | None = None,
    system: str | None = None,
    max_tokens: int | None = SamplingParams.max_tokens,
    temperature: float | None = SamplingParams.temperature,
    top_p: float | None = SamplingParams.top_p,
    seed: int | None = None,
    stop: str | Sequence[str] | None = (),
    logprobs: int | None = None,
) -> ChatFields | PromptFields:
    """Return the fields of the document that `stream` sends. The arguments are those of `stream`.

    Raise `InvalidRequest` for a wrong type, a value out of range, text that is not valid Unicode, and a message that
    is not text. The service checks the dialog as a whole, with `helpers.messages.check_dialog`.
    """
    if (messages is None) == (prompt is None):
        raise InvalidRequest("A request needs either messages or prompt=. Give one of them.")
    if isinstance(system, str) and not system.strip():
        system = None
    if prompt is not None and system is not None:
        raise InvalidRequest("A raw prompt contains its own system prompt. Leave system= out.")
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if system is not None and isinstance(messages, Sequence):
        messages = [{"role": "system", "content": system}, *messages]
    fields: dict[str, Any] = {  # of any type: pydantic checks them
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
        "stop": stop,
        "logprobs": logprobs,
    }
    try:
        request: ChatFields | PromptFields
        if prompt is None:
            request = ChatFields(**{**fields, "messages": messages})
        else:
            request = PromptFields(**fields, prompt=prompt)
        request.sampling_params()
        write_request(endpoint_of(request), request)
    except ValidationError as error:
        if refusal := own_refusal(error):
            raise refusal from None
        raise InvalidRequest(f"The request has a wrong value ({validation_message(error)}). Correct it.") from None
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"The text is not valid Unicode: {error.object[error.start]!a} at character {error.start + 1} is half of "
            "a surrogate pair. Remove it, or decode the text with the right encoding."
        ) from None
    return request
