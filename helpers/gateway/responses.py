"""``POST /v1/responses``: answer a dialog by OpenAI's newer API, text in and text out. Nothing is stored."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field, SkipValidation, field_validator

from ..answer import Answer
from ..client import build_request
from ..errors import InvalidRequest
from ..fields import ChatFields, PromptFields
from ..messages import Message, plain_messages
from ..options import MAX_LOGPROBS
from . import sse
from .backend import Piece
from .disconnects import unless_client_leaves
from .errors import UnsupportedField, to_api_error
from .fields import MAX_TOKENS, GenerationRequest, default_max_tokens, served_model
from .guard import GuardedRoute
from .logprobs import count_to_ask_for, token_logprobs
from .records import record_of
from .results import also_streams, complete
from .settings import settings_of

INCLUDE_LOGPROBS = "message.output_text.logprobs"
"""What a client lists in `include` to get log-probabilities."""

router = APIRouter(route_class=GuardedRoute)


class InputPart(BaseModel):
    """A part of a message's content. Only text is supported."""

    type: Literal["input_text", "output_text", "text"]
    text: str


class InputMessage(BaseModel):
    """A message of the dialog. Other fields, such as `id` and `status`, have no effect."""

    model_config = ConfigDict(extra="allow")

    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[InputPart]


class ResponseRequest(GenerationRequest):
    """A request to `/v1/responses`."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"model": "smollm2", "input": "What is a token?"}]})
    NO_EFFECT = {
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "parallel_tool_calls": (True, False),
        "text": ({}, {"format": {"type": "text"}}),
        "reasoning": ({},),
        "truncation": ("auto",),
        "background": (False,),
        "store": (False,),
        "stream_options": ({}, {"include_obfuscation": False}),
    }

    # checked by `plain_messages`, whose refusals name the message
    input: SkipValidation[str | list[InputMessage]]
    """A question, or the messages of a dialog."""
    instructions: str | None = None
    """The system prompt. It comes before a system message of the input."""
    max_output_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    """The maximum number of tokens in the answer."""
    metadata: dict[str, str] | None = None
    """Labels, which the reply repeats."""
    include: list[str] | None = None
    """`message.output_text.logprobs` adds the log-probabilities of the tokens. Nothing else is supported."""
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    """How many of the most likely tokens to report beside each. It needs `include`."""

    @field_validator("include", mode="before")
    @classmethod
    def _includes_only_logprobs(cls, include: Any) -> Any:
        if isinstance(include, list) and any(one != INCLUDE_LOGPROBS for one in include):
            raise UnsupportedField("include")
        return include

    def messages(self) -> list[Message]:
        """Return the dialog. Raise `InvalidRequest` if the input is not text."""
        if isinstance(self.input, str):
            messages: list[Message] = [{"role": "user", "content": self.input}]
        else:
            _check_items(self.input)
            messages = plain_messages(self.input)
        if self.instructions:
            has_system = bool(messages) and messages[0]["role"] == "system"
            system = [self.instructions, *([messages.pop(0)["content"]] if has_system else [])]
            messages.insert(0, {"role": "system", "content": "\n\n".join(system)})
        return messages

    def request(self, context_length: int | None) -> ChatFields | PromptFields:
        """Return the request to the service. Raise `InvalidRequest` or an `ApiError` of status 400."""
        max_tokens = self.max_output_tokens or default_max_tokens(context_length)
        logprobs = count_to_ask_for(
            self.top_logprobs, is_on=bool(self.include), switch=f"include to [{INCLUDE_LOGPROBS!r}]"
        )
        return build_request(
            self.messages(),
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            logprobs=logprobs,
        )


def _check_items(items: object) -> None:
    """Raise `InvalidRequest` if an item of the input is not a message, such as the result of a tool."""
    for number, item in enumerate(items if isinstance(items, list) else [], start=1):
        kind = item.get("type", "message") if isinstance(item, dict) else "message"
        if kind not in ("message", None):
            raise InvalidRequest(
                f"Item {number} of the input is of type {kind!r:.80}, and only messages are supported. Leave it out."
            )


class ResponseReply(BaseModel):
    """The reply of `/v1/responses`. `openai.types.responses.Response` describes all fields."""

    model_config = ConfigDict(extra="allow")

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete", "in_progress", "failed"]
    model: str
    output: list[dict[str, Any]]
    incomplete_details: dict[str, str] | None
    error: dict[str, Any] | None
    usage: dict[str, Any] | None


_EXAMPLE = sse.event({"type": "response.output_text.delta", "delta": "Hi"}, "response.output_text.delta").decode()


@router.post(
    "/v1/responses", response_model=ResponseReply, responses=also_streams(_EXAMPLE), summary="Answer a dialog (newer)"
)
async def create_response(body: ResponseRequest, request: Request) -> Any:
    """Answer a dialog by OpenAI's newer API, at once or as a stream of events."""
    settings = settings_of(request)
    model = await served_model(body.model, settings)
    pieces = settings.backend.generate([body.request(model.context_length)], record_of(request))
    reply = _Reply(body)
    if body.stream:
        return await sse.stream(
            request, reply.events(pieces), keep_alive=settings.keep_alive, on_error=reply.error_events
        )
    (answer,) = await unless_client_leaves(request, complete(pieces))
    return reply.complete(answer)


