"""From messages to the text and the token ids that a chat model was trained on.

For Llama-2-Chat, text and ids are exactly those of Meta's reference (``chat_completion`` in
``llama/generation.py`` of github.com/meta-llama/llama); any other model uses its own chat template.
This module loads no model and generates nothing: the caller passes a tokenizer.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

from . import plain_text
from .chat_template import render, role_tags, takes_system
from .errors import InvalidRequest
from .messages import Message as Message
from .messages import check_dialog as check_dialog
from .messages import check_unicode


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer, fast or slow, that this module uses."""

    bos_token: Any
    eos_token: Any
    bos_token_id: Any
    eos_token_id: Any
    all_special_tokens: Any
    added_tokens_decoder: Any
    chat_template: Any

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...


SYSTEM_PROMPT = (
    "You are a helpful, respectful, and honest assistant. Always answer as helpfully as possible "
    "while being safe. Your answers should not include any harmful, unethical, racist, sexist, "
    "toxic, dangerous, or illegal content. Please ensure that your responses are socially unbiased "
    "and positive in nature.\n\n"
    "If a question does not make any sense or is not factually coherent, explain why instead of "
    "answering something incorrectly. If you don't know the answer to a question, don't share "
    "false information."
)
"""The article's."""
QUESTION = "If I punch myself in the face and it hurts, am I weak or strong?"
"""The article's."""

# Meta's names and values.
B_INST, E_INST = "[INST]", "[/INST]"
B_SYS, E_SYS = "<<SYS>>\n", "\n<</SYS>>\n\n"
SPECIAL_TAGS = (B_INST, E_INST, B_SYS.strip(), E_SYS.strip())

BOS, EOS = "<s>", "</s>"
"""How a text spells the BOS and EOS ids of Llama 2."""


def llama2_prompt(messages: Sequence[Message]) -> str:
    """Return the whole dialog as one text in Llama 2's prompt format, with ``<s>`` and ``</s>`` written out.

    A closed turn is ``<s>[INST] user [/INST] answer </s>``; the last turn ends at ``[/INST]``. As in Meta's
    reference, the system prompt is put in front of the first user message before that message is stripped.
    Raise `InvalidRequest` if `check_dialog` refuses the messages, if a system or user message contains one of the four
    tags (Meta's rule), or ``<s>`` or ``</s>``, which would become BOS and EOS in a text. In an assistant message, a
    space after its first character turns such a tag into ordinary text. (Meta refuses it, so a conversation could
    not continue after the model once wrote a tag.)
    """
    *closed, last = _llama2_turns(_without_tags(messages, (*SPECIAL_TAGS, BOS, EOS)))
    return "".join(f"{BOS}{turn}{EOS}" for turn in closed) + BOS + last


def llama2_token_ids(prompt: str | Sequence[Message], tokenizer: Tokenizer) -> list[int]:
    """Return the token ids of a dialog, or of a text in Llama 2's prompt format.

    For messages, the ids are Meta's: every turn is encoded alone, between the ids of BOS and EOS. A text is split
    at the tokenizer's spelling of BOS and EOS (``<s>``, ``</s>``), and the segments are encoded alone too. If a
    tokenizer encodes the whole text, the ids differ: they have a second BOS, and with ``legacy=False``, the setting
    of Llama-2-7b-chat-hf, ``[`` (29961) after ``<s>`` instead of Meta's ``▁[`` (518).

    The ids of a text always begin with one BOS and never contain two in a row. Whitespace around the text and
    between ``</s>`` and ``<s>`` is dropped; inside a turn it stays.

    In a message, ``<s>`` is encoded as ordinary characters, as in Meta's tokenizer.

    Raise `InvalidRequest` if `check_dialog` refuses the messages, if a system or user message contains one of the four
    tags (Meta's rule), or if the text is empty or not valid Unicode.
    """
    if isinstance(prompt, str):
        return _llama2_text_ids(prompt, tokenizer)
    return _llama2_dialog_ids(_without_tags(prompt, SPECIAL_TAGS), tokenizer)


def is_llama2(tokenizer: Tokenizer) -> bool:
    """Return whether the model was trained on Llama 2's prompt format.

    The chat template decides, because a path or a name says nothing: for Llama-2-Chat and its descendants it
    writes ``[INST]`` and ``<<SYS>>``. A copy without a template does not count as Llama 2.
    """
    template = str(tokenizer.chat_template)
    return B_INST in template and B_SYS.strip() in template


