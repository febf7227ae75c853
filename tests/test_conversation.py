"""A conversation: the messages of each request, and the turns that stay. Most tests script the service's answers."""

from __future__ import annotations

import asyncio
import copy
import errno
import json
import os
import pickle
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from traceback import walk_stack
from typing import Any

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import helpers
from connections import connections_to
from eventually import generation_stops, until
from helpers.answer import Answer
from helpers.conversation import Conversation, Turn
from helpers.errors import InvalidRequest, ServiceUnavailable, to_wire
from helpers.messages import check_dialog
from helpers.schemas import CountDocument
from scripted_service import REFUSED, ScriptedService
from wire import ENDLESS

HALF_A_PAIR = "\ud83d"
"""A text that is not valid Unicode."""


@pytest.fixture
def conversation(scripted: ScriptedService) -> Conversation:
    return scripted.conversation("Be brief.", max_tokens=3)


def turns(conversation: Conversation) -> list[tuple[str, str, str | None]]:
    return [(turn.question, turn.answer.text, turn.answer.finish_reason) for turn in conversation.turns]


def sent(scripted: ScriptedService) -> list[tuple[str, str]]:
    """Return the dialog of the latest request."""
    return [(message["role"], message["content"]) for message in scripted.requests[-1].messages]


def stop_after(answer: Answer, pieces: int) -> None:
    for number, _ in enumerate(answer, start=1):
        if number == pieces:
            answer.stop()


def read_in_thread(answer: Answer) -> threading.Thread:
    reading = threading.Thread(target=list, args=(answer,))
    reading.start()
    return reading


# --- What is sent ---------------------------------------------------------------------------------


def test_each_question_is_sent_with_all_earlier_turns(conversation: Conversation, scripted: ScriptedService) -> None:
    assert conversation.ask("Hello") == "1:0 1:1 1:2 "
    assert sent(scripted) == [("system", "Be brief."), ("user", "Hello")]
    conversation.ask("And you?")
    assert sent(scripted)[1:] == [("user", "Hello"), ("assistant", "1:0 1:1 1:2 "), ("user", "And you?")]
    assert [message["content"] for message in conversation.messages[-2:]] == ["And you?", "2:0 2:1 2:2 "]
    assert repr(conversation) == "<Conversation, turns: 2>"


def test_a_program_with_an_event_loop_asks_the_same(conversation: Conversation, scripted: ScriptedService) -> None:
    async def converse() -> None:
        assert await conversation.aask("Hello") == "1:0 1:1 1:2 "
        assert "".join([piece async for piece in conversation.stream("And you?")]) == "2:0 2:1 2:2 "

    asyncio.run(converse())
    assert sent(scripted)[1:] == [("user", "Hello"), ("assistant", "1:0 1:1 1:2 "), ("user", "And you?")]


def test_the_system_prompt_and_the_options_can_change_between_two_questions(
    conversation: Conversation, scripted: ScriptedService
) -> None:
    conversation.ask("Hello")
    conversation.system = None
    conversation.options["temperature"] = 0.5
    conversation.ask("And you?")
    assert sent(scripted)[0] == ("user", "Hello")
    assert [request.temperature for request in scripted.requests] == [0, 0.5]


def test_the_latest_answer_is_there_with_its_usage(conversation: Conversation) -> None:
    assert conversation.answer is None
    conversation.ask("Hello")
    assert conversation.answer is not None
    assert conversation.answer.completion_tokens == 3