class _Reply:
    """One reply: the `Response` object in its states, and the events of its stream, which are numbered."""

    def __init__(self, body: ResponseRequest) -> None:
        self._item_id = f"msg_{uuid.uuid4().hex}"
        self._number = 0
        self._response: dict[str, Any] = {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": body.model,
            "output": [],
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "store": False,
            "temperature": body.temperature or 0.0,
            "text": {"format": {"type": "text"}},
            "tool_choice": "auto",
            "tools": [],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "auto",
            "usage": None,
        }

    def complete(self, answer: Answer) -> dict[str, Any]:
        """Return the `Response` object of a complete answer."""
        status = "incomplete" if answer.finish_reason == "length" else "completed"
        details = {"reason": "max_output_tokens"} if status == "incomplete" else None
        prompt_tokens = answer.prompt_tokens or 0
        usage = {
            "input_tokens": prompt_tokens,
            "input_tokens_details": {"cached_tokens": answer.cached_tokens or 0, "cache_write_tokens": 0},
            "output_tokens": answer.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": prompt_tokens + answer.completion_tokens,
            "dropped_turns": answer.dropped_turns,
        }
        item = self._item(status, [_part(answer.text, token_logprobs(answer.logprobs))])
        return {**self._response, "status": status, "incomplete_details": details, "output": [item], "usage": usage}

    async def events(self, pieces: AsyncGenerator[Piece, None]) -> AsyncGenerator[bytes, None]:
        """Yield the events of a stream."""
        place = {"item_id": self._item_id, "output_index": 0, "content_index": 0}
        has_begun = False
        async with aclosing(pieces):
            async for piece in pieces:
                if not has_begun:
                    has_begun = True
                    yield self._event("response.created", response=self._response)
                    yield self._event("response.in_progress", response=self._response)
                    yield self._event("response.output_item.added", output_index=0, item=self._item("in_progress", []))
                    yield self._event("response.content_part.added", **place, part=_part("", []))
                if piece.answer is None:
                    logprobs = token_logprobs(piece.logprobs)
                    yield self._event("response.output_text.delta", **place, delta=piece.text, logprobs=logprobs)
                    continue
                response = self.complete(piece.answer)
                (part,) = response["output"][0]["content"]
                yield self._event("response.output_text.done", **place, text=part["text"], logprobs=part["logprobs"])
                yield self._event("response.content_part.done", **place, part=part)
                yield self._event("response.output_item.done", output_index=0, item=response["output"][0])
                yield self._event(f"response.{response['status']}", response=response)

    def error_events(self, error: Exception) -> bytes:
        """Return the two events of a failure: ``error`` and ``response.failed``."""
        details = to_api_error(error).details
        failed = {
            **self._response,
            "status": "failed",
            "error": {"code": "server_error", "message": details.message},
        }
        return self._event("error", code=details.code, message=details.message, param=details.param) + self._event(
            "response.failed", response=failed
        )

    def _event(self, kind: str, **fields: Any) -> bytes:
        data = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return sse.event(data, kind)

    def _item(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self._item_id, "type": "message", "role": "assistant", "status": status, "content": content}


def _part(text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}
