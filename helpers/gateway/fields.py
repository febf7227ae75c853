"""The fields that all requests for text share, and what happens to OpenAI's other fields.

A field that is not supported is refused by name, unless its value has no effect, such as ``tools: []``. A null counts
as absent, because OpenAI's clients send nulls.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..fields import ChatFields, ModelFields, PromptFields
from ..options import MAX_TOKENS
from .backend import model_id
from .errors import ApiError, UnsupportedField
from .openai_services import ServerModel
from .settings import Settings

MAX_CHOICES = 16
"""Answers that one request may ask for."""
DEFAULT_MAX_TOKENS = 1024
"""Without `max_tokens`, an answer to a dialog has at most so many tokens, and at most half of the context window."""
_LABELS = {"user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "service_tier"}
"""Fields that change nothing about the answer. They are accepted and not stored."""


class GenerationRequest(BaseModel):
    """The fields that all requests for text share. `NO_EFFECT` lists other fields with the values that change nothing.

    None means the default of `helpers.options.SamplingParams`.
    """

    model_config = ConfigDict(strict=True, extra="forbid", use_attribute_docstrings=True)
    NO_EFFECT: ClassVar[dict[str, tuple[object, ...]]] = {}

    model: str
    """A name that `/v1/models` lists."""
    stream: bool | None = None
    """Send the answer as server-sent events while it is generated."""
    temperature: float | None = Field(None, ge=0, le=2)
    """From 0 (the default here: always the most likely token) to 2."""
    top_p: float | None = Field(None, gt=0, le=1)
    """Sample from the most likely tokens that together reach this probability."""

    @model_validator(mode="before")
    @classmethod
    def _has_only_known_fields(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        present = {name: value for name, value in given.items() if value is not None}
        for name in sorted(present.keys() - cls.model_fields.keys() - _LABELS):
            if not any(_is_same(present[name], value) for value in cls.NO_EFFECT.get(name, ())):
                raise UnsupportedField(name)
        return {name: value for name, value in present.items() if name in cls.model_fields}


class StreamOptions(BaseModel):
    """Options of a stream."""

    model_config = ConfigDict(strict=True, extra="forbid", use_attribute_docstrings=True)

    include_usage: bool | None = None
    """Send a last chunk with the usage, and no choices."""


class ChoicesRequest(GenerationRequest):
    """The fields that `/v1/chat/completions` and `/v1/completions` share."""

    stream_options: StreamOptions | None = None
    seed: int | None = None
    """Makes a sample repeatable. Choice number i uses seed + i. Only its lowest 31 bits count."""
    stop: str | list[str] | None = None
    """The answer ends before the first of these texts."""
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    """How many answers to generate: 1, if it is null. They share the prompt's KV cache."""

    def sampling(self) -> dict[str, Any]:
        """Return the arguments of `helpers.client.build_request` that all answers share."""
        return {"temperature": self.temperature, "top_p": self.top_p, "stop": self.stop}

    def repeat(self, request: ChatFields | PromptFields) -> list[ChatFields | PromptFields]:
        """Return the request to the service for each answer to one prompt: they differ in their seeds."""
        if self.seed is None:
            return [request] * self.choices
        return [request.model_copy(update={"seed": (self.seed + choice) % 2**31}) for choice in range(self.choices)]

    @property
    def choices(self) -> int:
        """Return how many answers each prompt gets."""
        return self.n or 1

    @property
    def wants_usage(self) -> bool:
        """Return whether a stream ends with a chunk that carries the usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


async def served_model(name: str, settings: Settings) -> ModelFields | ServerModel:
    """Return the service's model. Raise an `ApiError` of status 404 if clients do not know it as `name`."""
    model = await settings.backend.model()
    if name != (served := model_id(model)):
        raise ApiError(
            404,
            f"The model {name[:200]!r} does not exist here. Use {served!r}.",
            code="model_not_found",
            param="model",
        )
    return model


def default_max_tokens(context_length: int | None) -> int:
    """Return the maximum number of tokens in the answer to a dialog, for a request that names none.

    If the context window is not known, it is `MAX_TOKENS`, and the server behind the gateway chooses.
    """
    return MAX_TOKENS if context_length is None else min(DEFAULT_MAX_TOKENS, context_length // 2)


def _is_same(value: object, other: object) -> bool:
    """Return whether two JSON values are the same. Python says that False equals 0."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)
