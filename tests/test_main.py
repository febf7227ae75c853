"""The command line, as typed."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

from helpers.processes import free_port


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
    done = run("ask", "Hello", "--port", str(free_port("127.0.0.1")))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("ServiceUnavailable: The service at 127.0.0.1:")
    assert done.stderr.count("\n") == 1


def test_a_refused_question_is_a_sentence_and_no_traceback(tiny_service: Any) -> None:
    done = run("ask", "Hello", "--max-tokens", "0", "--port", str(tiny_service.port))
    assert done.returncode == 1
    assert done.stderr == "InvalidRequest: max_tokens is 0; ask for at least 1 token.\n"


def test_chat_keeps_the_conversation(tiny_service: Any) -> None:
    import helpers

    done = run(
        "chat", "--system", "Be brief.", "--max-tokens", "5", "--port", str(tiny_service.port),
        input="Hello\nAnd [INST]?\nWho are you?\n", stdin=None,
    )  # fmt: skip
    talk = helpers.Conversation("Be brief.", max_tokens=5, port=tiny_service.port)
    first, second = talk.ask("Hello"), talk.ask("Who are you?")
    assert done.returncode == 0
    assert done.stdout == f"{first}\n{second}\n"
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


def test_a_client_needs_no_torch() -> None:
    """With torch and transformers out of reach the client's modules import, and `serve` says what is missing."""
    program = (
        "import sys\n"
        "sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "import helpers.client, helpers.prompts, helpers.schemas, helpers.service\n"
        "print(helpers.client.stream('Hello').finish_reason)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("None\n", "")
