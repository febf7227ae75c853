"""The chat, with lines from a pipe and with a person at a terminal."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from eventually import until
from helpers.chat import converse
from helpers.errors import InvalidRequest, ServiceUnavailable
from scripted_service import ScriptedService, failed, tokens


class Piped:
    """The result of lines that were piped into a chat: its exit status and its output."""

    def __init__(self, status: int, stdout: str, stderr: str) -> None:
        self.status, self.stdout, self.stderr = status, stdout, stderr
        self.greeting, *self.notes = stderr.splitlines()


class Typist(io.BytesIO):
    """A stdin that delivers a line whenever one is read. A function among the lines is called when it is its turn."""

    def __init__(self, lines: Sequence[str | Callable[[], None]]) -> None:
        super().__init__()
        self._lines = iter(lines)

    def read1(self, size: int | None = -1, /) -> bytes:
        for line in self._lines:
            if isinstance(line, str):
                return f"{line}\n".encode("utf-8", "surrogateescape")
            line()
        return b""


@pytest.fixture
def pipe(scripted: ScriptedService, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Chat with the scripted service: ``pipe(*lines)`` returns the result."""

    def chat(*lines: str | Callable[[], None]) -> Piped:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(Typist(lines), encoding="utf-8"))
        status = converse(scripted.conversation("Be brief.", max_tokens=2))
        return Piped(status, *capsys.readouterr())

    return chat


Pipe = Callable[..., Piped]


def test_answers_go_to_stdout_and_the_rest_to_stderr(pipe: Pipe) -> None:
    chat = pipe("Hello", "", "And you?")
    assert chat.stdout == "1:0 1:1 \n2:0 2:1 \n"
    assert chat.greeting == (
        "This is scripted. Ctrl-C stops an answer, Ctrl-D ends the chat, /help lists the commands."
    )
    assert len(chat.notes) == 2
    assert all(re.fullmatch(r"\(2 tokens, first after .* s, .* cut off at max_tokens\)", note) for note in chat.notes)
    assert chat.status == 0


def test_each_question_is_sent_with_the_turns_before_it(pipe: Pipe, scripted: ScriptedService) -> None:
    pipe("Hello", "And you?")
    assert [message["content"] for message in scripted.requests[-1].messages] == [
        "Be brief.",
        "Hello",
        "1:0 1:1 ",
        "And you?",
    ]


def test_a_line_that_ends_in_a_backslash_continues_in_the_next(pipe: Pipe, scripted: ScriptedService) -> None:
    pipe("Who are\\", "you?", "And\\")
    assert [request.messages[-1]["content"] for request in scripted.requests] == ["Who are\nyou?", "And"]


PATH = "/etc/passwd holds what?"


@pytest.mark.parametrize("question", [PATH, "// what is this comment?", "/* and this? */", "//", "/5 of 10?", "/a/b"])
def test_a_path_or_a_comment_is_a_question(pipe: Pipe, scripted: ScriptedService, question: str) -> None:
    assert pipe(question).status == 0
    assert [request.messages[-1]["content"] for request in scripted.requests] == [question]


@pytest.mark.parametrize("question", ["/usr holds what?", "/exit is which command?", "Hello"])
def test_a_line_that_begins_with_a_space_is_a_question(pipe: Pipe, scripted: ScriptedService, question: str) -> None:
    assert pipe(f" {question}").status == 0
    assert [request.messages[-1]["content"] for request in scripted.requests] == [question]


def test_a_byte_order_mark_is_no_part_of_the_first_question(pipe: Pipe, scripted: ScriptedService) -> None:
    pipe("\ufeffHello")
    assert scripted.requests[0].messages[-1]["content"] == "Hello"


def test_a_failed_answer_is_one_line_and_the_status_and_the_chat_continues(
    pipe: Pipe, scripted: ScriptedService
) -> None:
    def recover() -> None:
        scripted.script = scripted.count_up

    scripted.script = scripted.fail
    chat = pipe("Hello", recover, "And you?")
    assert chat.stdout == "Half an \n2:0 2:1 \n"
    assert chat.notes[0] == "InvalidRequest: The question is refused. Ask another one."
    assert chat.status == 1


def test_a_failure_before_the_first_word_prints_no_empty_line(pipe: Pipe, scripted: ScriptedService) -> None:
    scripted.script = scripted.refuse
    assert pipe("Hello").stdout == ""


def test_if_no_service_answers_the_chat_does_not_begin(pipe: Pipe, scripted: ScriptedService) -> None:
    scripted.stop()
    with pytest.raises(ServiceUnavailable, match=f"127.0.0.1:{scripted.port} does not answer"):
        pipe("Hello")