def token_ids(prompt: str | Sequence[Message], tokenizer: Tokenizer) -> list[int]:
    """Return the token ids of a dialog, or of a raw text, for the model that the tokenizer belongs to.

    Llama 2 gets `llama2_token_ids`. For any other model, its own chat template formats a dialog (and may add
    a system prompt), and its tokenizer encodes a raw text, without a second BOS if the text begins with one.

    A message cannot pass off one speaker's words as another's. A special token's spelling in a message is encoded as
    plain characters (`helpers.plain_text`). A tag that the model reads as text, such as Llama 2's ``[INST]``, gets a
    space after its first character. If the template takes no system message, the system prompt is put in front of
    the first question.

    Raise `InvalidRequest` if `check_dialog` or the template refuses the messages, if the model has no template, or if
    the text is empty or not valid Unicode.
    """
    if not isinstance(prompt, str):
        return _dialog_ids(check_dialog(prompt), tokenizer)
    if is_llama2(tokenizer):
        return _llama2_text_ids(prompt, tokenizer)
    _check_text(prompt)
    bos = tokenizer.bos_token
    has_bos = bool(bos) and prompt.lstrip().startswith(bos)
    return tokenizer.encode(prompt, add_special_tokens=not has_bos)


def count_tokens(prompt: str | Sequence[Message], tokenizer: Tokenizer, *, window: int | None = None) -> int:
    """Return how many tokens of the context window the prompt takes. Raise what `token_ids` raises.

    If the context length `window` is given, old turns that cannot fit into it are not encoded. Their tokens are
    estimated, so that the sum also exceeds the window.
    """
    if window is None or isinstance(prompt, str):
        return len(token_ids(prompt, tokenizer))
    system, turns = _split(check_dialog(prompt))
    longest = longest_token(tokenizer)
    split = len(turns) - 1 - 2 * _turns_within(turns, longest * window)
    left_out = sum(len(message["content"].strip()) for message in turns[:split])
    return len(_dialog_ids([*system, *turns[split:]], tokenizer)) + math.ceil(left_out / min(4, longest))


@dataclass(frozen=True)
class FittedDialog:
    """A dialog that leaves enough of the context window for its answer.

    - ``token_ids``: the ids of `messages`.
    - ``dropped_turns``: how many of the oldest turns, each a question with its answer, were dropped from `messages`.
    """

    messages: list[Message]
    token_ids: list[int]
    dropped_turns: int


def fit_to_window(messages: Sequence[Message], tokenizer: Tokenizer, *, window: int, max_tokens: int) -> FittedDialog:
    """Drop the fewest of the oldest turns that let the dialog and its answer fit into the context window.

    `window` is the context length in tokens (4096 for Llama 2); `max_tokens` of it are reserved for the answer. The
    system prompt and the last question always stay. The number of turns is guessed from their length and then found
    by bisection, so a long dialog is encoded a few times, not once per turn. Turns that certainly do not fit, because
    even the longest tokens could not hold them, are not encoded at all.

    Raise `InvalidRequest` if the system prompt and the last question alone do not fit, or if `token_ids` refuses
    the dialog.
    """
    system, turns = _split(check_dialog(messages))
    # a turn with more characters cannot fit, and encoding millions of them takes seconds
    possible = _turns_within(turns, longest_token(tokenizer) * max(1, window - max_tokens))
    count = len(turns) // 2

    def keeping(kept: int) -> FittedDialog:
        left = [*system, *turns[2 * (count - kept) :]]
        return FittedDialog(left, _dialog_ids(left, tokenizer), count - kept)

    best, too_many = None, possible + 1
    kept = min(possible, _turns_within(turns, 4 * window, around=16))  # a guess
    while best is None or too_many - (count - best.dropped_turns) > 1:
        fitted = keeping(kept)
        if len(fitted.token_ids) + max_tokens <= window:
            best = fitted
            kept = min(2 * kept + 1, possible) if too_many > possible else (kept + too_many) // 2
        elif kept == 0:
            raise InvalidRequest(_too_long(fitted, window=window, max_tokens=max_tokens))
        else:
            too_many = kept
            kept = (count - best.dropped_turns + too_many) // 2 if best else 0
    return best


def _split(dialog: list[Message]) -> tuple[list[Message], list[Message]]:
    """Return the system message, in a list that may be empty, and the other messages."""
    first = int(dialog[0]["role"] == "system")
    return dialog[:first], dialog[first:]


def _turns_within(turns: Sequence[Message], characters: int, *, around: int = 0) -> int:
    """Return how many of the latest closed turns, together with the last question, fit into `characters`.

    Templates strip contents, and write about `around` characters for each message.
    """
    lengths = (around + len(message["content"].strip()) for message in reversed(turns))
    fitting = sum(1 for total in itertools.accumulate(lengths) if total <= characters)
    return max(0, fitting - 1) // 2