def test_an_answer_without_text_is_not_sent(conversation: Conversation, scripted: ScriptedService) -> None:
    scripted.script = scripted.refuse
    with pytest.raises(InvalidRequest):
        conversation.ask("Hello")
    scripted.script = scripted.count_up
    conversation.ask("And you?")
    assert sent(scripted) == [("system", "Be brief."), ("user", "And you?")]
    assert [message["content"] for message in conversation.messages] == ["Be brief.", "And you?", "2:0 2:1 2:2 "]


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"max_token": 3}, TypeError, "max_token"),
        ({"max_tokens": "many"}, InvalidRequest, "max_tokens: Input should be a valid integer"),
        ({"temperature": 3}, InvalidRequest, "temperature is 3"),
        ({"port": 0}, InvalidRequest, "0 is not a port"),
        ({"system": HALF_A_PAIR}, InvalidRequest, "not valid Unicode"),
    ],
)
def test_a_wrong_option_is_refused_before_the_first_question(options: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        Conversation(**options)


def test_an_option_may_be_none_or_a_string_from_the_environment(
    scripted: ScriptedService,
) -> None:
    nothing: Any = dict.fromkeys(("max_tokens", "temperature", "top_p", "seed", "stop", "host"))
    conversation = Conversation(port=str(scripted.port), **{**nothing, "max_tokens": "3"})
    assert conversation.address == ("127.0.0.1", scripted.port)
    assert conversation.ask("Hello") == "1:0 1:1 1:2 "
    conversation.options |= nothing
    conversation.options |= {"max_tokens": 1, "stop": "\n"}
    assert conversation.ask("Hello") == "2:0 "
    assert scripted.requests[-1].stop == ["\n"]
    conversation.options["port"] = None
    assert conversation.address == ("127.0.0.1", 12345)


def test_a_question_that_cannot_be_sent_is_not_a_turn(conversation: Conversation, scripted: ScriptedService) -> None:
    with pytest.raises(InvalidRequest, match="half of a surrogate pair"):
        conversation.ask(HALF_A_PAIR)
    assert conversation.turns == []
    assert scripted.requests == []


def test_the_window_counts_all_turns_and_one_more_question(
    conversation: Conversation, scripted: ScriptedService
) -> None:
    scripted.token_counts = CountDocument(prompt_tokens=30, context_length=40)
    window = conversation.window()
    assert (window.tokens, window.size, window.left) == (30, 40, 10)
    scripted.token_counts = CountDocument(prompt_tokens=50, context_length=40)
    assert conversation.window().left == 0
    scripted.token_counts = CountDocument(prompt_tokens=0, context_length=40, error=to_wire(REFUSED))
    with pytest.raises(InvalidRequest, match="^The question is refused"):
        conversation.window()


# --- Answers that are stopped, left or fail -------------------------------------------------------


def test_a_stopped_answer_keeps_its_text_and_is_sent(conversation: Conversation, scripted: ScriptedService) -> None:
    conversation.options["max_tokens"] = 400
    stop_after(conversation.stream("Hello"), 2)
    assert turns(conversation) == [("Hello", "1:0 1:1 ", "cancelled")]
    conversation.options["max_tokens"] = 3
    conversation.ask("And you?")
    assert sent(scripted)[1:] == [("user", "Hello"), ("assistant", "1:0 1:1 "), ("user", "And you?")]


def test_leaving_the_loop_is_a_stop(conversation: Conversation) -> None:
    for _ in conversation.stream("Hello"):
        break

    async def leave() -> None:
        async for _ in conversation.stream("And you?"):
            break

    asyncio.run(leave())
    assert turns(conversation) == [("Hello", "1:0 ", "cancelled"), ("And you?", "2:0 ", "cancelled")]


def test_a_stop_ends_an_answer_that_sends_nothing(conversation: Conversation, scripted: ScriptedService) -> None:
    scripted.script = scripted.silence
    answer = conversation.stream("Hello")
    reading = read_in_thread(answer)
    until(lambda: scripted.requests, "the request arrives")
    answer.stop()
    reading.join(300)
    assert turns(conversation) == [("Hello", "", "cancelled")]


def test_ctrl_c_before_the_first_word_is_a_stop_and_leaves_no_connection(
    conversation: Conversation, scripted: ScriptedService
) -> None:
    scripted.script = scripted.silence

    def is_waiting() -> bool:
        frames = [frame for inner in sys._current_frames().values() for frame, _ in walk_stack(inner)]
        return any(one.f_globals["__name__"] == "grpc._channel" and one.f_code.co_name == "_next" for one in frames)

    def press_ctrl_c() -> None:
        until(is_waiting, "the question waits for its answer")
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press_ctrl_c).start()
    with pytest.raises(KeyboardInterrupt):
        conversation.ask("Hello")
    assert turns(conversation) == [("Hello", "", "cancelled")]
    until(lambda: not connections_to(scripted.port), "the connection is closed")  # by a thread of gRPC
    scripted.resume.set()
    assert conversation.ask("And you?") == "2:0 2:1 2:2 "


def test_an_answer_that_is_stopped_before_it_is_read_asks_nothing(
    conversation: Conversation, scripted: ScriptedService
) -> None:
    async def read(answer: Answer) -> list[str]:
        return [piece async for piece in answer]

    readers: list[Callable[[Answer], list[str]]] = [list, lambda answer: asyncio.run(read(answer))]
    for read_all in readers:
        answer = conversation.stream("Hello")
        answer.stop()
        assert read_all(answer) == []
    assert scripted.requests == []


def test_without_keep_partial_a_stopped_answer_is_dropped_with_its_question(scripted: ScriptedService) -> None:
    conversation = scripted.conversation(max_tokens=400, keep_partial=False)
    stop_after(conversation.stream("Hello"), 2)
    assert turns(conversation) == []
    conversation.options["max_tokens"] = 3
    conversation.ask("And you?")
    assert sent(scripted) == [("user", "And you?")]


