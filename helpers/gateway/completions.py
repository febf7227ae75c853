"""``POST /v1/completions``: continue the raw text of a prompt."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field, field_validator

from ..client import build_request
from ..errors import InvalidRequest
from ..fields import ChatFields, PromptFields
from . import sse
from .backend import Piece
from .disconnects import unless_client_leaves
from .fields import MAX_CHOICES, MAX_TOKENS, ChoicesRequest, served_model
from .guard import GuardedRoute
from .logprobs import CompletionLogprobs, completion_logprobs
from .records import record_of
from .results import FinishReason, Usage, also_streams, complete, new_head, stream_of, usage_of
from .settings import settings_of

DEFAULT_MAX_TOKENS = 16
"""OpenAI's."""
MAX_LOGPROBS = 5
"""OpenAI's, for this older API."""

router = APIRouter(route_class=GuardedRoute)


class CompletionRequest(ChoicesRequest):
    """A request to `/v1/completions`."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"model": "smollm2", "prompt": "A token is", "max_tokens": 20}]}
    )
    NO_EFFECT = {
        "best_of": (1,),
        "echo": (False,),
        "suffix": ("",),
        "logit_bias": ({},),
        "presence_penalty": (0,),
        "frequency_penalty": (0,),
    }

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES)]
    """The raw text of a prompt, exactly as the model reads it, or a list of them. Token ids are not supported."""
    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    """The maximum number of tokens in an answer: 16, if it is null, as for OpenAI."""
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    """Report the log-probability of each token, and of so many of the most likely tokens at its place."""

    @field_validator("prompt", mode="before")
    @classmethod
    def _is_text(cls, prompt: Any) -> Any:
        is_list = isinstance(prompt, list) and prompt and all(isinstance(one, str) for one in prompt)
        if not (isinstance(prompt, str) or is_list):
            raise InvalidRequest("The prompt is not a text or a list of texts. Send one: token ids are not supported.")
        return prompt

    @property
    def prompts(self) -> list[str]:
        """Return the prompts as a list."""
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt

    def requests(self) -> list[ChatFields | PromptFields]:
        """Return a request to the service for each choice: `n` for the first prompt, `n` for the second, and so on."""
        if (count := self.choices * len(self.prompts)) > MAX_CHOICES:
            raise InvalidRequest(f"The request asks for {count} answers. Ask for at most {MAX_CHOICES}.")
        return [
            request
            for prompt in self.prompts
            for request in self.repeat(
                build_request(
                    prompt=prompt,
                    max_tokens=self.max_tokens or DEFAULT_MAX_TOKENS,
                    logprobs=self.logprobs,
                    **self.sampling(),
                )
            )
        ]


class CompletionChoice(BaseModel):
    """One of the answers."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason


class Completion(BaseModel):
    """The reply of `/v1/completions`."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


_EXAMPLE = sse.event({"choices": [{"index": 0, "text": "Hi", "finish_reason": None}]}).decode()


@router.post(
    "/v1/completions", response_model=Completion, responses=also_streams(_EXAMPLE), summary="Continue a raw prompt"
)
async def create_completion(body: CompletionRequest, request: Request) -> Any:
    """Continue the raw text of a prompt, at once or as a stream."""
    settings = settings_of(request)
    await served_model(body.model, settings)
    pieces = settings.backend.generate(body.requests(), record_of(request), n=body.choices)
    head = new_head("cmpl", "text_completion", body.model)
    if body.stream:
        events = stream_of(pieces, body, head, lambda piece: [_choice(piece, with_logprobs=body.logprobs is not None)])
        return await sse.stream(request, events, keep_alive=settings.keep_alive)
    answers = await unless_client_leaves(request, complete(pieces))
    choices = [
        {
            "index": index,
            "text": answer.text,
            "logprobs": None if body.logprobs is None else completion_logprobs(answer.logprobs),
            "finish_reason": answer.finish_reason,
        }
        for index, answer in enumerate(answers)
    ]
    return {**head, "choices": choices, "usage": usage_of(answers, n=body.choices)}


def _choice(piece: Piece, *, with_logprobs: bool) -> dict[str, Any]:
    """Return the choice of an event."""
    has_logprobs = with_logprobs and piece.answer is None
    return {
        "index": piece.choice,
        "text": piece.text,
        "logprobs": completion_logprobs(piece.logprobs) if has_logprobs else None,
        "finish_reason": piece.answer and piece.answer.finish_reason,
    }