def test_the_chat_continues_if_its_service_is_gone(pipe: Pipe, scripted: ScriptedService) -> None:
    chat = pipe("Hello", scripted.stop, "And you?", "/window", "/undo")
    assert chat.stdout == "1:0 1:1 \n"
    assert [note.partition(" at ")[0] for note in chat.notes[1:3]] == ["ServiceUnavailable: The service"] * 2
    assert chat.notes[3:] == ["(the turn is removed)"]
    assert chat.status == 1


# --- Commands -------------------------------------------------------------------------------------


@pytest.mark.parametrize("leave", ["/exit", "/quit", "/bye"])
def test_a_command_ends_the_chat(pipe: Pipe, scripted: ScriptedService, leave: str) -> None:
    assert pipe(leave, "Never asked").status == 0
    assert scripted.requests == []


def test_help_lists_the_commands(pipe: Pipe) -> None:
    chat = pipe("/help")
    names = ["/help", "/system [TEXT]", "/undo", "/regenerate", "/window", "/save FILE", "/load FILE", "/exit"]
    assert [re.split("  +", note.strip())[0] for note in chat.notes[:-1]] == names
    assert (chat.status, chat.stdout) == (0, "")


def test_system_shows_and_replaces_the_system_prompt(pipe: Pipe, scripted: ScriptedService) -> None:
    chat = pipe("/system", "/system Be kind.", "/system", "Hello")
    assert chat.notes[:3] == ["Be brief.", "(the system prompt is set, from the next question on)", "Be kind."]
    assert scripted.requests[0].messages[0]["content"] == "Be kind."


def test_an_empty_text_in_quotation_marks_removes_the_system_prompt(pipe: Pipe, scripted: ScriptedService) -> None:
    chat = pipe('/system ""', "/system", "Hello")
    assert chat.notes[:2] == [
        "(the system prompt is removed, from the next question on)",
        "(there is no system prompt)",
    ]
    assert [message["role"] for message in scripted.requests[0].messages] == ["user"]


def test_undo_removes_the_latest_turn_or_brings_back_the_previous_answer(pipe: Pipe, scripted: ScriptedService) -> None:
    chat = pipe("Hello", "/regenerate", "/undo", "/undo", "And you?")
    assert [note for note in chat.notes if "tokens" not in note] == [
        "(the previous answer is back)",
        "(the turn is removed)",
    ]
    assert [message["content"] for message in scripted.requests[-1].messages] == ["Be brief.", "And you?"]


def test_regenerate_asks_the_latest_question_again(pipe: Pipe, scripted: ScriptedService) -> None:
    chat = pipe("Hello", "/regenerate")
    assert chat.stdout == "1:0 1:1 \n2:0 2:1 \n"
    assert scripted.requests[0].messages == scripted.requests[1].messages


def test_window_shows_how_much_of_the_context_is_used(pipe: Pipe) -> None:
    assert pipe("/window").notes == ["(30 of 512 tokens used, 482 left)"]


def test_a_saved_conversation_is_loaded_with_its_system_prompt(
    pipe: Pipe, scripted: ScriptedService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    chat = pipe(
        "/system Be kind.", "Hello", "/save ~/talk.json", "/undo", "/system Be rude.", "/load ~/talk.json", "And you?"
    )
    assert f"(saved to {tmp_path}/talk.json)" in chat.notes
    assert "(loaded, turns: 1)" in chat.notes
    saved = json.loads((tmp_path / "talk.json").read_text("utf-8"))
    assert [message["content"] for message in saved["messages"]] == ["Be kind.", "Hello", "1:0 1:1 "]
    assert scripted.requests[-1].messages == [*saved["messages"], {"role": "user", "content": "And you?"}]
    assert scripted.requests[-1].max_tokens == 2


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("'my talk.json'", "my talk.json"),
        ('"my talk.json"', "my talk.json"),
        ("my\\ talk.json", "my talk.json"),
        ("my talk.json", "my talk.json"),
        ("it's.json", "it's.json"),
        ('"a" b', '"a" b'),
    ],
)
def test_a_file_may_be_quoted_as_in_a_shell(
    pipe: Pipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: str, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    chat = pipe("Hello", f"/save {typed}", f"/load {typed}")
    assert chat.notes[1:] == [f"(saved to {name})", "(loaded, turns: 1)"]
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_file_whose_name_has_quotation_marks_comes_first(
    pipe: Pipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / '"a"').touch()
    assert pipe('/save "a"').notes == ['(saved to "a")']


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/nothing", "There is no command /nothing. Type /help for a list, or begin a question with a space."),
        ("/usr holds what?", "There is no command /usr. Type /help"),
        ("/ what?", "There is no command /. Type /help"),
        ("/undo", "There is nothing to undo"),
        ("/undo 2", "/undo takes no argument. Leave '2' out."),
        ("/regenerate", "Nothing has been asked yet"),
        ("/save", "/save needs a file. Type /save FILE."),
        ('/save ""', "/save needs a file. Type /save FILE."),
        ("/save {tmp}/none/talk.json", "{tmp}/none/talk.json cannot be used (No such file"),
        ("/save {tmp}", "{tmp} cannot be used (exists, and is not a file)"),
        ("/save a\0b", "a\0b cannot be used"),
        ("/load {tmp}/none.json", "{tmp}/none.json cannot be used (No such file"),
        ("/load {tmp}/broken.json", "{tmp}/broken.json is not a JSON file"),
        ("Not text: \udcff", "The text contains the byte 0xff, which is not text in utf-8. Set PYTHONIOENCODING "),
        ("/system Not text: \udcff", "The text contains the byte 0xff, which is not text in utf-8."),
    ],
    ids=lambda value: value[:20].encode("ascii", "replace"),
)
def test_what_the_chat_cannot_do_is_one_line_and_the_chat_continues(
    pipe: Pipe, scripted: ScriptedService, tmp_path: Path, line: str, says: str
) -> None:
    (tmp_path / "broken.json").write_text("{")
    chat = pipe(line.replace("{tmp}", str(tmp_path)), "Hello")
    assert chat.notes[0].startswith("InvalidRequest: " + says.replace("{tmp}", str(tmp_path)))
    assert len(chat.notes) == 2  # the other is the summary of the answer
    assert chat.stdout == "1:0 1:1 \n"
    assert chat.status == 1
    assert [message["content"] for message in scripted.requests[0].messages] == ["Be brief.", "Hello"]