def longest_token(tokenizer: Any) -> int:
    """Return the largest number of characters that one token stands for."""
    return _read_longest_token(tokenizer, len(tokenizer))


@lru_cache(maxsize=16)
def _read_longest_token(tokenizer: Any, size: int) -> int:
    """Return the length of the longest token. `size` is only a key of the cache: tokens may be added."""
    return max(map(len, tokenizer.get_vocab()))


def _too_long(least: FittedDialog, *, window: int, max_tokens: int) -> str:
    taken = len(least.token_ids)
    what, fix = "The last question takes", "Shorten it"
    if len(least.messages) > 1:
        what, fix = "The system prompt and the last question take", "Shorten one of them"
    if taken < window:
        fix += f", or set max_tokens to {window - taken} or less"
    return (
        f"{what} {taken} tokens; with max_tokens={max_tokens} for the answer, that is "
        f"{taken + max_tokens - window} more than the model's context window of {window}. {fix}."
    )


def _without_tags(messages: Sequence[Message], tags: Sequence[str]) -> list[Message]:
    """Return the checked dialog, with the tags in assistant messages broken. Refuse tags in the others."""
    dialog = check_dialog(messages)
    for number, message in enumerate(dialog, start=1 + len(messages) - len(dialog)):
        for tag in tags:
            if message["role"] != "assistant" and tag in message["content"]:
                raise InvalidRequest(
                    f"Message {number} ({message['role']}) contains {tag!r}, which tells the model who is speaking, so "
                    "it could pass off one speaker's words as another's (prompt injection). Remove it, or spell it "
                    "differently."
                )
    return _break(dialog, tags)


def _break(messages: list[Message], tags: Sequence[str]) -> list[Message]:
    """Return new messages in which each tag has a space after its first character."""
    broken: list[Message] = []
    for message in messages:
        content = message["content"]
        for tag in tags:
            content = content.replace(tag, f"{tag[0]} {tag[1:]}")
        broken.append({"role": message["role"], "content": content})
    return broken


def _check_text(text: str) -> None:
    check_unicode(text, "The prompt")
    if not text.strip():
        raise InvalidRequest("The prompt is empty. Write what the model should continue.")


def _dialog_ids(messages: list[Message], tokenizer: Tokenizer) -> list[int]:
    if is_llama2(tokenizer):
        return _llama2_dialog_ids(_break(messages, SPECIAL_TAGS), tokenizer)
    if not tokenizer.chat_template:
        raise InvalidRequest(
            "This model has no chat template, so it cannot read messages. Send one raw text to /stream instead."
        )
    messages = _break(messages, role_tags(tokenizer))
    if messages[0]["role"] == "system" and not takes_system(tokenizer):
        system, first, *rest = messages
        messages = [{"role": "user", "content": f"{system['content']}\n\n{first['content']}"}, *rest]
    return plain_text.encode(render(_marked(messages, tokenizer), tokenizer), tokenizer)


def _marked(messages: list[Message], tokenizer: Tokenizer) -> list[Message]:
    contents = plain_text.mark((message["content"] for message in messages), tokenizer)
    return [{**message, "content": content} for message, content in zip(messages, contents, strict=True)]


def _llama2_turns(messages: list[Message]) -> list[str]:
    """Return the text between BOS and EOS of each turn; the last turn has no answer yet."""
    contents = [message["content"] for message in messages]
    if messages[0]["role"] == "system":
        system, first, *rest = contents
        contents = [f"{B_SYS}{system}{E_SYS}{first}", *rest]
    contents = [content.strip() for content in contents]
    closed = zip(contents[::2], contents[1::2], strict=False)
    return [
        *(f"{B_INST} {user} {E_INST} {answer} " for user, answer in closed),
        f"{B_INST} {contents[-1]} {E_INST}",
    ]


def _llama2_dialog_ids(messages: list[Message], tokenizer: Tokenizer) -> list[int]:
    turns = _llama2_turns(_marked(messages, tokenizer))
    *closed, last = (plain_text.encode(turn, tokenizer) for turn in turns)
    ids: list[int] = []
    for turn in closed:
        ids += [tokenizer.bos_token_id, *turn, tokenizer.eos_token_id]
    return [*ids, tokenizer.bos_token_id, *last]


def _llama2_text_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    _check_text(text)
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    ids = [tokenizer.bos_token_id]
    for part in re.split(f"({re.escape(bos)}|{re.escape(eos)})", text.strip()):
        if part == bos:
            if ids[-1] != tokenizer.bos_token_id:
                ids.append(tokenizer.bos_token_id)
        elif part == eos:
            ids.append(tokenizer.eos_token_id)
        elif part.strip():
            ids += tokenizer.encode(part, add_special_tokens=False)
    return ids
