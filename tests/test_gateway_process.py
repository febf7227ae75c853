"""The gateway as a process: ``python -m helpers gateway``, ``serve --http``, and how they stop."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from background_program import Program
from eventually import until
from helpers.__main__ import main
from helpers.gateway import server
from helpers.gateway.options import SECONDS_TO_STOP
from helpers.processes import is_listening
from scripted_service import ScriptedService

KEY = "a-key-of-some-length"
CHAT: dict[str, Any] = {"model": "scripted", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3}
Script = Callable[..., Program]


def url_of(program: Program) -> str:
    """Return the address that a gateway prints when it listens."""
    found = re.search(r"(https?://\S+)/v1", program.wait_for("OpenAI's API on"))
    assert found is not None
    return found[1]


def start_gateway(script: Script, service: ScriptedService, *options: str, **more: Any) -> Program:
    return script("-m", "helpers", "gateway", "--service", f"127.0.0.1:{service.port}", "--port=0", *options, **more)


def test_a_gateway_runs_alone_in_front_of_a_service(script: Script, scripted: ScriptedService, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"ada {KEY}\n")
    program = start_gateway(script, scripted, "--keys", str(tmp_path / "keys"), "--cors", "https://example.org")
    url = url_of(program)
    assert httpx.post(f"{url}/v1/chat/completions", json=CHAT).status_code == 401
    headers = {"authorization": f"Bearer {KEY}", "origin": "https://example.org"}
    response = httpx.post(f"{url}/v1/chat/completions", json=CHAT, headers=headers)
    assert response.json()["choices"][0]["message"]["content"] == "1:0 1:1 1:2 "
    assert response.headers["access-control-allow-origin"] == "https://example.org"
    assert "server" not in response.headers
    program.process.send_signal(signal.SIGTERM)
    assert program.process.wait(60) == 0
    log = program.log.read_text()
    assert f"id={response.headers['x-request-id']} key=ada" in log
    assert KEY not in log and "Hello" not in log and "1:0 " not in log and "Traceback" not in log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_running_answer_is_finished_before_the_gateway_stops(
    script: Script, scripted: ScriptedService, number: signal.Signals
) -> None:
    scripted.script = scripted.half
    program = start_gateway(script, scripted)
    url = url_of(program)
    with httpx.stream("POST", f"{url}/v1/chat/completions", json={**CHAT, "stream": True}, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        program.process.send_signal(number)
        until(lambda: not is_listening("127.0.0.1", int(url.rpartition(":")[2])), "no new connection is accepted")
        scripted.resume.set()
        assert [line for line in lines if line][-1] == "data: [DONE]"
    assert program.process.wait(60) == 0


def test_an_answer_that_takes_too_long_ends_with_an_error_when_the_gateway_stops(
    script: Script, scripted: ScriptedService
) -> None:
    scripted.script = scripted.half
    program = start_gateway(script, scripted)
    url = f"{url_of(program)}/v1/chat/completions"
    with ThreadPoolExecutor() as threads:
        complete = threads.submit(httpx.post, url, json=CHAT, timeout=60)
        until(lambda: scripted.requests, "the request has arrived")
        with httpx.stream("POST", url, json={**CHAT, "stream": True}, timeout=60) as response:
            received = ""
            for piece in response.iter_text():
                if not received:
                    program.process.send_signal(signal.SIGTERM)
                received += piece
        assert complete.result().status_code == 503
        assert complete.result().json()["error"]["code"] == "shutting_down"
    assert json.loads(received.split("data: ")[-1])["error"]["code"] == "shutting_down"
    assert program.process.wait(SECONDS_TO_STOP + 60) == 0
    log = program.log.read_text()
    assert "POST /v1/chat/completions 503 " in log
    assert "failure=shutting_down" in log
    assert "Traceback" not in log


def test_a_gateway_runs_beside_a_service_and_ends_with_it(script: Script, tiny_folder: Path) -> None:
    options = ("--model", str(tiny_folder), "--precision=fp32", "--port=0")
    program = script(
        "-m", "helpers", "serve", *options, "--http=127.0.0.1:0", env={**os.environ, "HELPERS_API_KEYS": KEY}
    )
    url = url_of(program)
    headers = {"authorization": f"Bearer {KEY}"}
    until(lambda: httpx.get(f"{url}/ready", timeout=60).status_code == 200, "the service is ready")
    model = httpx.get(f"{url}/v1/models", headers=headers).json()["data"][0]["id"]
    reply = httpx.post(f"{url}/v1/chat/completions", json={**CHAT, "model": model}, headers=headers, timeout=60)
    assert reply.json()["usage"]["completion_tokens"] == 3
    processes = program.family()
    program.process.send_signal(signal.SIGTERM)
    assert program.process.wait(60) == 0
    until(lambda: not any(process.is_running() for process in processes), "all processes have ended")


def test_a_gateway_ends_if_its_service_is_killed(script: Script, tiny_folder: Path) -> None:
    program = script(
        "-m", "helpers", "serve", "--model", str(tiny_folder), "--precision=fp32", "--port=0", "--http=127.0.0.1:0"
    )
    url = url_of(program)
    program.process.kill()
    program.process.wait()
    until(lambda: not is_listening("127.0.0.1", int(url.rpartition(":")[2])), "the gateway has ended")


# ---- What is refused before anything starts


@pytest.fixture
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*_: Any, **__: Any) -> None:
        raise AssertionError("something was started")

    monkeypatch.setattr("subprocess.Popen", start)
    monkeypatch.setattr("helpers.server.run", start)
    monkeypatch.setattr(server.uvicorn.Server, "run", start)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["gateway", "--service", "12345"], "is not HOST:PORT"),
        (["gateway", "--service", "::1:12345"], "is not HOST:PORT"),
        (["gateway", "--service", "127.0.0.1:0"], "0 is not a port"),
        (["gateway", "--keys", "/nowhere"], "cannot be read"),
        (["gateway", "--port", "70000"], "is not a port"),
        (["gateway", "--ssl-certfile", "/nowhere"], "Give both files"),
        (["gateway", "--ssl-certfile", "/nowhere", "--ssl-keyfile", "/nowhere"], "is not a file"),
        (["serve", "--http", "x"], "is not HOST:PORT"),
        (["serve", "--http", "0", "--keys", "/nowhere"], "cannot be read"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_starts(
    nothing_starts: None, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert main([*arguments, "--port=0"] if arguments[0] == "serve" else arguments) == 1
    assert words in capsys.readouterr().err


def test_a_taken_port_is_refused_before_the_model_loads(
    nothing_starts: None, scripted: ScriptedService, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "--port=0", "--http", str(scripted.port)]) == 1
    assert f"Port {scripted.port} is taken" in capsys.readouterr().err