def test_without_keep_partial_a_failed_answer_is_dropped_with_its_question(scripted: ScriptedService) -> None:
    conversation = scripted.conversation(max_tokens=3, keep_partial=False)
    scripted.script = scripted.fail
    with pytest.raises(InvalidRequest):
        conversation.ask("Hello")
    assert turns(conversation) == []


def test_a_failed_answer_keeps_its_text_and_its_error(conversation: Conversation, scripted: ScriptedService) -> None:
    scripted.script = scripted.fail
    with pytest.raises(InvalidRequest, match="^The question is refused"):
        conversation.ask("Hello")
    assert turns(conversation) == [("Hello", "Half an ", "error")]
    assert conversation.answer is not None
    assert conversation.answer.error == "InvalidRequest: The question is refused. Ask another one."


def test_a_conversation_outlives_its_service(conversation: Conversation, scripted: ScriptedService) -> None:
    scripted.script = scripted.half
    answer = conversation.stream("Hello")
    with pytest.raises(ServiceUnavailable):
        for _ in answer:
            if answer.completion_tokens == 2:
                scripted.stop()
    assert turns(conversation) == [("Hello", "Half an ", "error")]
    scripted.start()
    scripted.script = scripted.count_up
    conversation.ask("And you?")
    assert sent(scripted)[1:] == [("user", "Hello"), ("assistant", "Half an "), ("user", "And you?")]


# --- One question while another is answered -------------------------------------------------------


def test_a_new_question_stops_the_running_answer_and_loses_nothing(
    conversation: Conversation, scripted: ScriptedService
) -> None:
    conversation.options["max_tokens"] = 400
    pieces = iter(conversation.stream("Hello"))
    assert [next(pieces), next(pieces)] == ["1:0 ", "1:1 "]
    conversation.options["max_tokens"] = 1
    conversation.ask("And you?")
    assert list(pieces) == []
    assert turns(conversation) == [("Hello", "1:0 1:1 ", "cancelled"), ("And you?", "2:0 ", "length")]
    assert ("assistant", "1:0 1:1 ") in sent(scripted)


def test_a_new_question_finds_the_stopped_one_settled(scripted: ScriptedService) -> None:
    conversation = scripted.conversation(max_tokens=400, keep_partial=False)
    for _ in range(5):
        answer = conversation.stream("Hello")
        reading = read_in_thread(answer)
        until(lambda: answer.text, "a word")  # noqa: B023  it is this round's answer
        answer.stop()
        stop_after(conversation.stream("And you?"), 1)
        reading.join()
        assert turns(conversation) == []


def test_a_stopped_answer_that_ends_late_leaves_the_new_one_alone(scripted: ScriptedService) -> None:
    conversation = scripted.conversation(max_tokens=400, keep_partial=False)
    old = iter(conversation.stream("Hello"))
    next(old)
    conversation.options["max_tokens"] = 2
    new = iter(conversation.stream("And you?"))
    next(new)
    assert list(old) == []
    assert list(new) == ["2:1 "]
    assert turns(conversation) == [("And you?", "2:0 2:1 ", "length")]


def test_a_question_that_cannot_be_sent_does_not_stop_the_running_answer(
    conversation: Conversation, scripted: ScriptedService
) -> None:
    pieces = iter(conversation.stream("Hello"))
    next(pieces)
    conversation.system = HALF_A_PAIR
    with pytest.raises(InvalidRequest, match="surrogate"):
        conversation.ask("And you?")
    assert list(pieces) == ["1:1 ", "1:2 "]
    assert turns(conversation) == [("Hello", "1:0 1:1 1:2 ", "length")]


def test_an_answer_that_was_overtaken_is_not_read_any_more(
    conversation: Conversation, scripted: ScriptedService
) -> None:
    overtaken = conversation.stream("Why?")
    conversation.ask("Who?")
    with pytest.raises(RuntimeError, match="has changed since this question was asked"):
        list(overtaken)
    assert [turn.question for turn in conversation.turns] == ["Who?"]
    assert len(scripted.requests) == 1


# --- Regenerate, edit, undo, fork -----------------------------------------------------------------


def test_a_regenerated_answer_replaces_the_old_one_until_undo(
    conversation: Conversation, scripted: ScriptedService
) -> None:
    conversation.ask("Hello")
    conversation.ask("And you?")
    list(conversation.regenerate())
    assert turns(conversation)[1] == ("And you?", "3:0 3:1 3:2 ", "length")
    assert [text for _, text in sent(scripted)] == ["Be brief.", "Hello", "1:0 1:1 1:2 ", "And you?"]
    assert conversation.undo()
    assert turns(conversation)[1] == ("And you?", "2:0 2:1 2:2 ", "length")


