"""Log-probabilities in the shapes of OpenAI's three APIs, and the fields that ask for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from ..logprobs import Logprob, TokenLogprobs
from .errors import ApiError

_LOWEST = -9999.0
"""OpenAI's value for a token that is very unlikely. JSON has no minus infinity."""


class TopLogprob(BaseModel):
    """A token, and its log-probability. `token` spells out bytes that are no complete character, such as ``\\xf0``."""

    token: str
    bytes: list[int]
    logprob: float


class TokenLogprob(TopLogprob):
    """A token of an answer, and the most likely tokens at its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """The log-probabilities of an answer to a dialog."""

    content: list[TokenLogprob]
    refusal: None = None


class CompletionLogprobs(BaseModel):
    """The log-probabilities of a continued prompt. All lists are as long as `tokens`."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


def count_to_ask_for(top_logprobs: int | None, *, is_on: bool, switch: str) -> int | None:
    """Return the `logprobs` of `helpers.client.build_request`. `switch` is how a client turns them on.

    Raise an `ApiError` of status 400 if a client asks for the most likely tokens, but not for log-probabilities.
    """
    if top_logprobs and not is_on:
        raise ApiError(
            400,
            f"top_logprobs is {top_logprobs}, but log-probabilities are off. Set {switch}, or leave top_logprobs out.",
            code="invalid_value",
            param="top_logprobs",
        )
    return (top_logprobs or 0) if is_on else None


def token_logprobs(logprobs: Sequence[TokenLogprobs]) -> list[dict[str, Any]]:
    """Return tokens in the shape of `TokenLogprob`."""
    return [{**_top_logprob(one), "top_logprobs": [_top_logprob(top) for top in one.top]} for one in logprobs]


def completion_logprobs(logprobs: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """Return tokens in the shape of `CompletionLogprobs`."""
    return {
        "tokens": [one.text for one in logprobs],
        "token_logprobs": [_finite(one) for one in logprobs],
        "top_logprobs": [{top.text: _finite(top) for top in (*one.top, one)} for one in logprobs],
        "text_offset": [one.text_offset for one in logprobs],
    }


def _top_logprob(one: Logprob) -> dict[str, Any]:
    return {"token": one.text, "bytes": list(one.utf8), "logprob": _finite(one)}


def _finite(one: Logprob) -> float:
    return max(one.logprob, _LOWEST)
