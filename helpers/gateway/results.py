"""What chat and text completions share: complete answers, their usage, and the documentation of their routes."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from ..answer import Answer
from . import sse
from .backend import Piece
from .errors import ErrorReply
from .fields import ChoicesRequest

FinishReason = Literal["stop", "length"]
FAILURES: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorReply, "description": "The request has a wrong value."},
    401: {"model": ErrorReply, "description": "The API key is missing or wrong."},
    404: {"model": ErrorReply, "description": "The model does not exist here."},
    408: {"model": ErrorReply, "description": "The body arrived too slowly."},
    413: {"model": ErrorReply, "description": "The body is too large."},
    415: {"model": ErrorReply, "description": "The body is not JSON."},
    429: {"model": ErrorReply, "description": "The queue is full. Retry-After says when to ask again."},
    500: {"model": ErrorReply, "description": "The model or the gateway failed."},
    503: {"model": ErrorReply, "description": "The service behind the gateway does not answer."},
}
"""The statuses of all routes that generate text, for the OpenAPI description."""


def also_streams(example: str) -> dict[int | str, dict[str, Any]]:
    """Return the responses of a route that also sends server-sent events, for the OpenAPI description."""
    event = {"type": "object", "properties": {"event": {"type": "string"}, "data": {"type": "string"}}}
    content = {"text/event-stream": {"itemSchema": event, "example": example}}
    return {200: {"content": content, "description": "The answer; with `stream`, server-sent events."}, **FAILURES}


class PromptTokensDetails(BaseModel):
    """What happened to the tokens of a prompt."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    cached_tokens: int
    """How many were not read again, because the service's prefix cache held them."""


class Usage(BaseModel):
    """How many tokens a request took."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    dropped_turns: int = 0
    """How many of the oldest turns were dropped to fit the context window. OpenAI has no such field."""


def usage_of(answers: Sequence[Answer], *, n: int) -> Usage:
    """Return the usage of answers, in the order of their choices. Each `n` of them have one prompt, counted once."""
    prompt = sum(answer.prompt_tokens or 0 for answer in answers[::n])
    # of the answers to one prompt, the first reads it, and only the others find it in the cache
    cached = sum(
        min(answer.cached_tokens or 0 for answer in answers[first : first + n]) for first in range(0, len(answers), n)
    )
    completion = sum(answer.completion_tokens for answer in answers)
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=cached),
        dropped_turns=max(answer.dropped_turns for answer in answers),
    )


async def complete(pieces: AsyncGenerator[Piece, None]) -> list[Answer]:
    """Return the complete answers, in the order of their choices."""
    answers: dict[int, Answer] = {}
    async with aclosing(pieces):
        async for piece in pieces:
            if piece.answer is not None:
                answers[piece.choice] = piece.answer
    return [answers[choice] for choice in sorted(answers)]


async def stream_of(
    pieces: AsyncGenerator[Piece, None],
    body: ChoicesRequest,
    head: dict[str, Any],
    choices_of: Callable[[Piece], Iterable[dict[str, Any]]],
) -> AsyncGenerator[bytes, None]:
    """Yield the events of a stream: `head` with each of the choices that `choices_of` makes of a piece."""
    if body.wants_usage:
        head["usage"] = None
    answers: dict[int, Answer] = {}
    async with aclosing(pieces):
        async for piece in pieces:
            if piece.answer is not None:
                answers[piece.choice] = piece.answer
            for choice in choices_of(piece):
                yield sse.event({**head, "choices": [choice]})
    if body.wants_usage:
        usage = usage_of([answers[choice] for choice in sorted(answers)], n=body.choices)
        yield sse.event({**head, "choices": [], "usage": usage.model_dump()})
    yield sse.DONE


def new_head(prefix: str, kind: str, model: str) -> dict[str, Any]:
    """Return the fields with which an answer and each of its chunks begin."""
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}