def test_undo_takes_back_every_change_and_then_says_that_there_is_none(conversation: Conversation) -> None:
    conversation.ask("Hello")
    conversation.ask("And you?")
    list(conversation.regenerate())
    assert [conversation.undo() for _ in range(4)] == [True, True, True, False]
    assert conversation.turns == []


def test_undo_stops_a_running_answer_and_removes_its_question(conversation: Conversation) -> None:
    conversation.options["max_tokens"] = 400
    answer = conversation.stream("Hello")
    pieces = iter(answer)
    next(pieces)
    assert conversation.undo()
    assert list(pieces) == []
    assert (answer.finish_reason, conversation.turns) == ("cancelled", [])


CHANGES: dict[str, Callable[[Conversation], Answer]] = {
    "ask": lambda conversation: conversation.stream("Hello"),
    "edit": lambda conversation: conversation.edit(0, "Good day"),
    "regenerate": lambda conversation: conversation.regenerate(),
}


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.sampled_from([*CHANGES]), st.sampled_from(["complete", "failed", "stopped", "empty"]))),
    st.booleans(),
)
def test_undo_goes_back_through_every_state(steps: list[tuple[str, str]], keep_partial: bool) -> None:
    with ScriptedService() as scripted:
        conversation = scripted.conversation(max_tokens=2, keep_partial=keep_partial)
        states = []
        for change, end in steps:
            before = conversation.turns
            if change != "ask" and not before:
                continue
            scripted.script = {"failed": scripted.fail, "empty": scripted.refuse}.get(end, scripted.count_up)
            with suppress(InvalidRequest):
                stop_after(CHANGES[change](conversation), 1 if end == "stopped" else -1)
            if conversation.turns is not before:
                states.append(before)
        for state in reversed(states):
            assert conversation.undo()
            assert conversation.turns == state
        assert not conversation.undo()


def test_nothing_can_be_regenerated_before_the_first_question(conversation: Conversation) -> None:
    with pytest.raises(InvalidRequest, match="Nothing has been asked yet"):
        conversation.regenerate()


def test_an_edited_question_replaces_its_turn_and_all_after_it_until_undo(
    conversation: Conversation, scripted: ScriptedService
) -> None:
    for question in ("Hello", "And you?", "Why?"):
        conversation.ask(question)
    before = turns(conversation)
    list(conversation.edit(1, "Who are you?"))
    assert turns(conversation) == [before[0], ("Who are you?", "4:0 4:1 4:2 ", "length")]
    assert [text for _, text in sent(scripted)] == ["Be brief.", "Hello", "1:0 1:1 1:2 ", "Who are you?"]
    assert conversation.undo()
    assert turns(conversation) == before
    list(conversation.edit(-3, "Good day"))
    assert [turn.question for turn in conversation.turns] == ["Good day"]


@pytest.mark.parametrize("turn", [1, -2])
def test_a_turn_that_does_not_exist_cannot_be_edited(conversation: Conversation, turn: int) -> None:
    conversation.ask("Hello")
    with pytest.raises(InvalidRequest, match=f"There is no turn {turn}: the conversation has 1"):
        conversation.edit(turn, "Hello")


@pytest.mark.parametrize(
    "replace", [lambda it: it.edit(0, "Again"), lambda it: it.regenerate()], ids=["edit", "regenerate"]
)
@pytest.mark.parametrize("keep_partial", [True, False])
def test_if_nothing_comes_in_its_place_the_old_turn_stays(
    scripted: ScriptedService, replace: Callable[[Conversation], Answer], keep_partial: bool
) -> None:
    conversation = scripted.conversation(max_tokens=3, keep_partial=keep_partial)
    conversation.ask("Hello")
    conversation.ask("And you?")
    before = turns(conversation)
    scripted.script = scripted.refuse
    with pytest.raises(InvalidRequest):
        list(replace(conversation))
    scripted.stop()
    with pytest.raises(ServiceUnavailable):
        list(replace(conversation))
    assert turns(conversation) == before


def test_a_stopped_answer_with_text_replaces_the_old_one(conversation: Conversation) -> None:
    conversation.ask("Hello")
    stop_after(conversation.regenerate(), 2)
    assert turns(conversation) == [("Hello", "2:0 2:1 ", "cancelled")]


def test_regenerating_a_running_answer_asks_its_question_again(scripted: ScriptedService) -> None:
    conversation = scripted.conversation(max_tokens=400, keep_partial=False)
    conversation.ask("Hello")
    pieces = iter(conversation.stream("And you?"))
    next(pieces)
    list(conversation.regenerate())
    assert [turn.question for turn in conversation.turns] == ["Hello", "And you?"]
    assert conversation.turns[1].answer.finish_reason == "length"


