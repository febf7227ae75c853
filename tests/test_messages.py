"""What counts as a dialog, and which shapes a message may have."""

from __future__ import annotations

import dataclasses
import enum
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from dialogs import assistant, system, user
from helpers.errors import InvalidRequest
from helpers.messages import Message, check_dialog, check_history, plain_messages

# --- Shapes of a message --------------------------------------------------------------------------


class Role(enum.Enum):
    USER = "user"


class Part(BaseModel):
    type: str
    text: str


class SdkMessage(BaseModel):
    """A message of an answer, as OpenAI's package defines it."""

    role: str
    content: str | list[Part] | None
    refusal: str | None = None
    annotations: list[Any] | None = []
    audio: Any = None
    function_call: Any = None
    tool_calls: list[Any] | None = None


@dataclasses.dataclass
class OwnMessage:
    role: Any
    content: Any


DUMPED = SdkMessage(role="assistant", content="b").model_dump()


@pytest.mark.parametrize(
    ("message", "plain"),
    [
        ({**DUMPED, "timestamp": 1.7e9, "id": 3, "extra": {"a": [1]}, "name": "x"}, assistant("b")),
        ({**DUMPED, "tool_calls": [], "annotations": [{"type": "url_citation"}]}, assistant("b")),
        ({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": " b"}]}, user("a b")),
        ({"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]}, user("a")),
        ({"role": "assistant", "content": [{"type": "output_text", "text": "b", "logprobs": []}]}, assistant("b")),
        ({"role": "user", "content": ({"type": "text", "text": "a"},)}, user("a")),
        ({"role": "user", "content": []}, user("")),
        ({"role": "developer", "content": "s"}, system("s")),
        ({**DUMPED, "content": None, "refusal": "I cannot."}, assistant("I cannot.")),
        ({"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}, assistant("No.")),
        (SdkMessage(role="assistant", content="b"), assistant("b")),
        (SdkMessage(role="user", content=[Part(type="text", text="a")]), user("a")),
        (OwnMessage(Role.USER, "a"), user("a")),
        (SimpleNamespace(role="user", content="a"), user("a")),
    ],
    ids=str,
)
def test_every_shape_of_a_text_message_becomes_a_plain_one(message: Any, plain: Message) -> None:
    assert plain_messages([message]) == [plain]
    assert plain_messages((message,)) == [plain]


def test_a_content_of_another_kind_of_text_becomes_plain_text() -> None:
    class Markup(str):
        pass

    (plain,) = plain_messages([{"role": Markup("user"), "content": Markup("a")}])
    assert type(plain["role"]) is type(plain["content"]) is str


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, r"^Part 1 of .*'image_url'"),
        ({"role": "user", "content": [{"type": "input_audio"}]}, "'input_audio', and only text"),
        ({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "file"}]}, r"^Part 2 of .*'file'"),
        ({"role": "user", "content": [{"text": "a"}]}, "has no type"),
        ({"role": "user", "content": ["a"]}, "has no type"),
        ({"role": "user", "content": [{"type": "text", "text": None}]}, "has no text"),
        ({"role": "user", "content": [{"type": "text", "text": 5}]}, "has no text"),
        ({"role": "user", "content": {"type": "text", "text": "a"}}, "has a content of type dict. Write a text"),
        ({"role": "user", "content": 5}, r"^Message 1 \(user\) has a content of type int\. Write a text"),
        ({"role": "user", "content": b"a"}, "has a content of type bytes"),
        ({"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}, "'tool_calls', and only text"),
        ({"role": "assistant", "content": "b", "function_call": {"name": "f"}}, "'function_call'"),
        ({"role": "assistant", "content": None, "audio": {"id": "1"}}, "'audio'"),
        ({"role": "user", "content": "a", "images": ["aGk="]}, "'images'"),
        (DUMPED | {"content": None}, r"^Message 1 \(assistant\) has no content\. Write a text"),
        ({"role": "user"}, "has no content"),
        ({"role": "tool", "content": "b", "tool_call_id": "1"}, "role 'tool', and tools are not supported. Leave"),
        ({"role": "function", "content": "b", "name": "f"}, "role 'function'"),
        ({"role": "robot", "content": "b"}, r"unknown role 'robot'\. Use"),
        ({"role": 1, "content": "b"}, "Message 1 is not a dict with a 'role'"),
        ({"content": "b"}, "Message 1 is not a dict .* Write it as"),
        ("hi", "Message 1 is not a dict"),
        (None, "Message 1 is not a dict"),
        (user("a\ud83d"), r"1 \(user\) is not valid Unicode: its character 2 is '\\ud83d'"),
        ({"role": "user", "content": [{"type": "text", "text": "\ud83d"}]}, "not valid Unicode"),
    ],
    ids=lambda value: ascii(value)[:60],
)
def test_what_is_not_text_is_refused_by_its_name(message: Any, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says) as error:
        plain_messages([message])
    str(error.value).encode("utf-8")  # also if the message is not valid Unicode


def test_a_dialog_has_a_limit_that_no_conversation_reaches() -> None:
    assert plain_messages([user("a")] * 20_000)
    with pytest.raises(InvalidRequest, match=r"^The dialog has 20,001 messages\. Send at most 20,000"):
        plain_messages([user("a")] * 20_001)
    with pytest.raises(InvalidRequest, match=r"^The dialog has 8,000,001 characters\. Send at most 8,000,000"):
        plain_messages([user("a" * 4_000_000), assistant("b" * 4_000_001)])


# --- Dialogs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], r"The dialog is empty\. Send at least one user message"),
        ([system(" ")], r"The dialog is empty\. Send at least one user message"),
        ("hi", r"a list of messages, not a str\. Send"),
        (user("hi"), r"a list of messages, not a dict\. Send"),
        (None, "not a NoneType"),
        ([user("a"), system("b"), user("c")], r"Message 2 \(system\) is not the first .* send it first"),
        ([system("a"), system("b"), user("c")], r"Message 2 \(system\) is not the first"),
        ([user("a"), assistant("b"), system("c"), user("d")], r"Message 3 \(system\) is not the first"),
        ([assistant("a"), user("b")], r"Message 1 \(assistant\) is out of turn.* be the user's"),
        ([system("s"), assistant("a"), user("b")], r"Message 2 \(assistant\) is out of turn"),
        ([user("a"), user("b")], r"Message 2 \(user\) is out of turn.* the assistant's"),
        ([user("a"), assistant("b"), assistant("c")], r"Message 3 \(assistant\) is out of turn"),
        ([system("a")], r"Message 1 \(system\) is the last one.* End the dialog with a user"),
        ([system(""), user("a"), assistant("b")], r"Message 3 \(assistant\) is the last one"),
        ([user(" \n")], r"Message 1 \(user\) is empty\. Write"),
        ([system(""), user("")], r"Message 2 \(user\) is empty"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_is_not_a_dialog_is_refused_with_its_place_and_a_fix(messages: Any, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        check_dialog(messages)


def test_a_checked_dialog_is_a_plain_copy() -> None:
    dialog = ({**system("s"), "name": "x"}, user("a"), assistant(""), user("b"))
    checked = check_dialog(dialog)
    assert checked == [system("s"), user("a"), assistant(""), user("b")]
    assert checked[1] is not dialog[1]


@pytest.mark.parametrize("empty", ["", " \n", "\u3000"])
def test_an_empty_system_message_is_left_out(empty: str) -> None:
    assert check_dialog([system(empty), user("a")]) == check_history([system(empty), user("a")]) == [user("a")]


def contents() -> st.SearchStrategy[str]:
    return st.sampled_from(["", " \n", "a", "[INST]", "<s>"])


@given(st.none() | contents(), st.lists(contents(), max_size=6))
def test_any_history_that_is_accepted_can_be_continued(system_prompt: str | None, said: list[str]) -> None:
    history = [] if system_prompt is None else [system(system_prompt)]
    history += [(user, assistant)[number % 2](text) for number, text in enumerate(said)]
    accepted = check_history(history)
    if len(said) % 2:
        accepted.append(assistant(""))
    assert check_dialog([*accepted, user("And you?")])[-1] == user("And you?")
