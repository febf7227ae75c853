"""The command line, as typed. Most tests call `main` in this process."""

from __future__ import annotations

import io
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers.__main__ import main
from helpers.catalog import INSTALL_LAB
from helpers.errors import InvalidRequest
from helpers.options import EngineArgs
from helpers.prompts import QUESTION, SYSTEM_PROMPT
from scripted_service import ScriptedService, failed, last, tokens


@pytest.fixture
def no_service(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if the command starts a service."""

    def start(*_: Any, **__: Any) -> None:
        raise AssertionError("a service was started")

    monkeypatch.setattr("helpers.service.Service", start)
    monkeypatch.setattr("helpers.server.run", start)


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "helpers", *arguments],
        **{"capture_output": True, "text": True, "stdin": subprocess.DEVNULL, "timeout": 600, **options},
    )


def test_ask_streams_the_answer_to_stdout_and_its_summary_to_stderr(
    scripted: ScriptedService, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ask", "Hello", "--max-tokens", "3", "--port", str(scripted.port)]) == 0
    stdout, stderr = capsys.readouterr()
    assert stdout == "1:0 1:1 1:2 \n"
    assert stderr.startswith("(3 tokens, first after ")
    assert stderr.endswith("cut off at max_tokens)\n")
    assert stderr.count("\n") == 1


def test_ask_sends_the_options(scripted: ScriptedService) -> None:
    options = ["--system", "Be brief.", "--max-tokens", "3", "--temperature", "0.5"]
    assert main(["ask", "Hello", *options, "--port", str(scripted.port)]) == 0
    (request,) = scripted.requests
    assert [message["content"] for message in request.messages] == ["Be brief.", "Hello"]
    assert (request.max_tokens, request.temperature) == (3, 0.5)


def test_without_a_question_it_asks_the_articles_and_shows_it(
    scripted: ScriptedService, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ask", "--max-tokens", "3", "--port", str(scripted.port)]) == 0
    assert f"The article's question: {QUESTION}\n" in capsys.readouterr().err
    assert [message["content"] for message in scripted.requests[0].messages] == [SYSTEM_PROMPT, QUESTION]


@pytest.mark.parametrize("arguments", [(), ("-",)])
def test_a_piped_question_is_asked(
    scripted: ScriptedService, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("What is it?\n"))
    assert main(["ask", *arguments, "--port", str(scripted.port)]) == 0
    assert scripted.requests[0].messages[-1]["content"] == "What is it?"


def test_a_question_on_the_command_line_leaves_stdin_alone(
    scripted: ScriptedService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("not a question\n"))
    assert main(["ask", "Hello", "--port", str(scripted.port)]) == 0
    assert scripted.requests[0].messages[-1]["content"] == "Hello"
    assert sys.stdin.read() == "not a question\n"


@pytest.mark.parametrize(("arguments", "piped"), [((), ""), (("-",), "\n \n"), (("",), "unused"), ((" ",), "unused")])
def test_an_empty_question_is_refused_before_a_service_starts(
    arguments: tuple[str, ...],
    piped: str,
    no_service: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(piped))
    assert main(["ask", *arguments]) == 1
    refused = "InvalidRequest: The question is empty. Write it after ask, or pipe it into ask."
    printed = capsys.readouterr()
    assert (printed.out, printed.err.splitlines()[-1]) == ("", refused)


@pytest.mark.parametrize("question", ["-how are you?", "-how", "-5+3=?", "--port=22 means what?", "--what?"])
def test_a_question_that_begins_with_a_dash_is_asked_after_two_dashes(
    question: str, scripted: ScriptedService, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        main(["ask", question, "--port", str(scripted.port)])
    assert refused.value.code == 2
    assert capsys.readouterr().err.endswith("\nIf a text begins with a dash, write it after --, or as --option=text.\n")
    assert main(["ask", "--port", str(scripted.port), "--system=-x", "--", question]) == 0
    assert [message["content"] for message in scripted.requests[0].messages] == ["-x", question]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["ask", "What", "is", "it"], "ask: error: unrecognized arguments: is it. Put the question in quotes. --help"),
        (["ask", "--tokens", "5"], "ask: error: unrecognized arguments: --tokens. Put"),
        (["check", "it"], "check: error: unrecognized arguments: it. --help lists the options."),
        (["ask", "--max-tokens", "-x"], "ask: error: argument --max-tokens: expected one argument"),
    ],
)
def test_unknown_arguments_are_refused_with_what_to_do(
    arguments: list[str], says: str, no_service: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        main(arguments)
    assert refused.value.code == 2
    usage, _, error = capsys.readouterr().err.partition("python -m helpers ")[2].partition("python -m helpers ")
    assert usage
    assert error.startswith(says)
    assert ("begins with a dash" in error) == ("-x" in arguments)


def test_arguments_that_are_not_text_are_refused_before_a_service_starts(
    no_service: None, capsys: pytest.CaptureFixture[str]
) -> None:
    says = "contains the byte 0xfc, which is not text in utf-8. Write it in UTF-8."
    assert main(["ask", "Gr\udcfc\udcdfe"]) == 1
    assert capsys.readouterr().err == f"InvalidRequest: The question {says}\n"
    for command in ("ask", "chat"):
        with pytest.raises(SystemExit):
            main([command, "--system", "Gr\udcfc\udcdfe"])
        assert f"argument --system: The system prompt {says}\n" in capsys.readouterr().err


def test_an_empty_system_prompt_sends_none(scripted: ScriptedService) -> None:
    assert main(["ask", "Hello", "--system", "", "--port", str(scripted.port)]) == 0
    assert scripted.requests[0].messages == [{"role": "user", "content": "Hello"}]


@pytest.mark.parametrize("is_terminal", [True, False])
def test_control_characters_of_an_error_are_text_on_a_terminal_only(
    scripted: ScriptedService,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    is_terminal: bool,
) -> None:
    scripted.script = lambda _: iter([failed(InvalidRequest("No \x1b[2J. Go."))])
    monkeypatch.setattr("sys.stderr.isatty", lambda: is_terminal)
    assert main(["ask", "Hello", "--port", str(scripted.port)]) == 1
    shown = "\\x1b" if is_terminal else "\x1b"
    assert capsys.readouterr().err == f"InvalidRequest: No {shown}[2J. Go.\n"


def test_a_refused_question_is_one_line_on_stderr(
    scripted: ScriptedService, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted.script = scripted.refuse
    assert main(["ask", "Hello", "--port", str(scripted.port)]) == 1
    assert capsys.readouterr() == ("", "InvalidRequest: The question is refused. Ask another one.\n")


@pytest.mark.parametrize("command", ["ask", "chat"])
def test_without_a_service_on_the_port_the_failure_is_one_line(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        assert main([command, "--system", "", "--port", str(unused.getsockname()[1])]) == 1
    stdout, stderr = capsys.readouterr()
    assert stdout == ""
    assert stderr.splitlines()[-1].startswith("ServiceUnavailable: The service at 127.0.0.1:")


def test_a_running_service_is_not_asked_for_another_model(
    scripted: ScriptedService, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ask", "Hello", "--port", str(scripted.port), "--model", "smollm2"]) == 1
    assert capsys.readouterr().err.startswith(f"InvalidRequest: The service on port {scripted.port} runs its own model")
    assert scripted.requests == []


@pytest.mark.parametrize("command", ["ask", "chat"])
@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--max-tokens", "0", "max_tokens is 0. Ask for at least 1 token."),
        ("--max-tokens", "many", "invalid int value: 'many'"),
        ("--temperature", "2.5", "temperature is 2.5. Choose a value from 0"),
        ("--temperature", "nan", "temperature is nan. Choose a value from 0"),
        ("--port", "0", "0 is not a port."),
    ],
)
def test_a_wrong_request_option_is_refused_before_a_service_starts(
    command: str, option: str, value: str, says: str, no_service: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        main([command, option, value])
    assert refused.value.code == 2
    assert f"helpers {command}: error: argument {option}: {says}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("--max-num-seqs=0", "max_num_seqs is 0. Choose at least 1."),
        ("--max-queue-size=-1", "max_queue_size is -1. Choose at least 0."),
        ("--context-length=1", "context_length is 1. Choose at least 2"),
        ("--cache-memory=0", "cache_memory is 0. Choose at least 1 byte."),
    ],
)
def test_a_wrong_engine_limit_is_refused_before_the_service_starts(
    option: str, says: str, no_service: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        main(["serve", option])
    assert refused.value.code == 2
    assert f"helpers serve: error: {says}" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["ask", "chat", "serve"])
def test_an_unknown_precision_is_refused_before_a_service_starts(
    command: str, no_service: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--precision", "fp8"]) == 1
    assert "InvalidRequest: 'fp8' is not a precision." in capsys.readouterr().err


def test_serve_hands_its_options_to_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, Any]] = []
    monkeypatch.setattr("helpers.server.run", lambda *arguments, **options: calls.append((arguments, options)))
    words = "serve --model m --precision bf16 --host 0.0.0.0 --port 0 --max-num-seqs 4 --cache-memory 5000"
    assert main([*words.split(), "--parent", "7", "--log", "service.log"]) == 0
    ((arguments, options),) = calls
    assert arguments == ("m", "bf16")
    assert options == {
        "host": "0.0.0.0",
        "port": 0,
        "engine_args": EngineArgs(max_num_seqs=4, cache_memory=5000),
        "grace": 8,
        "parent": 7,
        "log": Path("service.log"),
        "companion": None,
    }


def test_check_prints_the_table_and_its_status_is_whether_a_model_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from helpers.checks import CheckResult

    for ok, status in ((True, 0), (False, 1)):
        result = CheckResult(ok, "Model", "smollm2", "Free some memory.")
        monkeypatch.setattr("helpers.checks.check", lambda result=result: [result])
        assert main(["check"]) == status
        assert "smollm2" in capsys.readouterr().out


def test_the_help_of_every_command_names_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    for command, options in [
        ("ask", ["--model", "--precision", "--system", "--max-tokens", "--temperature", "--port"]),
        ("serve", ["--host", "--port", "--context-length", "--max-num-seqs", "--max-queue-size", "--cache-memory"]),
    ]:
        with pytest.raises(SystemExit) as shown:
            main([command, "--help"])
        assert shown.value.code == 0
        help = capsys.readouterr().out
        assert all(option in help for option in options)
        assert "--parent" not in help


# --- A process of its own -------------------------------------------------------------------------


@pytest.mark.main
def test_ask_starts_a_service_and_stops_it(tiny_folder: Path) -> None:
    done = run("ask", "Hello", "--max-tokens", "3", "--model", str(tiny_folder))
    assert done.returncode == 0
    assert done.stdout.strip()
    assert done.stderr.startswith("(3 tokens")
    assert done.stderr.count("\n") == 1


@pytest.mark.main
def test_text_that_the_terminal_cannot_encode_is_shown_in_another_way(scripted: ScriptedService) -> None:
    scripted.script = lambda request: iter([*tokens("Grüße 🦙"), last("stop")])
    done = run("ask", "Hello", "--port", str(scripted.port), env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stdout) == (0, "Gr\\xfc\\xdfe \\U0001f999\n")


@pytest.mark.main
def test_a_closed_pipe_ends_the_command_without_a_traceback(scripted: ScriptedService) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as closed:
        done = run(
            "ask", "Hello", "--port", str(scripted.port), capture_output=False, stdout=closed, stderr=subprocess.PIPE
        )
    assert (done.returncode, done.stderr) == (1, "")


GREETING = "This is scripted. Ctrl-C stops an answer, Ctrl-D ends the chat, /help lists the commands.\n"


@pytest.mark.main
@pytest.mark.parametrize(
    ("command", "closed", "stdout"),
    [
        ("ask", "<&-", "1:0 \n"),
        ("chat", "2>&-", "1:0 \n"),
        ("ask Hello", "<&- >&- 2>&-", ""),
    ],
)
def test_a_closed_stream_is_like_the_null_device(
    scripted: ScriptedService, command: str, closed: str, stdout: str
) -> None:
    line = f"{sys.executable} -m helpers {command} --max-tokens 1 --port {scripted.port} {closed}"
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, input="Hello\n", timeout=600)
    assert (done.returncode, done.stdout) == (0, stdout)
    assert "Traceback" not in done.stderr


@pytest.mark.main
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", ["ask Hello --port {}", "chat --port {}", "check", "check --help"])
def test_a_full_disk_is_one_line(scripted: ScriptedService, command: str, unbuffered: str) -> None:
    if (command, unbuffered) == ("check --help", "1"):
        pytest.skip("argparse itself ignores it")
    line = f"{sys.executable} -m helpers {command.format(scripted.port)} >/dev/full"
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, input="Hello\n", env=environment)
    assert done.returncode == 1
    assert done.stderr.removeprefix(GREETING) == (
        "HelpersError: The output cannot be written (No space left on device). "
        "Free some space, or send the output to another place.\n"
    )


@pytest.mark.main
@pytest.mark.parametrize(("command", "status"), [("ask Hello --port {}", 0), ("ask --port 0", 2), ("ask --port 1", 1)])
def test_a_full_disk_for_the_notes_changes_nothing(scripted: ScriptedService, command: str, status: int) -> None:
    line = f"{sys.executable} -m helpers {command.format(scripted.port)} 2>/dev/full"
    assert subprocess.run(["sh", "-c", line], stdout=-1, stdin=-3, timeout=600).returncode == status


@pytest.mark.main
@pytest.mark.parametrize("command", ["ask Hello", "chat"])
def test_our_packages_work_when_warnings_are_errors(scripted: ScriptedService, command: str) -> None:
    done = run(
        *command.split(),
        *("--max-tokens", "1", "--port", str(scripted.port)),
        env={**os.environ, "PYTHONWARNINGS": "error"},
        stdin=None,
        input="Hello\n/window\n",
    )
    assert (done.returncode, done.stdout) == (0, "1:0 \n"), done.stderr


@pytest.mark.main
def test_a_service_starts_when_warnings_are_errors(tiny_folder: Path) -> None:
    environment = {**os.environ, "PYTHONWARNINGS": "error"}
    done = run("ask", "Hello", "--max-tokens", "3", "--model", str(tiny_folder), env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.main
def test_a_notebook_runs_the_commands_without_a_traceback(scripted: ScriptedService, tmp_path: Path) -> None:
    nbclient = pytest.importorskip("nbclient", reason=INSTALL_LAB)
    nbformat = pytest.importorskip("nbformat", reason=INSTALL_LAB)
    commands = ["check", f"ask --max-tokens 1 --port {scripted.port}", "ask --port 1", "ask --max-tokens 0"]
    commands.append(f"chat --port {scripted.port}")
    cells = [nbformat.v4.new_code_cell(f"%run -m helpers {command}") for command in commands]
    notebook = nbformat.v4.new_notebook(cells=cells)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = ["".join(output.text for output in cell.outputs) for cell in notebook.cells]
    assert "[ok] Python" in shown[0]
    assert "1:0 \n" in shown[1] and "The article's question" in shown[1]
    assert "ServiceUnavailable: The service at 127.0.0.1:1" in shown[2]
    assert "max_tokens is 0" in shown[3]
    assert "This notebook cannot read input. Show a helpers.ChatBox instead." in shown[4]
    assert not [text for text in shown if "Traceback" in text or "SystemExit" in text]


def test_importing_the_command_line_is_cheap() -> None:
    program = (
        "import sys\n"
        "import helpers, helpers.__main__, helpers.answer, helpers.checks, helpers.model_choice, helpers.options\n"
        "import helpers.prompts, helpers.service\n"
        "print({'torch', 'jina', 'transformers', 'docarray', 'grpc'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_a_service_is_started_before_the_client_is_imported() -> None:
    """The imports of both processes take seconds, so both import at the same time."""
    program = (
        "import sys, helpers.service\n"
        "def start(*arguments, **options):\n"
        "    print({'jina', 'docarray', 'grpc'} & set(sys.modules))\n"
        "    sys.exit()\n"
        "helpers.service.serve = start\n"
        "from helpers.__main__ import main\n"
        "main([sys.argv[1]])"
    )
    for command in ("ask", "chat"):
        done = subprocess.run([sys.executable, "-c", program, command], capture_output=True, text=True, check=True)
        assert done.stdout == "set()\n"


def test_a_service_without_torch_says_what_to_install() -> None:
    program = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from helpers.__main__ import main; sys.exit(main(['serve', '--port', '0']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("ModelUnavailable: A service needs more packages than a client")
    assert "pip install" in done.stderr
