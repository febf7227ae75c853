"""What a dialog is: which shapes a message may have, and in which order the speakers take turns.

This module knows no model. `helpers.prompts` turns a dialog into what a model reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

from .errors import InvalidRequest
from .options import MAX_CHARACTERS, MAX_MESSAGES

Role = Literal["system", "user", "assistant"]


class Message(TypedDict):
    """One message of a dialog; a dialog is a sequence of them, oldest first."""

    role: Role
    content: str


_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
"""OpenAI's types of a part that is text → the field that holds it (Chat Completions and Responses)."""
_OTHER_CONTENT = ("tool_calls", "function_call", "audio", "images")
"""Fields of a message, OpenAI's and Ollama's, that hold what a text model cannot read."""


def plain_messages(messages: object) -> list[Message]:
    """Return a new list of plain messages, made of messages of any shape that OpenAI's API has for text.

    A message is a dict, or an object with attributes, such as those of OpenAI's package. Its content is a text, or a
    list of parts, whose texts are joined. The role ``developer`` is OpenAI's new name for ``system``. If an
    assistant message has no content, its ``refusal`` is taken. All other fields are dropped.

    Raise `InvalidRequest` for a message that is malformed, or that contains anything but text, and for a dialog
    that is too long.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
        raise InvalidRequest(
            f"A dialog is a list of messages, not a {type(messages).__name__}. "
            "Send [{'role': 'user', 'content': 'your question'}]."
        )
    if len(messages) > MAX_MESSAGES:
        raise InvalidRequest(
            f"The dialog has {len(messages):,} messages. Send at most {MAX_MESSAGES:,}, and leave out the oldest."
        )
    plain = [_plain(message, number) for number, message in enumerate(messages, start=1)]
    if (characters := sum(len(message["content"]) for message in plain)) > MAX_CHARACTERS:
        raise InvalidRequest(
            f"The dialog has {characters:,} characters. Send at most {MAX_CHARACTERS:,}, and leave out the oldest."
        )
    return plain


def check_history(messages: object) -> list[Message]:
    """Return the messages so far as `plain_messages`, without an empty system message.

    The list may be empty and end with any role. Raise `InvalidRequest` if a message is malformed or the roles do not
    alternate.
    """
    checked = plain_messages(messages)
    first_user = int(bool(checked) and checked[0]["role"] == "system")
    for number, message in enumerate(checked[first_user:], start=first_user + 1):
        expected = ("user", "assistant")[(number - 1 - first_user) % 2]
        if message["role"] == "system":
            raise InvalidRequest(
                f"Message {number} (system) is not the first message of the dialog. "
                "Send one system message at most, and send it first."
            )
        if message["role"] != expected:
            raise InvalidRequest(
                f"Message {number} ({message['role']}) is out of turn: user and assistant alternate, the user "
                f"begins, and this message should be the {expected}'s. Join two messages of one role, or add the "
                "missing one."
            )
    has_empty_system = bool(first_user) and not checked[0]["content"].strip()
    return checked[1:] if has_empty_system else checked


def check_dialog(messages: object) -> list[Message]:
    """Return a dialog that a model can answer, as a new list of plain messages.

    A dialog is an optional system message, then user and assistant messages in turn, and ends with a user message
    (Meta's rule). An empty system message is left out. The last message must not be empty: Meta allows that, but
    models answer it with something arbitrary. Earlier messages may be empty, so that a history can be continued.

    Raise `InvalidRequest` if it is not a dialog.
    """
    count = len(messages) if isinstance(messages, Sequence) else 0  # `check_history` may leave out the system message
    checked = check_history(messages)
    if not checked:
        raise InvalidRequest("The dialog is empty. Send at least one user message.")
    last = checked[-1]
    if last["role"] != "user":
        raise InvalidRequest(
            f"Message {count} ({last['role']}) is the last one, so there is nothing to answer. "
            "End the dialog with a user message."
        )
    if not last["content"].strip():
        raise InvalidRequest(f"Message {count} (user) is empty. Write what the model should answer.")
    return checked


def check_unicode(text: str, place: str) -> None:
    """Raise `InvalidRequest` if `text` is not valid Unicode. `place` says where it stands."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"{place} is not valid Unicode: its character {error.start + 1} is {text[error.start]!a}, half of a "
            "surrogate pair. Remove it, or decode the text with the right encoding."
        ) from None


def _plain(message: object, number: int) -> Message:
    role = _field(message, "role")
    role = getattr(role, "value", role)  # an Enum's
    if not isinstance(role, str):
        raise InvalidRequest(
            f"Message {number} is not a dict with a 'role' and a 'content'. "
            "Write it as {'role': 'user', 'content': 'your question'}."
        )
    role = "system" if role == "developer" else str(role)
    if role in ("tool", "function"):
        raise InvalidRequest(f"Message {number} has the role {role!r}, and tools are not supported. Leave it out.")
    if role not in ("system", "user", "assistant"):
        raise InvalidRequest(f"Message {number} has the unknown role {role!r}. Use 'system', 'user' or 'assistant'.")
    place = f"Message {number} ({role})"
    for name in _OTHER_CONTENT:
        if _field(message, name):
            raise InvalidRequest(f"{place} has {name!r}, and only text is supported. Leave it out.")
    content = _field(message, "content")
    if content is None and role == "assistant":
        content = _field(message, "refusal")
    text = _text(content, place)
    check_unicode(text, place)
    return {"role": role, "content": text}  # type: ignore[typeddict-item]


def _text(content: object, place: str) -> str:
    """Return the text of a message's content."""
    if isinstance(content, str):
        return str(content)
    if content is None:
        raise InvalidRequest(f"{place} has no content. Write a text.")
    if not isinstance(content, Sequence) or isinstance(content, (bytes, bytearray)):
        raise InvalidRequest(f"{place} has a content of type {type(content).__name__}. Write a text.")
    return "".join(_part_text(part, f"Part {number} of {place}") for number, part in enumerate(content, start=1))


def _part_text(part: object, place: str) -> str:
    kind = _field(part, "type")
    kind = getattr(kind, "value", kind)
    if not isinstance(kind, str):
        raise InvalidRequest(f"{place} has no type. Write it as {{'type': 'text', 'text': 'your question'}}.")
    if kind not in _TEXT_PARTS:
        raise InvalidRequest(f"{place} is of type {kind!r}, and only text is supported. Leave it out.")
    text = _field(part, _TEXT_PARTS[kind])
    if not isinstance(text, str):
        raise InvalidRequest(f"{place} has no text. Write it as {{'type': 'text', 'text': 'your question'}}.")
    return str(text)


def _field(thing: object, name: str) -> Any:
    """Return a field of a dict or of an object, or None if it has no such field."""
    return thing.get(name) if isinstance(thing, Mapping) else getattr(thing, name, None)