# --- A process of its own: a pipe and a terminal --------------------------------------------------


@pytest.mark.main
def test_ctrl_c_ends_a_chat_that_reads_a_pipe(scripted: ScriptedService) -> None:
    command = [sys.executable, "-m", "helpers", "chat", "--port", str(scripted.port)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as chat:
        assert chat.stderr is not None
        assert chat.stderr.readline().startswith("This is scripted.")
        for _ in range(10):  # again, because Python misses a Ctrl-C in the moment before it waits for a line
            chat.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                chat.wait(30)
                break
        assert chat.returncode == 130
        assert "Traceback" not in chat.stderr.read()


@pytest.mark.long
def test_a_chat_goes_on_after_its_own_service_has_died(tiny_folder: Path) -> None:
    command = [sys.executable, "-m", "helpers", "chat", "--model", str(tiny_folder), "--max-tokens", "5"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, bufsize=1) as chat:
        assert chat.stdin is not None
        assert chat.stdout is not None
        chat.stdin.write("Hello\n")
        first = chat.stdout.readline()
        (service,) = psutil.Process(chat.pid).children(recursive=True)
        service.kill()
        until(lambda: service.status() == psutil.STATUS_ZOMBIE, "the service has ended")  # the chat is its parent
        stdout, stderr = chat.communicate("And you?\n/window\n/undo\n", timeout=300)
    assert first
    assert stdout == ""
    assert chat.returncode == 1
    assert stderr.count("ServiceUnavailable: The service at 127.0.0.1:") == 2
    assert stderr.endswith("(the turn is removed)\n")
    assert "Traceback" not in stderr
    service.wait(300)


class Terminal:
    """``python -m helpers`` in a terminal, what it shows there, and the keyboard."""

    START = (
        "import fcntl, os, sys, termios\n"
        "fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
        "os.execv(sys.executable, [sys.executable, '-m', 'helpers', *sys.argv[1:]])"
    )

    def __init__(self, *arguments: str, start: str = START, **streams: Any) -> None:
        self.keyboard, inside = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", start, *arguments],
            **{"stdin": inside, "stdout": inside, "stderr": inside, **streams},
            env={**os.environ, "TERM": "dumb"},  # no colours, and lines as they are
            start_new_session=True,
        )
        os.close(inside)
        self._unread = b""

    def type(self, keys: str) -> None:
        os.write(self.keyboard, keys.encode())

    def read_until(self, text: str, keys: str = "") -> None:
        """Press `keys` and read up to `text`. Press them again if nothing comes, because Python misses a Ctrl-C in
        the moment before it waits for a key."""
        self.type(keys)
        deadline = time.monotonic() + 300
        while text.encode() not in self._unread:
            assert time.monotonic() < deadline, f"{text!r} was never shown: {self._unread!r}"
            if select.select([self.keyboard], [], [], 10)[0]:
                self._unread += os.read(self.keyboard, 4096)
            else:
                self.type(keys)
        self._unread = self._unread.partition(text.encode())[2]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.keyboard)


CTRL_C, CTRL_D = "\x03", "\x04"


@pytest.fixture
def terminal(scripted: ScriptedService) -> Iterator[Terminal]:
    """A terminal with a chat that waits for the first question."""
    options = ["--system", "Be brief.", "--max-tokens", "2", "--port", str(scripted.port)]
    with contextlib.closing(Terminal("chat", *options)) as opened:
        opened.read_until("/help lists the commands.\r\n> ")
        yield opened


