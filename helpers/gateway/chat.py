"""``POST /v1/chat/completions``: answer a dialog."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field, SkipValidation

from ..client import build_request
from ..errors import InvalidRequest
from ..fields import ChatFields, PromptFields
from ..messages import plain_messages
from ..options import MAX_LOGPROBS
from . import sse
from .backend import Piece
from .disconnects import unless_client_leaves
from .fields import MAX_TOKENS, ChoicesRequest, default_max_tokens, served_model
from .guard import GuardedRoute
from .logprobs import ChatLogprobs, count_to_ask_for, token_logprobs
from .records import record_of
from .results import FinishReason, Usage, also_streams, complete, new_head, stream_of, usage_of
from .settings import settings_of

router = APIRouter(route_class=GuardedRoute)


class TextPart(BaseModel):
    """A part of a message's content. Only text is supported."""

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """A message. `developer` is another name for `system`. Other fields, such as `name`, have no effect."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]


class ChatCompletionRequest(ChoicesRequest):
    """A request to `/v1/chat/completions`."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"model": "smollm2", "messages": [{"role": "user", "content": "What is a token?"}]}]
        }
    )
    NO_EFFECT = {
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "parallel_tool_calls": (True, False),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "response_format": ({"type": "text"},),
        "modalities": (["text"],),
        "logit_bias": ({},),
        "presence_penalty": (0,),
        "frequency_penalty": (0,),
        "reasoning_effort": ("none",),
        "store": (False,),
    }

    # checked by `plain_messages`, whose refusals name the message
    messages: SkipValidation[list[ChatMessage]]
    """An optional system message, then user and assistant messages in turn. The last one is the user's."""
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    """The maximum number of tokens in an answer."""
    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    """OpenAI's older name of `max_completion_tokens`."""
    logprobs: bool | None = None
    """Report the log-probability of each token: the model's own, before `temperature` and `top_p`."""
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    """How many of the most likely tokens to report beside each. It needs `logprobs`."""

    def requests(self, context_length: int | None) -> list[ChatFields | PromptFields]:
        """Return a request to the service for each choice. Raise `InvalidRequest` or an `ApiError` of status 400."""
        given = {self.max_completion_tokens, self.max_tokens} - {None}
        if len(given) > 1:
            raise InvalidRequest("max_tokens and max_completion_tokens differ. Leave max_tokens out.")
        max_tokens = given.pop() if given else default_max_tokens(context_length)
        logprobs = count_to_ask_for(self.top_logprobs, is_on=bool(self.logprobs), switch="logprobs to true")
        messages = plain_messages(self.messages)
        return self.repeat(build_request(messages, max_tokens=max_tokens, logprobs=logprobs, **self.sampling()))


class AnswerMessage(BaseModel):
    """The model's answer."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """One of the answers."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    """The reply of `/v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


_EXAMPLE = sse.event({"choices": [{"index": 0, "delta": {"content": "Hi"}, "finish_reason": None}]}).decode()


@router.post(
    "/v1/chat/completions",
    response_model=ChatCompletion,
    responses=also_streams(_EXAMPLE),
    summary="Answer a dialog",
)
async def create_chat_completion(body: ChatCompletionRequest, request: Request) -> Any:
    """Answer a dialog, at once or as a stream."""
    settings = settings_of(request)
    model = await served_model(body.model, settings)
    pieces = settings.backend.generate(body.requests(model.context_length), record_of(request), n=body.choices)
    if body.stream:
        head = new_head("chatcmpl", "chat.completion.chunk", body.model)
        events = stream_of(pieces, body, head, _Choices(with_logprobs=bool(body.logprobs)))
        return await sse.stream(request, events, keep_alive=settings.keep_alive)
    answers = await unless_client_leaves(request, complete(pieces))
    choices = [
        {
            "index": index,
            "message": {"content": answer.text},
            "logprobs": {"content": token_logprobs(answer.logprobs)} if body.logprobs else None,
            "finish_reason": answer.finish_reason,
        }
        for index, answer in enumerate(answers)
    ]
    head = new_head("chatcmpl", "chat.completion", body.model)
    return {**head, "choices": choices, "usage": usage_of(answers, n=body.choices)}


class _Choices:
    """The choices of a stream's events, made of the pieces of its answers."""

    def __init__(self, *, with_logprobs: bool) -> None:
        self._with_logprobs = with_logprobs
        self._begun: set[int] = set()

    def __call__(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """Yield the choices of a piece. The first piece of an answer has one more, with the role."""
        if piece.choice not in self._begun:
            self._begun.add(piece.choice)
            yield _choice(piece.choice, {"role": "assistant", "content": ""})
        if piece.answer is None:
            logprobs = {"content": token_logprobs(piece.logprobs), "refusal": None} if self._with_logprobs else None
            yield _choice(piece.choice, {"content": piece.text}, logprobs=logprobs)
        else:
            yield _choice(piece.choice, {}, piece.answer.finish_reason)


def _choice(
    index: int, delta: dict[str, Any], finish_reason: str | None = None, logprobs: Any = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
