"""What a tokenizer's chat template writes around the contents of messages.

A template is a program, so this module runs it with placeholders as contents: all other text is the template's own.
It knows no model, loads none, and needs no torch: the caller passes a Hugging Face tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from .errors import InvalidRequest
from .messages import Message

_SYSTEM, _QUESTION, _ANSWER, _NEXT = "systemxqz0", "questionxqz1", "answerxqz2", "nextxqz3"
_ROLES = {_SYSTEM: "system", _QUESTION: "user", _ANSWER: "assistant", _NEXT: "user"}
_CONTENTS = re.compile("|".join((_SYSTEM, _QUESTION, _ANSWER, _NEXT)))
TAG = re.compile(r"<+[^<>\s]+>+|\[+[^\[\]\s]+\]+")
_EMPTY_ELEMENT = re.compile(r"<([^<>\s/]+)>\s*</\1>")
"""``<think></think>``, with which templates say that an answer had no thoughts. It separates no speakers."""
_RESERVED = re.compile(r"<[|｜].*[|｜]>")
"""The spelling that only special tokens have: ``<|endoftext|>``, DeepSeek's ``<｜end▁of▁sentence｜>``."""


@dataclass(frozen=True)
class _Format:
    """What this module knows about a chat template. The functions below explain the fields."""

    control_token_ids: frozenset[int]
    end_of_turn_id: int | None
    role_tags: tuple[str, ...]
    takes_system: bool
    roles_in_parts: frozenset[str]
    incomplete: frozenset[tuple[bool, bool]]


def control_token_ids(tokenizer: Any) -> frozenset[int]:
    """Return the ids of the tokens that structure a dialog, which are not part of what a speaker says.

    They are BOS, EOS, the padding token and the unknown token; the special tokens that are spelled like
    ``<|endoftext|>``; and the added tokens, special or not, that the template writes around contents. Any other token
    is text, such as SmolLM2's ``<filename>``, a placeholder in a command, or a ``<think>`` that is not special.
    """
    return _format(tokenizer).control_token_ids


def end_of_turn_id(tokenizer: Any) -> int | None:
    """Return the id of the token that the template writes after an assistant message, or None if it writes none."""
    return _format(tokenizer).end_of_turn_id


def role_tags(tokenizer: Any) -> tuple[str, ...]:
    """Return the tags around contents that the tokenizer reads as ordinary text, such as Llama 2's ``[INST]``.

    A tag is ``<…>`` or ``[…]`` without whitespace. Words such as ``User:`` are not tags.
    """
    return _format(tokenizer).role_tags


def takes_system(tokenizer: Any) -> bool:
    """Return whether the template accepts a system message and writes its content beside the question."""
    return _format(tokenizer).takes_system


def render(messages: Sequence[Message], tokenizer: Any) -> str:
    """Return the text of a dialog with the beginning of the next answer, as the template writes it.

    Some templates read contents only as a list of parts. They get ``[{"type": "text", "text": ...}]``.

    Raise `InvalidRequest` if the template fails, or if it leaves out messages.
    """
    form = _format(tokenizer)
    shaped = [_shaped(message["role"], message["content"], form.roles_in_parts) for message in messages]
    try:
        text = str(tokenizer.apply_chat_template(shaped, add_generation_prompt=True, tokenize=False))
    except (ImportError, MemoryError):  # jinja2 is not installed, for example
        raise
    except Exception as error:
        is_deliberate = "TemplateError" in (cls.__name__ for cls in type(error).__mro__)  # jinja2 is not imported here
        reason = f"{error}" if is_deliberate else f"{type(error).__name__}: {error}"
        raise InvalidRequest(
            f"The model's chat template refuses these messages ({reason}). Change them, or send a raw text to /stream."
        ) from error
    has_system = messages[0]["role"] == "system"
    if (has_system, len(messages) - has_system > 1) in form.incomplete:
        if (has_system, False) in form.incomplete:
            raise InvalidRequest("The model's chat template does not write the question. Send a raw text to /stream.")
        raise InvalidRequest(
            "The model's chat template writes only some messages of a dialog. Ask each question in a new dialog."
        )
    return text


def _format(tokenizer: Any) -> _Format:
    named = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id)
    return _read(tokenizer, frozenset(named) - {None}, str(tokenizer.chat_template), len(tokenizer))


