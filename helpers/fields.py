"""The fields of the documents that cross the wire, and their checks, without DocArray.

The client reads and writes these. `helpers.schemas` makes DocArray documents of them, for the service and for programs
that use Jina's own client. DocArray imports torch, which a client does not need.
"""

# No `from __future__ import annotations`, and Optional instead of `| None`: Jina and DocArray read the annotations.
from typing import Any, Dict, List, Optional

from pydantic import BaseModel, ValidationError, ValidationInfo, field_validator

from .errors import InvalidRequest
from .messages import plain_messages
from .options import SamplingParams


class SamplingFields(BaseModel):
    """The fields that both kinds of request share: those of `helpers.options.SamplingParams`.

    None means the default, and `stop` may be a single string.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: Optional[int] = None
    stop: List[str] = []
    logprobs: Optional[int] = None

    @field_validator("max_tokens", "temperature", "top_p", "seed", "logprobs", mode="before")
    @classmethod
    def _is_not_a_truth_value(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool):  # which pydantic reads as 0 or 1
            raise InvalidRequest(f"{info.field_name} is {value}. Give a number.")
        return value

    @field_validator("max_tokens", "temperature", "top_p", "stop", mode="before")
    @classmethod
    def _has_a_default(cls, value: Any, info: ValidationInfo) -> Any:
        return getattr(SamplingParams, str(info.field_name)) if value is None else value

    @field_validator("stop", mode="before")
    @classmethod
    def _may_be_one_text(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    def sampling_params(self) -> SamplingParams:
        """Return the fields as `SamplingParams`. Raise `InvalidRequest` for a value out of range."""
        return SamplingParams(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
            stop=self.stop,
            logprobs=self.logprobs,
        )


class PromptFields(SamplingFields):
    """A request to ``/stream``: the raw text of a prompt, exactly as the model reads it."""

    prompt: str


class ChatFields(SamplingFields):
    """A request to ``/chat``: a dialog, which the service turns into the model's own prompt format.

    ``messages``: ``[{"role": "system" | "user" | "assistant", "content": ...}, ...]``.
    `helpers.messages.plain_messages` converts the other shapes of OpenAI's text messages into this one.
    """

    # not a list of documents: with pydantic 2, Jina 3.34 cannot tell its gateway the schema of a DocList
    messages: List[Dict[str, str]]

    @field_validator("messages", mode="before")
    @classmethod
    def _are_plain(cls, messages: Any) -> Any:
        return plain_messages(messages)


class NoFields(BaseModel):
    """A request to ``/info``."""


class OutputFields(BaseModel):
    """One token of an answer, or the end of the answer.

    The `generated_text` of all documents joined equals the tokenizer's own decoding of all `token_id`, up to a
    stop string. `generated_text` is empty while the bytes of a character are incomplete.

    Set in the first and the last document, but not in a last document that reports an error:

    - ``prompt_tokens``: the length of the prompt.
    - ``cached_tokens``: how many of these tokens were not read again, because the prefix cache held them.
    - ``queue_seconds``: how long the request waited until it was admitted.
    - ``dropped_turns``: how many of the oldest turns of a dialog were dropped to fit the context window.

    Set only in the last document, which stands for no token (`token_id` is -1):

    - ``finish_reason``: ``stop`` (the model ended its answer, or a stop string came), ``length``
      (`max_tokens` reached) or ``error``.
    - ``completion_tokens``: how many documents came before this one.
    - ``error``: ``"ClassName: what happened and what to do"``, a class of `helpers.errors`.

    Set for each token if the request asks for `logprobs`; `helpers.logprobs` reads and writes them:

    - ``logprobs``: the log-probability of the token, and then of the most likely ones, the most likely first.
    - ``logprob_ids``, ``logprob_tokens``: the ids of these tokens, and their bytes in hexadecimal digits.
    - ``text_offset``: how many characters of the text come before the token's own. If the complete text has no more
      than these, a stop string has cut the token off.
    """

    # flat lists: Jina's gateway cannot describe dicts of any type, or lists inside lists
    token_id: int
    generated_text: str
    finish_reason: Optional[str] = None
    prompt_tokens: Optional[int] = None
    completion_tokens: Optional[int] = None
    cached_tokens: Optional[int] = None
    queue_seconds: Optional[float] = None
    dropped_turns: Optional[int] = None
    error: Optional[str] = None
    logprobs: Optional[List[float]] = None
    logprob_ids: Optional[List[int]] = None
    logprob_tokens: Optional[List[str]] = None
    text_offset: Optional[int] = None


class CountFields(BaseModel):
    """The reply of ``/count``: how many tokens a dialog takes, and how many the context window holds.

    All turns are counted, even if they exceed the window; old turns that cannot fit into it are estimated. `error` is
    as in `OutputFields`.
    """

    prompt_tokens: int
    context_length: int
    error: Optional[str] = None


class ModelFields(BaseModel):
    """The reply of ``/info``: the model behind the service, its steps since the start, and its load now."""

    model: str
    precision: str
    device: str
    context_length: int
    steps: int
    running: int
    waiting: int


def validation_message(error: ValidationError) -> str:
    """Return, in one line, which fields of a document are invalid, and why."""
    return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_url=False))


def own_refusal(error: Exception) -> Optional[InvalidRequest]:
    """Return the `InvalidRequest` that a document of this module raised, or None. Pydantic wraps it."""
    for one in error.errors(include_url=False) if isinstance(error, ValidationError) else ():
        reason = one.get("ctx", {}).get("error")
        if isinstance(reason, InvalidRequest):
            return reason
    return None
