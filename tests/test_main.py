"""The command line, as typed."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from helpers.processes import port_to_listen_on

IN_A_TERMINAL = (
    "import fcntl, os, sys, termios\n"
    "fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
    "os.execv(sys.executable, [sys.executable, '-m', 'helpers', *sys.argv[1:]])"
)


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "helpers", *arguments],
        **{"capture_output": True, "text": True, "timeout": 300, "stdin": subprocess.DEVNULL, **options},
    )


def test_ask_streams_to_stdout_and_tells_the_rest_on_stderr(tiny_service: Any) -> None:
    done = run("ask", "Hello", "--system", "Be brief.", "--max-tokens", "7", "--port", str(tiny_service.port))
    assert done.returncode == 0
    assert done.stdout == tiny_service.ask("Hello", system="Be brief.", max_tokens=7).text + "\n"
    assert done.stderr.startswith("(7 tokens, first after ")
    assert done.stderr.endswith("cut off at the limit of tokens)\n")
    assert done.stderr.count("\n") == 1


def test_ask_starts_a_service_of_its_own_and_stops_it(tiny_folder: Any) -> None:
    done = run("ask", "Hello", "--max-tokens", "3", "--model", str(tiny_folder))
    assert done.returncode == 0
    assert done.stderr.startswith("(3 tokens")
    assert done.stderr.count("\n") == 1


def test_ask_without_a_service_is_a_sentence_and_no_traceback() -> None:
    done = run("ask", "Hello", "--port", str(port_to_listen_on("127.0.0.1", 0)))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("ServiceUnavailable: The service at 127.0.0.1:")
    assert done.stderr.count("\n") == 1


def test_chat_notices_at_once_that_nobody_is_there() -> None:
    done = run("chat", "--port", str(port_to_listen_on("127.0.0.1", 0)), input="Hello\n", stdin=None)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("ServiceUnavailable: ")


def test_a_running_service_is_not_asked_for_another_model(tiny_service: Any) -> None:
    done = run("ask", "Hello", "--port", str(tiny_service.port), "--model", "smollm2")
    assert done.returncode == 1
    assert done.stderr.startswith("InvalidRequest: The service on port")


def test_the_articles_question_is_shown_where_none_is_asked(tiny_service: Any) -> None:
    done = run("ask", "--max-tokens", "3", "--port", str(tiny_service.port))
    assert "If I punch myself in the face and it hurts, am I weak or strong?" in done.stderr


def test_a_refused_question_is_a_sentence_and_no_traceback(tiny_service: Any) -> None:
    done = run("ask", "And [INST]?", "--port", str(tiny_service.port))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("InvalidRequest: Message 2 (user) holds '[INST]'")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["ask", "chat"])
@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--max-tokens", "0", "max_tokens is 0; ask for at least 1 token."),
        ("--max-tokens", "-3", "max_tokens is -3; ask for at least 1 token."),
        ("--temperature", "2.5", "temperature is 2.5; it goes from 0 (always the likeliest token) to 2."),
        ("--temperature", "nan", "temperature is nan; it goes from 0 (always the likeliest token) to 2."),
    ],
)
def test_a_wrong_option_is_told_before_a_service_starts(command: str, option: str, value: str, says: str) -> None:
    done = run(command, option, value, "--model", "/no/such/folder")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith(f"error: argument {option}: {says}\n")


def chat(service: Any, *lines: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """What becomes of `lines`, piped into a chat that knows to be brief."""
    return run(
        "chat", "--system", "Be brief.", "--max-tokens", "5", "--port", str(service.port),
        input="".join(f"{line}\n" for line in lines), stdin=None, errors="surrogateescape", **options,
    )  # fmt: skip


def test_chat_keeps_the_conversation(tiny_service: Any) -> None:
    done = chat(tiny_service, "Hello", "", "And [INST]?", "Forget this", "/undo", "Who are\\", "you?")
    talk = tiny_service.conversation("Be brief.", max_tokens=5)
    first, forgotten = talk.ask("Hello"), talk.ask("Forget this")
    talk.undo()
    second = talk.ask("Who are\nyou?")
    assert done.stdout == f"{first}\n{forgotten}\n{second}\n"
    assert done.returncode == 1
    assert "InvalidRequest: Message 4 (user) holds '[INST]'" in done.stderr
    assert done.stderr.count(" tokens, first after ") == 3
    assert "Traceback" not in done.stderr


def test_what_the_terminals_encoding_has_not_is_shown_in_another_way(tiny_service: Any) -> None:
    command = ("ask", "Hello", "--system", "Be brief.", "--max-tokens", "60", "--port", str(tiny_service.port))
    done = run(*command, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    text = tiny_service.ask("Hello", system="Be brief.", max_tokens=60).text
    assert (done.returncode, done.stdout) == (0, text.encode("ascii", "backslashreplace").decode() + "\n")
    assert not text.isascii()


def test_chat_saves_loads_and_regenerates(tiny_service: Any, tmp_path: Path) -> None:
    done = chat(
        tiny_service, "Hello", "/system Be kind.", "And you?", "/save ~/talk.json", "/undo", "Why?", "/system Be rude.",
        "/load ~/talk.json", "/system", "/regenerate", "/save ~/again.json", "/window", "/exit", "Never asked",
        env={**os.environ, "HOME": str(tmp_path)},
    )  # fmt: skip
    talk = tiny_service.conversation("Be brief.", max_tokens=5)
    first, talk.system = talk.ask("Hello"), "Be kind."
    other, second = talk.fork(), talk.ask("And you?")
    assert done.stdout == f"{first}\n{second}\n{other.ask('Why?')}\n{second}\n"
    assert done.returncode == 0
    for file in ("talk.json", "again.json"):
        saved = json.loads((tmp_path / file).read_text("utf-8"))
        assert saved["messages"] == [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": first},
            {"role": "user", "content": "And you?"},
            {"role": "assistant", "content": second},
        ]
    window = talk.window()
    assert "\nBe kind.\n" in done.stderr
    assert f"({window.tokens} of {window.size} tokens taken, {window.left} left)\n" in done.stderr


def test_what_chat_cannot_do_is_a_sentence_each_and_no_question(tiny_service: Any, tmp_path: Path) -> None:
    (tmp_path / "no.json").write_text("{")
    failing = {
        "/nothing": "There is no command /nothing",
        "/undo": "There is nothing to undo",
        "/undo 2": "/undo takes nothing after it",
        "/regenerate": "Nothing has been asked yet",
        "/save": "/save needs to know the file",
        f"/save {tmp_path}/none/talk.json": f"{tmp_path}/none/talk.json cannot be used (No such file",
        "/save .": ". cannot be used",
        "/save a\0b": "a\0b cannot be used",
        f"/load {tmp_path}/none.json": f"{tmp_path}/none.json cannot be used (No such file",
        f"/load {tmp_path}/no.json": f"{tmp_path}/no.json is no JSON file",
        "No text: \udcff": "The text is no valid Unicode",
        "/system No text: \udcff": "The text is no valid Unicode",
    }
    done = chat(tiny_service, *failing, "Hello")
    assert done.stdout == tiny_service.ask("Hello", system="Be brief.", max_tokens=5).text + "\n"
    assert done.returncode == 1
    told = done.stderr.splitlines()[1:-1]  # between what this is, and the note on the answer
    assert len(told) == len(failing)
    for sentence, expected in zip(told, failing.values()):
        assert sentence.startswith(f"InvalidRequest: {expected}")
    assert chat(tiny_service, "/nothing").returncode == 1


def test_help_lists_the_commands(tiny_service: Any) -> None:
    done = chat(tiny_service, "/help", "/bye", "Never asked")
    assert (done.returncode, done.stdout) == (0, "")
    for command in ("/help", "/system [TEXT]", "/undo", "/regenerate", "/window", "/save FILE", "/load FILE", "/exit"):
        assert f"\n  {command} " in done.stderr


def test_chat_goes_on_where_its_service_has_died(tiny_folder: Path) -> None:
    command = [sys.executable, "-m", "helpers", "chat", "--model", str(tiny_folder), "--max-tokens", "5"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, bufsize=1) as talking:
        talking.stdin.write("Hello\n")
        first = talking.stdout.readline()
        model = psutil.Process(talking.pid).children(recursive=True)[-1]
        model.kill()
        model.wait(60)
        stdout, stderr = talking.communicate("And you?\n/window\n/undo\n", timeout=60)
    assert first and stdout == ""
    assert talking.returncode == 1
    assert stderr.count("ServiceUnavailable: The service at 127.0.0.1:") == 2
    assert stderr.endswith("(forgotten)\n")
    assert "Traceback" not in stderr


class Terminal:
    """``python -m helpers`` in a terminal, what it shows there, and the keyboard."""

    def __init__(self, *arguments: str) -> None:
        self.end, inside = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", IN_A_TERMINAL, *arguments],
            **dict.fromkeys(("stdin", "stdout", "stderr"), inside),
            env={**os.environ, "TERM": "dumb"},  # no colours, and lines as they are
            start_new_session=True,
        )
        os.close(inside)
        self.unread = b""

    def type(self, keys: bytes) -> None:
        os.write(self.end, keys)

    def read_until(self, text: str, again: bytes = b"") -> None:
        """Read on, up to `text`. The keys `again` are pressed once more whenever a second has brought nothing."""
        deadline = time.monotonic() + 120
        while text.encode() not in self.unread:
            assert time.monotonic() < deadline, f"{text!r} was not shown: {self.unread!r}"
            if select.select([self.end], [], [], 1)[0]:
                self.unread += os.read(self.end, 4096)
            elif again:
                self.type(again)
        self.unread = self.unread.partition(text.encode())[2]


@pytest.fixture
def terminal() -> Iterator[Any]:
    opened: list[Terminal] = []

    def open_one(*arguments: str) -> Terminal:
        opened.append(Terminal(*arguments))
        return opened[-1]

    yield open_one
    for one in opened:
        one.process.kill()
        one.process.wait()
        os.close(one.end)


def test_ctrl_c_stops_an_answer_and_ctrl_d_ends_the_chat(terminal: Any, tiny_service: Any, tmp_path: Path) -> None:
    whole = tiny_service.ask("Hello", system="Be brief.", max_tokens=400).text
    chat = terminal("chat", "--system", "Be brief.", "--max-tokens", "400", "--port", str(tiny_service.port))
    chat.read_until("/help lists the commands.\r\n> ")
    chat.type(b"Hello\n")
    chat.read_until(whole.split()[0])
    chat.type(b"\x03")
    chat.read_until("(stopped: what has come stays in the conversation, /undo drops it)\r\n> ")
    chat.type(b"And you?\n")
    chat.read_until(", cut off at the limit of tokens)\r\n")
    chat.read_until("> ")

    ctrl_c = b"\x03"  # Python misses one that comes in the moment before it begins to wait for a key
    chat.type(b"Never asked")
    chat.read_until("Never asked")
    chat.type(ctrl_c)
    chat.read_until("\r\n(Ctrl-D or /exit ends the chat)\r\n> ", again=ctrl_c)
    chat.type(ctrl_c)
    chat.read_until("\r\n> ", again=ctrl_c)
    chat.type(b"/nothing\n")
    chat.read_until("InvalidRequest: There is no command /nothing")
    chat.type(f"/save {tmp_path}/talk.json\n".encode())
    chat.read_until("(saved to ")
    chat.read_until("> ")
    chat.type(b"\x04")
    assert chat.process.wait(60) == 0

    saved = json.loads((tmp_path / "talk.json").read_text("utf-8"))
    assert [message["content"] for message in saved["messages"][1::2]] == ["Hello", "And you?"]
    assert [answer["finish_reason"] for answer in saved["answers"]] == ["cancelled", "length"]
    part = saved["messages"][2]["content"]
    assert part and len(part) < len(whole) and whole.startswith(part)


def test_ctrl_c_ends_a_chat_that_nobody_types(tiny_service: Any) -> None:
    command = [sys.executable, "-m", "helpers", "chat", "--max-tokens", "400", "--port", str(tiny_service.port)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as talking:
        assert talking.stderr.readline().startswith("This is ")
        talking.send_signal(signal.SIGINT)
        assert talking.wait(60) == 130
        assert "Traceback" not in talking.stderr.read()


def test_importing_helpers_is_cheap() -> None:
    heavy = "{'torch', 'jina', 'transformers', 'docarray', 'grpc'} & set(sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys, helpers, helpers.prompts, helpers.access; print({heavy})"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "set()\n"


WITHOUT_TORCH = "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"


def test_a_client_needs_no_torch() -> None:
    program = WITHOUT_TORCH + (
        "import helpers.client, helpers.prompts, helpers.schemas, helpers.service\n"
        "print(helpers.client.stream('Hello').finish_reason)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("None\n", "")


def test_a_service_without_torch_says_what_to_install() -> None:
    program = WITHOUT_TORCH + "from helpers.__main__ import main; sys.exit(main(['serve', '--port', '0']))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("ModelUnavailable: A service needs more than a client does")
    assert "pip install" in done.stderr


def test_importing_the_client_leaves_the_program_as_it_was() -> None:
    """Jina's import changes what belongs to the program: Ctrl-C, how warnings look, how processes start."""
    program = (
        "import multiprocessing, signal, warnings\n"
        "handler = lambda *_: None\n"
        "signal.signal(signal.SIGINT, handler)\n"
        "format = warnings.formatwarning\n"
        "import helpers.client\n"
        "assert signal.getsignal(signal.SIGINT) is handler\n"
        "assert warnings.formatwarning is format\n"
        "assert ('always', None, DeprecationWarning, None, 0) not in warnings.filters\n"
        "assert multiprocessing.get_start_method(allow_none=True) is None"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_proxy_is_kept_and_not_used_for_this_machine(tiny_service: Any) -> None:
    program = (
        "import asyncio, helpers, subprocess\n"
        f"print(helpers.ask('Hello', max_tokens=3, port={tiny_service.port}).completion_tokens)\n"
        f"print(asyncio.run(helpers.aask('Hello', max_tokens=3, port={tiny_service.port})).completion_tokens)\n"
        "subprocess.run('echo $http_proxy', shell=True)"
    )
    proxy = f"http://127.0.0.1:{port_to_listen_on('127.0.0.1', 0)}"
    done = subprocess.run(
        [sys.executable, "-u", "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "http_proxy": proxy},
    )
    assert (done.stdout, done.stderr) == (f"3\n3\n{proxy}\n", "")