def test_only_the_running_answer_can_be_dropped_later(scripted: ScriptedService) -> None:
    conversation = scripted.conversation(max_tokens=3, keep_partial=False)
    conversation.turns = [Turn("Hello", Answer.ended("Hi", "cancelled"))]  # as from another program's file
    conversation.ask("Why?")
    assert [turn.question for turn in conversation.turns] == ["Hello", "Why?"]


def test_a_fork_goes_its_own_way(conversation: Conversation) -> None:
    conversation.ask("Hello")
    fork = conversation.fork()
    fork.system = "Be kind."
    fork.options["max_tokens"] = 5
    fork.ask("And you?")
    assert (conversation.system, conversation.options["max_tokens"], len(conversation.turns)) == ("Be brief.", 3, 1)
    assert [fork.undo() for _ in range(3)] == [True, True, False]
    assert len(conversation.turns) == 1


def test_a_fork_has_the_first_turns_and_no_running_answer(conversation: Conversation) -> None:
    conversation.ask("Hello")
    conversation.ask("And you?")
    assert turns(conversation.fork(1)) == turns(conversation)[:1]
    pieces = iter(conversation.stream("Why?"))
    next(pieces)
    assert turns(conversation.fork()) == turns(conversation)[:2]
    list(pieces)


def copied_by_pickle(conversation: Conversation) -> Conversation:
    return pickle.loads(pickle.dumps(conversation))  # type: ignore[no-any-return]


COPIES = pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, copied_by_pickle])


@COPIES
def test_a_copy_has_its_own_turns_and_options(
    copied: Callable[[Conversation], Conversation], conversation: Conversation, scripted: ScriptedService
) -> None:
    conversation.ask("Hello")
    scripted.script = scripted.fail
    with pytest.raises(InvalidRequest):
        conversation.ask("And you?")
    scripted.script = scripted.count_up
    list(conversation.regenerate())
    before = turns(conversation)
    other = copied(conversation)
    assert (other.system, other.options, turns(other)) == (conversation.system, conversation.options, before)
    other.options["max_tokens"] = 1
    assert other.ask("Why?") == "4:0 "
    assert turns(conversation) == before and conversation.options["max_tokens"] == 3
    assert [other.undo() for _ in range(5)] == [True] * 4 + [False]
    assert conversation.undo() and conversation.turns[1].answer.error == to_wire(REFUSED)


@COPIES
@pytest.mark.parametrize("change", ["ask", "edit", "regenerate"])
def test_a_copy_of_a_conversation_with_a_running_answer_is_as_before_its_question(
    copied: Callable[[Conversation], Conversation], change: str, conversation: Conversation
) -> None:
    conversation.ask("Hello")
    before = turns(conversation)
    pieces = iter(CHANGES[change](conversation))
    next(pieces)
    other = copied(conversation)
    assert turns(other) == before
    assert [other.undo() for _ in range(2)] == [True, False]
    assert list(pieces) == ["2:1 ", "2:2 "]
    assert conversation.turns[-1].answer.finish_reason == "length"


# --- Files ----------------------------------------------------------------------------------------

MESSAGES = [{"role": "user", "content": "a", "name": "x"}, {"role": "assistant", "content": "b"}]


def load(folder: Path, content: Any, **options: Any) -> Conversation:
    """Return the conversation in a file with this content."""
    (folder / "talk.json").write_text(json.dumps(content))
    return Conversation.load(folder / "talk.json", **options)


def saved_in(folder: Path) -> Any:
    return json.loads((folder / "talk.json").read_text("utf-8"))


def test_a_loaded_conversation_is_the_one_that_was_saved(
    conversation: Conversation, scripted: ScriptedService, tmp_path: Path
) -> None:
    conversation.ask("Grüße 🦙\nHello")
    scripted.script = scripted.refuse
    with pytest.raises(InvalidRequest):
        conversation.ask("And you?")
    scripted.script = scripted.count_up
    conversation.options["max_tokens"] = 400
    stop_after(conversation.stream("Why?"), 2)
    conversation.save(tmp_path / "talk.json")
    loaded = Conversation.load(tmp_path / "talk.json", **conversation.options)
    assert (loaded.system, turns(loaded), loaded.messages) == (
        conversation.system,
        turns(conversation),
        conversation.messages,
    )
    assert loaded.turns[1].answer.error == to_wire(REFUSED)
    assert [loaded.undo() for _ in range(4)] == [True] * 3 + [False]


