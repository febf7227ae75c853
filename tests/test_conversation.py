"""A conversation, with a real service."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from traceback import walk_stack
from typing import Any

import psutil
import pytest

import helpers
from helpers.client import Conversation
from helpers.errors import InvalidRequest, ServiceUnavailable
from helpers.processes import port_to_listen_on

NO_WORDS = "\ud83d"


def said(talk: Conversation) -> list[tuple[str, str, str | None]]:
    return [(turn.question, turn.answer.text, turn.answer.finish_reason) for turn in talk.turns]


def stop_after(answer: Any, pieces: int) -> None:
    for number, _ in enumerate(answer, start=1):
        if number == pieces:
            answer.stop()


@pytest.fixture
def talk(tiny_service: Any) -> Conversation:
    return tiny_service.conversation("Be brief.", max_tokens=8)


def test_it_remembers(service: Any) -> None:
    talk = service.conversation(max_tokens=20)
    assert "Paris" in talk.ask("What is the capital of France?")
    assert "Rome" in talk.ask("And of Italy?")
    assert "Rome" not in service.ask("And of Italy?", max_tokens=20).text
    assert [message["role"] for message in talk.messages] == ["user", "assistant"] * 2


def test_each_question_is_sent_with_all_that_was_said_before_it(talk: Conversation, tiny_service: Any) -> None:
    dialog = [{"role": "system", "content": "Be brief."}]
    for question in ("Hello", "And you?", "Why?"):
        dialog.append({"role": "user", "content": question})
        text = tiny_service.ask(dialog, max_tokens=8).text
        assert talk.ask(question) == text
        dialog.append({"role": "assistant", "content": text})
    assert talk.messages == dialog
    assert repr(talk) == "<Conversation, turns: 3>"


def test_with_an_event_loop_it_is_the_same(talk: Conversation) -> None:
    expected = [talk.ask("Hello"), talk.ask("And you?")]
    other = talk.fork(0)

    async def converse() -> list[str]:
        return [await other.aask("Hello"), "".join([piece async for piece in other.stream("And you?")])]

    assert asyncio.run(converse()) == expected
    assert said(other) == said(talk)


def test_a_stopped_answer_stays_as_what_it_is_and_the_talk_goes_on(talk: Conversation, tiny_service: Any) -> None:
    alone = tiny_service.ask("Hello", system="Be brief.", max_tokens=400)
    whole = alone.text
    talk.options["max_tokens"] = 400
    answer = talk.stream("Hello")
    stop_after(answer, 3)
    part = answer.text
    assert answer.prompt_tokens == alone.prompt_tokens
    assert part and len(part) < len(whole) and whole.startswith(part)
    assert said(talk) == [("Hello", part, "cancelled")]
    talk.options["max_tokens"] = 8
    next_one = talk.ask("And you?")
    assert next_one == tiny_service.ask(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": part},
            {"role": "user", "content": "And you?"},
        ],
        max_tokens=8,
    ).text


def test_leaving_the_loop_is_a_stop(talk: Conversation) -> None:
    for _ in talk.stream("Hello"):
        break
    assert [(question, reason) for question, _, reason in said(talk)] == [("Hello", "cancelled")]

    async def leave() -> None:
        async for _ in talk.stream("And you?"):
            break

    asyncio.run(leave())
    assert [(question, reason) for question, _, reason in said(talk)] == [("Hello", "cancelled"), ("And you?", "cancelled")]


def test_a_stop_from_another_thread_ends_the_generation_within_a_step(service: Any) -> None:
    talk = service.conversation(max_tokens=490)
    before = service.info().steps
    answer = talk.stream("Hello")
    several, ended = threading.Event(), threading.Event()

    def read() -> None:
        for number, _ in enumerate(answer):
            if number == 5:
                several.set()
        ended.set()

    threading.Thread(target=read).start()
    assert several.wait(60)
    answer.stop()
    assert ended.wait(60)
    while service.info().live:
        pass
    # one step for the prompt, at most one that was under way, and a token that nobody has taken from the wire
    assert service.info().steps - before <= answer.completion_tokens + 2 < 400
    assert said(talk) == [("Hello", answer.text, "cancelled")]


@pytest.fixture
def silent(tiny_service: Any) -> Iterator[list[psutil.Process]]:
    """Nothing comes from the service, until its processes are resumed."""
    processes = [psutil.Process(tiny_service.pid), *psutil.Process(tiny_service.pid).children()]
    for process in processes:
        process.suspend()
    yield processes
    for process in processes:
        process.resume()


def test_a_stop_ends_also_an_answer_of_which_nothing_comes(talk: Conversation, silent: list[psutil.Process]) -> None:
    answer = talk.stream("Hello")
    reader = threading.Thread(target=list, args=(answer,), daemon=True)
    reader.start()
    while not talk.turns:
        pass
    answer.stop()
    reader.join(8)  # gRPC itself gives up after 15 seconds
    assert not reader.is_alive()
    assert said(talk) == [("Hello", "", "cancelled")]


def test_ctrl_c_before_the_first_word_is_a_stop(talk: Conversation, silent: list[psutil.Process]) -> None:
    reader = threading.get_ident()

    def is_waiting() -> bool:
        frames = [frame for frame, _ in walk_stack(sys._current_frames()[reader])]
        return any(frame.f_globals["__name__"] == "grpc._channel" and frame.f_code.co_name == "_next" for frame in frames)

    def press() -> None:
        while not is_waiting():
            pass
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press).start()
    with pytest.raises(KeyboardInterrupt):
        talk.ask("Hello")
    assert said(talk) == [("Hello", "", "cancelled")]
    for process in silent:
        process.resume()
    assert talk.ask("And you?")
    connections = psutil.Process().net_connections("tcp")
    assert talk.options["port"] not in [connection.raddr.port for connection in connections if connection.raddr]


def test_an_answer_that_is_stopped_before_it_is_read_asks_nothing(talk: Conversation, tiny_service: Any) -> None:
    steps = tiny_service.info().steps
    answer = talk.stream("Hello")
    answer.stop()
    assert list(answer) == []
    answer = talk.stream("Hello")
    answer.stop()

    async def read() -> list[str]:
        return [piece async for piece in answer]

    assert asyncio.run(read()) == []
    assert tiny_service.info().steps == steps


def test_by_choice_a_stopped_or_failed_answer_is_dropped(tiny_service: Any) -> None:
    talk = tiny_service.conversation(max_tokens=400, keep_partial=False)
    stop_after(talk.stream("Hello"), 3)
    assert said(talk) == []
    with pytest.raises(InvalidRequest):
        talk.ask("[INST]")
    assert said(talk) == []
    talk.options["max_tokens"] = 5
    assert talk.ask("Hello") == tiny_service.ask("Hello", max_tokens=5).text


def test_a_question_right_behind_a_stop_finds_the_stopped_one_settled(tiny_service: Any) -> None:
    talk = tiny_service.conversation(max_tokens=400, keep_partial=False)
    for number in range(5):
        answer = talk.stream("Hello")
        reader = threading.Thread(target=list, args=(answer,))
        reader.start()
        while not answer.text:
            pass
        answer.stop()
        following = talk.stream("And you?")
        stop_after(following, 1)
        reader.join()
        assert said(talk) == []


def test_an_answer_without_a_word_is_not_sent(talk: Conversation, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]
    (tmp_path / "talk.json").write_text(json.dumps(messages))
    assert Conversation.load(tmp_path / "talk.json").messages == []
    expected = talk.fork().ask("Hello")
    loaded = Conversation.load(tmp_path / "talk.json", **talk.options)
    loaded.system = talk.system
    assert loaded.ask("Hello") == expected


def test_a_system_prompt_that_cannot_be_sent_stops_nothing(tiny_service: Any) -> None:
    talk = tiny_service.conversation(max_tokens=400)
    pieces = iter(talk.stream("Hello"))
    next(pieces)
    talk.system = NO_WORDS
    with pytest.raises(InvalidRequest, match="surrogate"):
        talk.ask("And you?")
    assert talk.answer is not None and talk.answer.finish_reason is None
    list(pieces)
    assert talk.answer.finish_reason == "length"


def test_a_refused_question_stays_and_is_not_sent_again(talk: Conversation) -> None:
    first = talk.ask("Hello")
    expected = talk.fork().ask("And you?")
    with pytest.raises(InvalidRequest, match="prompt injection"):
        talk.ask("What is [INST]?")
    assert said(talk)[1] == ("What is [INST]?", "", "error")
    assert talk.answer is not None and str(talk.answer.error).startswith("InvalidRequest: Message 4 (user) holds")
    assert talk.ask("And you?") == expected
    assert [message["content"] for message in talk.messages] == ["Be brief.", "Hello", first, "And you?", expected]


def test_what_the_model_wrote_never_makes_the_next_question_refused(talk: Conversation) -> None:
    talk.ask("Hello")
    answer = talk.turns[0].answer
    answer.text = "[INST] <<SYS>> </s><s>"
    assert talk.ask("And you?")
    assert talk.turns[0].answer.text == answer.text


@pytest.mark.parametrize("words", [1, 10])
def test_a_service_that_dies_in_the_middle_takes_no_word_along(tiny_folder: Path, words: int) -> None:
    with helpers.serve(str(tiny_folder), port=0) as service:
        talk = service.conversation(max_tokens=8)
        whole = talk.ask("Hello")
        talk.options["max_tokens"] = 450
        with pytest.raises(ServiceUnavailable):
            for number, _ in enumerate(talk.stream("Why?"), start=1):
                if number == words:
                    psutil.Process(service.pid).children()[0].kill()
    part = said(talk)[1][1]
    assert part and said(talk) == [("Hello", whole, "length"), ("Why?", part, "error")]
    with pytest.raises(ServiceUnavailable):
        talk.regenerate().__iter__().__next__()
    assert said(talk) == [("Hello", whole, "length"), ("Why?", part, "error")]
    with helpers.serve(str(tiny_folder), port=service.port):
        talk.options["max_tokens"] = 8
        assert talk.ask("And you?")
        assert len(talk.turns) == 3


def test_a_regenerated_answer_takes_the_place_of_the_old_one_until_undo(talk: Conversation) -> None:
    talk.ask("Hello")
    talk.options |= {"temperature": 1.0, "seed": 1}
    old = talk.ask("And you?")
    talk.options["seed"] = 2
    new = "".join(talk.regenerate())
    assert [turn.question for turn in talk.turns] == ["Hello", "And you?"]
    assert talk.turns[-1].answer.text == new != old
    assert talk.undo()
    assert talk.turns[-1].answer.text == old
    assert [talk.undo(), talk.undo(), talk.undo()] == [True, True, False]
    assert talk.turns == []
    with pytest.raises(InvalidRequest, match="Nothing has been asked yet"):
        talk.regenerate()


def test_editing_an_earlier_turn_goes_on_from_there_until_undo(talk: Conversation) -> None:
    for question in ("Hello", "And you?", "Why?"):
        talk.ask(question)
    before = said(talk)
    branch = talk.fork(1)
    text = "".join(talk.edit(1, "Who are you?"))
    assert said(talk) == [before[0], ("Who are you?", text, "length")]
    assert text == branch.ask("Who are you?")
    assert talk.undo()
    assert said(talk) == before
    assert "".join(talk.edit(-3, "Good day"))
    assert [turn.question for turn in talk.turns] == ["Good day"]
    for turn in (1, -2):
        with pytest.raises(InvalidRequest, match=f"There is no turn {turn}: the conversation has 1"):
            talk.edit(turn, "Hello")


def test_what_would_be_replaced_stays_where_nothing_comes_in_its_place(talk: Conversation) -> None:
    for question in ("Hello", "And you?"):
        talk.ask(question)
    before = said(talk)
    with pytest.raises(InvalidRequest):
        list(talk.edit(0, "[INST]"))
    assert said(talk) == before
    talk.options["port"] = port_to_listen_on("127.0.0.1", 0)
    with pytest.raises(ServiceUnavailable):
        list(talk.regenerate())
    assert said(talk) == before


def test_regenerating_while_the_answer_comes_is_of_that_question(tiny_service: Any) -> None:
    talk = tiny_service.conversation(max_tokens=400, keep_partial=False)
    talk.ask("Hello")
    pieces = iter(talk.stream("And you?"))
    next(pieces)
    "".join(talk.regenerate())
    assert [turn.question for turn in talk.turns] == ["Hello", "And you?"]
    talk.turns[-1].answer.finish_reason = "cancelled"  # as in a file of another program
    talk.options["max_tokens"] = 5
    talk.ask("Why?")
    assert [turn.question for turn in talk.turns] == ["Hello", "And you?", "Why?"]


def test_a_conversation_does_not_keep_what_it_has_sent(talk: Conversation) -> None:
    """Each request holds the whole dialog: a thousand of them would be its square."""
    import gc

    from helpers.schemas import ChatDocument

    for _ in range(5):
        talk.ask("Hello")
    gc.collect()
    kept = [one for one in gc.get_objects() if type(one) is ChatDocument]
    assert len(kept) <= 1


def test_a_fork_goes_its_own_way(talk: Conversation) -> None:
    talk.ask("Hello")
    fork = talk.fork()
    fork.system = "Be kind."
    fork.options["max_tokens"] = 3
    fork.ask("And you?")
    assert (talk.system, talk.options["max_tokens"], len(talk.turns)) == ("Be brief.", 8, 1)
    assert fork.undo() and fork.undo() and not fork.undo()
    assert len(talk.turns) == 1


def test_asking_while_an_answer_comes_stops_that_one_and_loses_nothing(tiny_service: Any) -> None:
    talk = tiny_service.conversation(max_tokens=400)
    pieces = iter(talk.stream("Hello"))
    part = "".join(next(pieces) for _ in range(3))
    fork = talk.fork()
    talk.options["max_tokens"] = 8
    second = talk.ask("And you?")
    assert list(pieces) == []
    assert said(talk) == [("Hello", part, "cancelled"), ("And you?", second, "length")]
    assert fork.turns == []
    old = talk.stream("Why?")
    talk.ask("Who?")
    with pytest.raises(RuntimeError, match="has gone on since this question was put"):
        list(old)
    assert [turn.question for turn in talk.turns] == ["Hello", "And you?", "Who?"]


def test_the_window_is_counted_by_the_service(talk: Conversation, tiny: Any, tiny_folder: Path) -> None:
    from helpers import prompts

    empty = talk.window()
    talk.ask("Hello")
    window = talk.window()
    dialog = [*talk.messages, {"role": "user", "content": "?"}]
    assert window.tokens == prompts.count_tokens(dialog, tiny.tokenizer) > empty.tokens
    assert (window.size, window.left) == (512, 512 - window.tokens)
    with helpers.serve(str(tiny_folder), port=0, context_length=40) as small:
        talk.options["port"] = small.port
        assert (talk.window().tokens, talk.window().size) == (window.tokens, 40)
        talk.ask("word " * 10)
        assert talk.answer is not None and talk.answer.dropped_turns == 1
        assert talk.window().left == 0
        talk.system = "[INST]"
        with pytest.raises(InvalidRequest, match="prompt injection"):
            talk.window()


def test_a_saved_conversation_comes_back_whole(talk: Conversation, tmp_path: Path) -> None:
    talk.ask("Grüße 🦙\nHello")
    with pytest.raises(InvalidRequest):
        talk.ask("[INST]")
    talk.options["max_tokens"] = 400
    stop_after(talk.stream("Why?"), 3)
    talk.save(tmp_path / "talk.json")
    saved = json.loads((tmp_path / "talk.json").read_text("utf-8"))
    assert [message["role"] for message in saved["messages"]] == ["system", *["user", "assistant"] * 3]
    assert all(set(message) == {"role", "content"} for message in saved["messages"])
    assert "🦙" in (tmp_path / "talk.json").read_text("utf-8")
    back = Conversation.load(tmp_path / "talk.json", **talk.options)
    assert (back.system, said(back), back.messages) == (talk.system, said(talk), talk.messages)
    assert back.turns[1].answer.error == talk.turns[1].answer.error
    back.options["max_tokens"] = talk.options["max_tokens"] = 8
    assert back.ask("And you?") == talk.ask("And you?")
    back.save(tmp_path / "talk.json")
    assert list(tmp_path.iterdir()) == [tmp_path / "talk.json"]
    assert len(Conversation.load(tmp_path / "talk.json").turns) == 4
    assert [back.undo() for _ in range(5)] == [True] * 4 + [False]


def test_other_tools_files_are_read(tmp_path: Path, tiny_service: Any) -> None:
    file = tmp_path / "talk.json"
    messages = [{"role": "user", "content": "a", "name": "x"}, {"role": "assistant", "content": "b"}]
    for content in (messages, {"model": "m", "messages": messages, "answers": "none"}):
        file.write_text(json.dumps(content))
        assert said(Conversation.load(file)) == [("a", "b", "stop")]
    file.write_text(json.dumps([*messages, {"role": "user", "content": "c"}]))
    talk = Conversation.load(file, port=tiny_service.port, max_tokens=3)
    assert said(talk) == [("a", "b", "stop"), ("c", "", "cancelled")]
    assert "".join(talk.regenerate())
    for strange in ([3, 4], [{"finish_reason": ["stop"]}], [{"finish_reason": "banana"}], [{"finish_reason": None}]):
        file.write_text(json.dumps({"messages": messages, "answers": strange}))
        assert said(Conversation.load(file)) == [("a", "b", "stop")]
    file.write_text(json.dumps({"messages": messages, "answers": [{"finish_reason": "error", "error": 5}]}))
    assert Conversation.load(file).turns[0].answer.error == "5"
    file.write_text("[]")
    assert Conversation.load(file).turns == []


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "talk.json is no JSON file"),
        ("[" * 200_000, "talk.json is no JSON file"),
        ("3", "A dialog is a list of messages, and this is a int"),
        ("{}", "A dialog is a list of messages, and this is a NoneType"),
        ('[{"role": "user"}]', "Message 1 is not a dict whose"),
        ('[{"role": "tool", "content": "x"}]', "Message 1 has the unknown role"),
        ('[{"role": "assistant", "content": "x"}]', "out of turn"),
    ],
)
def test_a_file_that_holds_no_conversation_is_refused(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "talk.json").write_text(content)
    with pytest.raises(InvalidRequest, match=says):
        Conversation.load(tmp_path / "talk.json")
    with pytest.raises(FileNotFoundError):
        Conversation.load(tmp_path / "other.json")


def test_a_file_that_cannot_be_written_leaves_the_old_one(talk: Conversation, tmp_path: Path) -> None:
    talk.save(tmp_path / "talk.json")
    old = (tmp_path / "talk.json").read_bytes()
    talk.ask("Hello")
    talk.system = NO_WORDS
    with pytest.raises(UnicodeEncodeError):
        talk.save(tmp_path / "talk.json")
    assert (tmp_path / "talk.json").read_bytes() == old
    for no_file in (tmp_path, tmp_path / "nowhere" / "talk.json"):
        with pytest.raises(OSError, match=rf"{no_file.name}'$"):
            Conversation().save(no_file)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileExistsError, match="is no file"):
        Conversation().save(tmp_path / "pipe")
    Conversation().save(tmp_path / ("n" * 250 + ".json"))
    assert sorted(path.name[:4] for path in tmp_path.iterdir()) == ["nnnn", "pipe", "talk"]


def test_a_file_keeps_its_mode_and_its_place(talk: Conversation, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    file, link = tmp_path / "real" / "talk.json", tmp_path / "talk.json"
    file.write_text("")
    file.chmod(0o600)
    link.symlink_to(file)
    talk.save(link)
    assert link.is_symlink() and file.stat().st_mode & 0o777 == 0o600
    assert Conversation.load(file).system == "Be brief."


def test_options_that_do_not_fit_are_told_at_once() -> None:
    with pytest.raises(TypeError, match="max_token"):
        Conversation(max_token=3)
    with pytest.raises(InvalidRequest, match="max_tokens"):
        Conversation(max_tokens="many")
    talk = Conversation()
    with pytest.raises(InvalidRequest, match="half of a surrogate pair"):
        talk.ask(NO_WORDS)
    assert talk.turns == []