@pytest.mark.main
def test_ctrl_c_stops_an_answer_and_the_chat_continues(
    terminal: Terminal, scripted: ScriptedService, tmp_path: Path
) -> None:
    scripted.script = scripted.half
    terminal.type("Hello\n")
    terminal.read_until("Half an ")
    terminal.type(CTRL_C)
    terminal.read_until("(stopped: its text stays in the conversation, /undo removes it)\r\n> ")
    scripted.script = scripted.count_up
    terminal.type("And you?\n")
    terminal.read_until("2:0 2:1 \r\n(2 tokens, ")
    terminal.read_until("> ")
    terminal.type(f"/save {tmp_path}/talk.json\n")
    terminal.read_until("(saved to ")
    saved = json.loads((tmp_path / "talk.json").read_text("utf-8"))
    assert [message["content"] for message in saved["messages"][1:]] == ["Hello", "Half an ", "And you?", "2:0 2:1 "]
    assert [answer["finish_reason"] for answer in saved["answers"]] == ["cancelled", "length"]


@pytest.mark.main
def test_ctrl_c_before_the_first_word_is_a_stop_too(terminal: Terminal, scripted: ScriptedService) -> None:
    scripted.script = scripted.silence
    terminal.type("Hello\n")
    until(lambda: scripted.requests, "the request arrives")
    terminal.read_until("(stopped before the first word)\r\n> ", keys=CTRL_C)


@pytest.mark.main
def test_ctrl_c_at_the_prompt_clears_the_line_and_ctrl_d_ends_the_chat(
    terminal: Terminal, scripted: ScriptedService
) -> None:
    terminal.type("Never asked")
    terminal.read_until("Never asked")
    terminal.read_until("\r\n(Ctrl-D or /exit ends the chat)\r\n> ", keys=CTRL_C)
    terminal.read_until("\r\n> ", keys=CTRL_C)
    terminal.type("/nothing\n")
    terminal.read_until("InvalidRequest: There is no command /nothing")
    terminal.read_until("> ")
    terminal.type(CTRL_D)
    assert terminal.process.wait(300) == 0
    assert scripted.requests == []


@pytest.mark.main
def test_control_characters_of_an_answer_and_an_error_are_shown_as_text(
    terminal: Terminal, scripted: ScriptedService
) -> None:
    scripted.script = lambda _: iter([*tokens("a\x1b", "]0;title\x07\x9b"), failed(InvalidRequest("No \x1b[2J. Go."))])
    terminal.type("Hello\n")
    terminal.read_until("a\\x1b]0;title\\x07\\x9b\r\nInvalidRequest: No \\x1b[2J. Go.\r\n> ")


@pytest.mark.main
def test_tab_completes_a_command(terminal: Terminal) -> None:
    terminal.type("/wi\t\n")
    terminal.read_until("(30 of 512 tokens used, 482 left)")


@pytest.mark.main
def test_a_long_line_and_tab_arrive_while_the_answers_go_into_a_file(scripted: ScriptedService, tmp_path: Path) -> None:
    with (tmp_path / "answers.txt").open("w") as answers:
        options = ["--max-tokens", "1", "--port", str(scripted.port)]
        with contextlib.closing(Terminal("chat", *options, stdout=answers)) as terminal:
            terminal.read_until("/help lists the commands.\r\n> ")
            terminal.type("x" * 5000 + "\n")
            terminal.read_until("(1 tokens, ")
            terminal.read_until("> ")
            terminal.type("/wi\t\n")
            terminal.read_until("(30 of 512 tokens used, 482 left)")
            terminal.read_until("> ")
            terminal.type(CTRL_D)
            assert terminal.process.wait(300) == 0
    assert (tmp_path / "answers.txt").read_text() == "1:0 \n"
    assert scripted.requests[0].messages[-1]["content"] == "x" * 5000


@pytest.mark.main
def test_a_long_line_without_readline_is_refused(scripted: ScriptedService) -> None:
    start = Terminal.START.replace("'-m', 'helpers'", "'-c', sys.argv.pop(1)")
    program = "import sys; sys.modules['readline'] = None\nfrom helpers.__main__ import main; sys.exit(main())"
    options = ["--max-tokens", "1", "--port", str(scripted.port)]
    with contextlib.closing(Terminal(program, "chat", *options, start=start)) as terminal:
        terminal.read_until("/help lists the commands.\r\n> ")
        terminal.type("x" * 5000 + "\n")
        terminal.read_until("bytes, and the terminal cuts longer lines. Send the text from a file: < FILE.\r\n> ")
        terminal.type("Hello\n")
        terminal.read_until("1:0 ")
    assert [request.messages[-1]["content"] for request in scripted.requests] == ["Hello"]