def test_a_saved_file_has_the_messages_in_openais_format(conversation: Conversation, tmp_path: Path) -> None:
    conversation.ask("Grüße 🦙")
    conversation.save(tmp_path / "talk.json")
    assert saved_in(tmp_path) == {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Grüße 🦙"},
            {"role": "assistant", "content": "1:0 1:1 1:2 "},
        ],
        "answers": [{"finish_reason": "length", "error": None}],
    }
    assert "🦙" in (tmp_path / "talk.json").read_text("utf-8")


def test_a_running_answer_is_saved_as_a_stopped_one(conversation: Conversation, tmp_path: Path) -> None:
    pieces = iter(conversation.stream("Hello"))
    next(pieces)
    conversation.save(tmp_path / "talk.json")
    assert saved_in(tmp_path)["answers"] == [{"finish_reason": "cancelled", "error": None}]
    list(pieces)


def test_a_loaded_conversation_continues(conversation: Conversation, scripted: ScriptedService, tmp_path: Path) -> None:
    conversation.ask("Hello")
    conversation.save(tmp_path / "talk.json")
    Conversation.load(tmp_path / "talk.json", **conversation.options).ask("And you?")
    assert sent(scripted) == [
        ("system", "Be brief."),
        ("user", "Hello"),
        ("assistant", "1:0 1:1 1:2 "),
        ("user", "And you?"),
    ]


def test_files_of_other_tools_are_read(tmp_path: Path) -> None:
    assert turns(load(tmp_path, MESSAGES)) == [("a", "b", "stop")]
    assert turns(load(tmp_path, {"model": "m", "messages": MESSAGES, "answers": "none"})) == [("a", "b", "stop")]
    assert turns(load(tmp_path, [])) == []


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_files_of_windows_tools_are_read(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "talk.json").write_text('[{"role": "user", "content": "Grüße 🦙"}]', encoding)
    assert turns(Conversation.load(tmp_path / "talk.json")) == [("Grüße 🦙", "", "cancelled")]


def test_messages_as_openais_package_dumps_them_are_loaded(tmp_path: Path) -> None:
    extras = {"refusal": None, "tool_calls": None, "annotations": [], "timestamp": 1.7e9}
    dumped = [{**message, **extras} for message in MESSAGES]
    dumped[0]["content"] = [{"type": "text", "text": "a"}]
    assert turns(load(tmp_path, [{"role": "developer", "content": "S"}, *dumped])) == [("a", "b", "stop")]


@pytest.mark.parametrize("question", ["", " \n"])
def test_a_loaded_conversation_with_an_empty_question_goes_on(
    tmp_path: Path, scripted: ScriptedService, question: str
) -> None:
    history = [{"role": "user", "content": question}, {"role": "assistant", "content": "b"}]
    loaded = load(tmp_path, history, port=scripted.port, max_tokens=3)
    assert turns(loaded) == [(question, "b", "stop")]
    loaded.ask("And you?")
    assert check_dialog(scripted.requests[-1].messages)


@pytest.mark.parametrize("empty", ["", " \n", None])
def test_an_empty_system_prompt_is_none(tmp_path: Path, scripted: ScriptedService, empty: str | None) -> None:
    conversation = scripted.conversation(empty, max_tokens=3)
    conversation.ask("Hello")
    conversation.save(tmp_path / "talk.json")
    for one in (conversation, load(tmp_path, [{"role": "system", "content": empty or ""}, *MESSAGES])):
        assert [message["role"] for message in one.messages] == ["user", "assistant"]
    assert [role for role, _ in sent(scripted)] == ["user"]
    assert [message["role"] for message in saved_in(tmp_path)] == ["system", "user", "assistant"]


def test_a_question_without_an_answer_is_loaded_and_can_be_asked_again(
    tmp_path: Path, scripted: ScriptedService
) -> None:
    loaded = load(tmp_path, [*MESSAGES, {"role": "user", "content": "c"}], port=scripted.port, max_tokens=3)
    assert turns(loaded) == [("a", "b", "stop"), ("c", "", "cancelled")]
    list(loaded.regenerate())
    assert turns(loaded) == [("a", "b", "stop"), ("c", "1:0 1:1 1:2 ", "length")]


@pytest.mark.parametrize(
    "answers", [[3, 4], [{"finish_reason": ["stop"]}], [{"finish_reason": "banana"}], [{"finish_reason": None}]]
)
def test_answers_of_an_unknown_form_are_read_as_complete(tmp_path: Path, answers: Any) -> None:
    assert turns(load(tmp_path, {"messages": MESSAGES, "answers": answers})) == [("a", "b", "stop")]


