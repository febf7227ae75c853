"""The log-probabilities of an answer's tokens, as a client reads them, and their form on the wire.

They are those of the model itself: the log-softmax of its logits, before `temperature` and `top_p`. OpenAI and vLLM
report the same. A token is bytes and not text, because a character may take several tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .fields import OutputFields


@dataclass(frozen=True)
class Logprob:
    """A token, and the natural logarithm of its probability. `utf8` holds the token's bytes."""

    token_id: int
    utf8: bytes
    logprob: float

    @property
    def text(self) -> str:
        r"""Return the token's text. Bytes that are no complete character are spelled out, as in ``\xf0``."""
        return self.utf8.decode(errors="backslashreplace")


@dataclass(frozen=True)
class TokenLogprobs(Logprob):
    """A token of an answer, beside the most likely ones at its place.

    - `top`: the most likely tokens, the most likely first; as many as the request asks for.
    - `text_offset`: how many characters of the answer's text come before the token's own.
    """

    top: tuple[Logprob, ...]
    text_offset: int


def to_fields(logprobs: Sequence[Logprob], text_offset: int) -> dict[str, Any]:
    """Return the fields of `helpers.fields.OutputFields` for a token and the most likely ones, in this order."""
    return {
        "text_offset": text_offset,
        "logprobs": [one.logprob for one in logprobs],
        "logprob_ids": [one.token_id for one in logprobs],
        "logprob_tokens": [one.utf8.hex() for one in logprobs],
    }


def from_fields(document: OutputFields) -> TokenLogprobs | None:
    """Return what `to_fields` wrote into `document`, or None if it carries no log-probabilities."""
    if not document.logprobs:
        return None
    token, *top = (
        Logprob(token_id, bytes.fromhex(token), logprob)
        for token_id, token, logprob in zip(
            document.logprob_ids or [], document.logprob_tokens or [], document.logprobs, strict=True
        )
    )
    return TokenLogprobs(token.token_id, token.utf8, token.logprob, tuple(top), document.text_offset or 0)
