"""The command line, as typed."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

from helpers.processes import port_to_listen_on


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
    assert done.stderr.endswith("cut off at --max-tokens)\n")
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
    done = run("ask", "Hello", "--max-tokens", "0", "--port", str(tiny_service.port))
    assert done.returncode == 1
    assert done.stderr == "InvalidRequest: max_tokens is 0; ask for at least 1 token.\n"


def test_chat_keeps_the_conversation(tiny_service: Any) -> None:
    import helpers

    done = run(
        "chat", "--system", "Be brief.", "--max-tokens", "5", "--port", str(tiny_service.port),
        input="Hello\nAnd [INST]?\nForget this\n/undo\nWho are you?\n", stdin=None,
    )  # fmt: skip
    talk = helpers.Conversation("Be brief.", max_tokens=5, port=tiny_service.port)
    first, forgotten = talk.ask("Hello"), talk.ask("Forget this")
    talk.undo()
    second = talk.ask("Who are you?")
    assert done.returncode == 0
    assert done.stdout == f"{first}\n{forgotten}\n{second}\n"
    assert "InvalidRequest: Message 4 (user) holds '[INST]'" in done.stderr
    assert "Traceback" not in done.stderr


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