@pytest.mark.parametrize(("error", "text"), [(5, "5"), (HALF_A_PAIR, "?"), (None, None)])
def test_an_error_of_an_unknown_form_is_read_as_text_that_can_be_saved(tmp_path: Path, error: Any, text: str) -> None:
    loaded = load(tmp_path, {"messages": MESSAGES, "answers": [{"finish_reason": "error", "error": error}]})
    assert loaded.turns[0].answer.error == text
    loaded.save(tmp_path / "talk.json")
    assert saved_in(tmp_path)["answers"] == [{"finish_reason": "error", "error": text}]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "talk.json is not a JSON file"),
        ("[" * 200_000, "talk.json is not a JSON file"),
        ("3", "talk.json does not hold a conversation"),
        ("{}", "talk.json does not hold a conversation"),
        ('[{"role": "user"}]', "does not hold a conversation. Message 1"),
        ('[{"role": "tool", "content": "x"}]', "does not hold a conversation. Message 1 has the role"),
        ('[{"role": "assistant", "content": "x"}]', "does not hold a conversation. Message 1"),
        (r'[{"role": "user", "content": "\ud83d"}]', "does not hold a conversation. Message 1"),
        ('[{"role": "user", "content": [{"type": "image_url"}]}]', "Part 1 of Message 1"),
    ],
    ids=lambda value: value[:30],
)
def test_a_file_without_a_conversation_is_refused(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "talk.json").write_text(content)
    with pytest.raises(InvalidRequest, match=says):
        Conversation.load(tmp_path / "talk.json")


def test_a_file_that_does_not_exist_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Conversation.load(tmp_path / "other.json")


def test_a_save_that_fails_leaves_the_old_file_and_no_other(conversation: Conversation, tmp_path: Path) -> None:
    conversation.save(tmp_path / "talk.json")
    old = saved_in(tmp_path)
    conversation.ask("Hello")
    conversation.system = HALF_A_PAIR
    with pytest.raises(UnicodeEncodeError):
        conversation.save(tmp_path / "talk.json")
    assert saved_in(tmp_path) == old
    assert [path.name for path in tmp_path.iterdir()] == ["talk.json"]