@lru_cache(maxsize=16)
def _read(tokenizer: Any, named: frozenset[int], template: str, size: int) -> _Format:
    """Return the format of a tokenizer. `template` and `size` are only keys of the cache: a tokenizer may change."""
    added = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
    ids = {token.content: token_id for token_id, token in tokenizer.added_tokens_decoder.items()}
    spelling = re.compile("|".join(map(re.escape, sorted(filter(str.strip, added), key=len, reverse=True))) or r"(?!)")
    in_parts = _roles_in_parts(tokenizer)
    dialogs = [(_SYSTEM, _QUESTION, _ANSWER, _NEXT), (_QUESTION, _ANSWER, _NEXT), (_SYSTEM, _QUESTION), (_QUESTION,)]
    rendered = {contents: _render(tokenizer, contents, in_parts) for contents in dialogs}
    with_system, history, system_only, question = (text or "" for text in rendered.values())
    answered = _render(tokenizer, (_QUESTION, _ANSWER), in_parts) or ""
    takes_system = _writes(system_only, (_SYSTEM, _QUESTION))
    around = [piece for text in (with_system, history, question) for piece in _CONTENTS.split(text)[:-1]]
    if takes_system:  # text before a question without a system message may be the template's own system prompt
        first = _CONTENTS.split(with_system or system_only)[:-1]
        around = first + [piece for text in (history, question) for piece in _CONTENTS.split(text)[1:-1]]
    prompts = [_CONTENTS.split(text)[-1] for text in (with_system, history, question)]
    around += _CONTENTS.split(answered)[int(takes_system) :] if history or answered else prompts
    around = [_EMPTY_ELEMENT.sub("", piece) for piece in around]

    def is_control(token: str) -> bool:
        return added[token].special or bool(TAG.fullmatch(token))

    written = {token for piece in around for token in spelling.findall(piece) if is_control(token)}
    written |= {token for piece in prompts for token in spelling.findall(piece) if added[token].special}
    written |= {token for token in added if added[token].special and _RESERVED.fullmatch(token)}
    after = (spelling.match(piece) for piece in _after_the_answer(answered, history))
    end_of_turn = next((match[0] for match in after if match and match[0] in written), None)
    return _Format(
        control_token_ids=frozenset(named | {ids[token] for token in written}),
        end_of_turn_id=None if end_of_turn is None else ids[end_of_turn],
        role_tags=tuple(
            dict.fromkeys(tag for piece in around for part in spelling.split(piece) for tag in TAG.findall(part))
        ),
        takes_system=takes_system,
        roles_in_parts=in_parts,
        incomplete=frozenset(
            (_SYSTEM in contents, _ANSWER in contents)
            for contents, text in rendered.items()
            if text is not None and not _writes(text, contents)
        ),
    )


def _roles_in_parts(tokenizer: Any) -> frozenset[str]:
    """Return the roles whose content the template writes only if it is a list of parts."""
    in_parts: frozenset[str] = frozenset()
    for role, contents in (
        ("user", (_QUESTION,)),
        ("system", (_SYSTEM, _QUESTION)),
        ("assistant", (_QUESTION, _ANSWER, _NEXT)),
    ):
        as_text, as_parts = (_render(tokenizer, contents, roles) or "" for roles in (in_parts, in_parts | {role}))
        if _writes(as_parts, contents) and not _writes(as_text, contents):
            in_parts |= {role}
    return in_parts


def _writes(text: str, contents: Sequence[str]) -> bool:
    return set(contents) <= set(_CONTENTS.findall(text))


def _render(tokenizer: Any, contents: Sequence[str], in_parts: frozenset[str]) -> str | None:
    """Return the template's text for a dialog with these contents, or None if the template refuses the dialog."""
    messages = [_shaped(_ROLES[content], content, in_parts) for content in contents]
    try:
        return str(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=contents[-1] != _ANSWER)
        )
    except Exception:  # a template may fail in any way, and a tokenizer may have none
        return None


def _shaped(role: str, content: str, in_parts: frozenset[str]) -> dict[str, Any]:
    """Return a message as the template reads it: `in_parts` are the roles whose content is a list of parts."""
    return {"role": role, "content": [{"type": "text", "text": content}] if role in in_parts else content}


def _after_the_answer(*texts: str) -> Iterator[str]:
    """Yield what follows the assistant's content in each text.

    Give the text that ends with the answer first: gpt-oss ends only earlier answers with ``<|end|>``, which it also
    writes within an answer.
    """
    for text in texts:
        _, found, after = text.partition(_ANSWER)
        if found:
            yield after.lstrip()