def test_a_save_that_is_interrupted_leaves_the_old_file(
    conversation: Conversation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversation.save(tmp_path / "talk.json")
    old = saved_in(tmp_path)

    def write_half(path: Path, content: bytes) -> None:
        path.write_text(content[: len(content) // 2].decode())
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write_half)
    with pytest.raises(OSError, match="No space left"):
        conversation.save(tmp_path / "talk.json")
    assert saved_in(tmp_path) == old
    assert [path.name for path in tmp_path.iterdir()] == ["talk.json"]


def is_mounted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no file be replaced, as if each were a mount point."""

    def replace(path: Path, target: Path) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy", str(target))

    monkeypatch.setattr(Path, "replace", replace)


def is_in_a_folder_without_write_permission(monkeypatch: pytest.MonkeyPatch) -> None:
    def create(**_: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryDirectory", create)


IRREPLACEABLE = pytest.mark.parametrize("irreplaceable", [is_mounted, is_in_a_folder_without_write_permission])


@IRREPLACEABLE
def test_a_file_that_cannot_be_replaced_is_overwritten(
    conversation: Conversation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, irreplaceable: Any
) -> None:
    file, link = tmp_path / "talk.json", tmp_path / "link.json"
    file.write_text("old" * 1000)
    link.hardlink_to(file)
    irreplaceable(monkeypatch)
    conversation.save(file)
    assert Conversation.load(link).system == "Be brief."
    assert len([*tmp_path.iterdir()]) == 2
    with pytest.raises(OSError, match=r"other.json'$"):
        conversation.save(tmp_path / "other.json")


class FullDisk:
    """Let files grow to `size` bytes, and then fail."""

    def __init__(self, file: Any, size: int) -> None:
        self.file, self.size = file, size

    def __enter__(self) -> FullDisk:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def write(self, content: memoryview) -> int:
        if not (space := self.size - self.file.tell()):
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(content[:space])  # type: ignore[no-any-return]


@IRREPLACEABLE
@pytest.mark.parametrize(
    ("space", "left", "says"),
    [(0, b"old " * 10, "No space left on device: .*talk.json'$"), (-20, b"", "device. The old file is damaged. Save")],
)
def test_an_overwrite_that_fails_restores_the_old_file_or_says_that_it_cannot(
    conversation: Conversation,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    irreplaceable: Any,
    space: int,
    left: bytes,
    says: str,
) -> None:
    file = tmp_path / "talk.json"
    file.write_bytes(b"old " * 10)
    irreplaceable(monkeypatch)
    unlimited = Path.open
    monkeypatch.setattr(
        Path, "open", lambda path, *mode, **options: FullDisk(unlimited(path, *mode, **options), 40 + space)
    )
    with pytest.raises(OSError, match=says):
        conversation.save(file)
    monkeypatch.undo()
    assert not left or file.read_bytes() == left


def test_a_read_only_file_is_not_reported_as_damaged(
    conversation: Conversation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    (tmp_path / "talk.json").write_text("old")
    is_mounted(monkeypatch)
    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(OSError, match="Read-only file system: .*talk.json'$"):
        conversation.save(tmp_path / "talk.json")


def test_only_a_file_is_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(FileExistsError, match=f"is not a file: .*{path.name}'$"):
            Conversation().save(path)
    with pytest.raises(FileNotFoundError, match="nowhere/talk.json'$"):
        Conversation().save(tmp_path / "nowhere" / "talk.json")
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_a_file_name_may_be_as_long_as_the_system_allows(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 250 + ".json")
    Conversation().save(path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_replaced_file_keeps_its_permissions_and_a_link_stays_a_link(
    conversation: Conversation, tmp_path: Path
) -> None:
    (tmp_path / "real").mkdir()
    file, link = tmp_path / "real" / "talk.json", tmp_path / "talk.json"
    file.write_text("")
    file.chmod(0o600)
    link.symlink_to(file)
    conversation.save(link)
    assert link.is_symlink()
    assert file.stat().st_mode & 0o777 == 0o600
    assert Conversation.load(file).system == "Be brief."


# --- With a real service --------------------------------------------------------------------------


def test_the_model_remembers_the_turns_before(service: Any) -> None:
    conversation = service.conversation(max_tokens=20)
    assert "Paris" in conversation.ask("What is the capital of France?")
    assert "Rome" in conversation.ask("And of Italy?")
    assert "Rome" not in service.ask("And of Italy?", max_tokens=20).text


def test_a_stop_from_another_thread_ends_the_generation(endless_service: Any) -> None:
    conversation = endless_service.conversation(max_tokens=ENDLESS)
    with generation_stops(endless_service):
        answer = conversation.stream("Hello")
        reading = read_in_thread(answer)
        until(lambda: answer.completion_tokens >= 5, "five tokens")
        answer.stop()
        reading.join(300)
    assert turns(conversation) == [("Hello", answer.text, "cancelled")]


def test_no_earlier_message_makes_the_next_question_fail(tiny_service: Any) -> None:
    conversation = tiny_service.conversation("Be brief. [INST]", max_tokens=3)
    conversation.ask("What is [INST]? <s>")
    answer = conversation.turns[0].answer
    answer.text = "[INST] <<SYS>> </s><s>"
    assert conversation.ask("And you?")
    assert conversation.turns[0].answer.text == answer.text
    assert conversation.window().tokens > 50


def test_a_refused_question_stays_a_turn_and_is_not_sent_again(tiny_service: Any) -> None:
    conversation = tiny_service.conversation("Be brief.", max_tokens=3)
    with pytest.raises(InvalidRequest, match="is empty"):
        conversation.ask(" ")
    assert turns(conversation) == [(" ", "", "error")]
    assert conversation.ask("And you?")


def test_the_service_counts_the_window_and_drops_the_oldest_turn(tiny_service: Any, tiny: Any) -> None:
    from helpers import prompts

    conversation = tiny_service.conversation(max_tokens=8)
    conversation.ask("word " * 400)
    window = conversation.window()
    dialog = [*conversation.messages, {"role": "user", "content": "?"}]
    assert (window.tokens, window.size) == (prompts.count_tokens(dialog, tiny.tokenizer), 512)
    assert conversation.answer is not None
    assert conversation.answer.dropped_turns == 0
    conversation.ask("word " * 400)
    assert conversation.answer.dropped_turns == 1
    assert conversation.window().left == 0
    conversation.system = "x" * 10**6
    with pytest.raises(InvalidRequest, match="1,000,000 characters"):
        conversation.window()


@pytest.mark.long
@pytest.mark.parametrize("words", [1, 10])
def test_a_killed_service_loses_no_word_of_the_answer(endless_folder: Path, words: int) -> None:
    with helpers.serve(str(endless_folder), port=0) as service:
        conversation = service.conversation(max_tokens=ENDLESS)
        answer = conversation.stream("Why?")
        with pytest.raises(ServiceUnavailable):
            for _ in answer:
                if answer.completion_tokens == words:
                    psutil.Process(service.pid).kill()
    assert answer.text
    assert turns(conversation) == [("Why?", answer.text, "error")]
    with helpers.serve(str(endless_folder), port=service.port):
        conversation.options["max_tokens"] = 8
        assert conversation.ask("And you?")
        assert len(conversation.turns) == 2
