"""How a gateway and the service beside it stop: in order, together, and without leaving anything behind."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from background_program import Program
from eventually import until
from helpers.processes import is_listening, port_to_listen_on
from running_gateway import running_gateway
from scripted_service import ScriptedService
from test_gateway_process import CHAT, start_gateway, url_of
from wire import ENDLESS

Script = Callable[..., Program]


class Stream:
    """A streamed answer: `text` is what has arrived, and `has_begun` whether its first token has."""

    def __init__(self, url: str, **fields: Any) -> None:
        self._url, self._body = url, {**CHAT, "stream": True, **fields}
        self.text = ""

    @property
    def has_begun(self) -> bool:
        return self.text.count("data: ") > 1

    @property
    def end(self) -> Any:
        """The data of the last event: [DONE] as a text, or an error's code."""
        data = self.text.rstrip().rpartition("data: ")[2]
        return data if data == "[DONE]" else json.loads(data)["error"]["code"]

    def read(self) -> Stream:
        with httpx.stream("POST", f"{self._url}/v1/chat/completions", json=self._body, timeout=300) as response:
            for text in response.iter_text():
                self.text += text
        return self


def start_pair(script: Script, model: Path, *options: str, **more: Any) -> tuple[Program, str, str]:
    """Start a service with a gateway, and return the program, the gateway's URL and the model's name."""
    words = ["--model", str(model), "--precision=fp32", "--port=0", "--http=127.0.0.1:0", *options]
    program = script("-m", "helpers", "serve", *words, **more)
    url = url_of(program)
    until(lambda: httpx.get(f"{url}/ready", timeout=60).status_code == 200, "the service is ready")
    return program, url, httpx.get(f"{url}/v1/models").json()["data"][0]["id"]


def gateway_of(program: Program) -> psutil.Process:
    """Return the process of the gateway that runs beside a service."""
    (gateway,) = [one for one in program.family()[1:] if "gateway" in one.cmdline()]
    return gateway


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long)])
def test_the_service_stops_after_the_answers_of_its_gateway(
    script: Script, endless_folder: Path, number: signal.Signals
) -> None:
    program, url, model = start_pair(script, endless_folder, "--timeout-graceful-shutdown=300", start_new_session=True)
    processes = program.family()
    stream = Stream(url, model=model, max_tokens=1000)
    with ThreadPoolExecutor(8) as threads:
        reading = threads.submit(stream.read)
        until(lambda: stream.has_begun, "the answer has begun")
        os.killpg(program.process.pid, number)  # as Ctrl-C in a terminal does
        assert reading.result().end == "[DONE]"
    assert program.process.wait(60) == 0
    until(lambda: not any(process.is_running() for process in processes), "all processes have ended")
    assert not is_listening("127.0.0.1", int(url.rpartition(":")[2]))
    assert "Traceback" not in program.log.read_text()


@pytest.mark.long
def test_a_second_ctrl_c_ends_the_running_answers(script: Script, endless_folder: Path) -> None:
    program, url, model = start_pair(script, endless_folder, "--timeout-graceful-shutdown=300")
    streams = [Stream(url, model=model, max_tokens=ENDLESS, n=2) for _ in range(4)]
    with ThreadPoolExecutor(8) as threads:
        reading = [threads.submit(stream.read) for stream in streams]
        until(lambda: all(stream.has_begun for stream in streams), "the answers have begun")
        program.process.send_signal(signal.SIGINT)
        until(lambda: not is_listening("127.0.0.1", int(url.rpartition(":")[2])), "the gateway stops")
        program.process.send_signal(signal.SIGINT)
        assert [one.result().end for one in reading] == ["shutting_down"] * 4
    assert program.process.wait(60) == 0


def test_a_signal_while_the_model_loads_leaves_nothing(script: Script, tiny_folder: Path) -> None:
    words = ("--model", str(tiny_folder), "--precision=fp32", "--port=0", "--http=0")
    program = script("-m", "helpers", "serve", *words, start_new_session=True)
    until(lambda: len(program.family()) > 1, "the gateway's process has started")
    processes = program.family()
    os.killpg(program.process.pid, signal.SIGTERM)
    assert program.process.wait(60) != 0
    until(lambda: not any(process.is_running() for process in processes), "all processes have ended")
    assert "Traceback" not in program.log.read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_gateway_that_is_stopped_while_it_starts_closes_everything(
    script: Script, scripted: ScriptedService, number: signal.Signals
) -> None:
    code = f"""
import os
from contextlib import asynccontextmanager
from helpers.gateway import create_app
from helpers.gateway.options import GatewayArgs
from helpers.gateway.server import run

app = create_app(["127.0.0.1:{scripted.port}"])
open_and_close = app.router.lifespan_context

@asynccontextmanager
async def be_stopped_between(app):
    async with open_and_close(app):
        os.kill(os.getpid(), {int(number)})
        yield
    print("closed", flush=True)

app.router.lifespan_context = be_stopped_between
run(app, GatewayArgs(), host="127.0.0.1", port=0, parent=None)
"""
    program = script("-c", code)
    assert program.process.wait(60) == 0
    log = program.log.read_text()
    assert "closed" in log.splitlines() and "Traceback" not in log


@pytest.mark.parametrize("is_ready", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_service_ends_with_an_error_if_its_gateway_is_killed(
    script: Script, tiny_folder: Path, is_ready: bool
) -> None:
    program = script(
        *("-m", "helpers", "serve", "--model", str(tiny_folder), "--precision=fp32", "--port=0", "--http=0")
    )
    program.wait_for("Ready on" if is_ready else "OpenAI's API on")
    processes = program.family()
    gateway_of(program).kill()
    assert program.process.wait(60) == 1
    until(lambda: not any(process.is_running() for process in processes), "all processes have ended")
    *_, last = program.log.read_text().splitlines()
    assert "was ended by signal 9, and the service ends with it." in last


def test_a_gateway_that_cannot_start_ends_the_service_with_an_error(
    script: Script, tiny_folder: Path, tmp_path: Path
) -> None:
    for name in ("certificate", "key"):
        (tmp_path / name).write_text("no PEM")
    files = ("--ssl-certfile", str(tmp_path / "certificate"), "--ssl-keyfile", str(tmp_path / "key"))
    program = script("-m", "helpers", "serve", "--model", str(tiny_folder), "--port=0", "--http=0", *files)
    assert program.process.wait(60) == 1
    log = program.log.read_text()
    assert "The certificate or its key cannot be used" in log
    assert "ended with status 1, and the service ends with it." in log
    assert "Traceback" not in log


@pytest.mark.parametrize("count", [16, pytest.param(100, marks=pytest.mark.long)])
def test_many_answers_that_take_too_long_all_end_with_an_error(
    script: Script, scripted: ScriptedService, count: int
) -> None:
    scripted.script = scripted.half
    program = start_gateway(script, scripted, "--timeout-graceful-shutdown=1")
    url = url_of(program)
    streams = [Stream(url) for _ in range(count)]
    with ThreadPoolExecutor(len(streams)) as threads:
        reading = [threads.submit(stream.read) for stream in streams]
        until(lambda: all(stream.has_begun for stream in streams), "the answers have begun")
        program.process.send_signal(signal.SIGTERM)
        assert [one.result().end for one in reading] == ["shutting_down"] * len(streams)
    assert program.process.wait(60) == 0
    log = program.log.read_text()
    assert log.count("failure=shutting_down") == count
    assert "Traceback" not in log


def test_if_the_service_goes_away_eight_answers_end_with_an_error_and_the_next_ones_succeed(
    scripted: ScriptedService,
) -> None:
    scripted.script = scripted.half
    with running_gateway(scripted.port) as gateway, ThreadPoolExecutor(8) as threads:
        streams = [Stream(gateway.root) for _ in range(8)]
        reading = [threads.submit(stream.read) for stream in streams]
        until(lambda: all(stream.has_begun for stream in streams), "the answers have begun")
        scripted.stop()
        assert [one.result().end for one in reading] == ["service_unavailable"] * 8
        assert httpx.get(f"{gateway.root}/ready").status_code == 503
        scripted.start()
        scripted.script = scripted.count_up
        assert httpx.get(f"{gateway.root}/ready").status_code == 200
        assert Stream(gateway.root).read().end == "[DONE]"


@pytest.mark.long
def test_if_the_service_is_killed_the_gateway_uses_the_next_one_on_the_same_port(
    script: Script, endless_folder: Path
) -> None:
    port = port_to_listen_on("127.0.0.1", 0)
    words = ("-m", "helpers", "serve", "--model", str(endless_folder), "--precision=fp32", f"--port={port}")
    service = script(*words)
    service.wait_for("Ready on")
    with running_gateway(port) as gateway, ThreadPoolExecutor(8) as threads:
        model = httpx.get(f"{gateway.root}/v1/models").json()["data"][0]["id"]
        streams = [Stream(gateway.root, model=model, max_tokens=ENDLESS, n=2) for _ in range(4)]
        reading = [threads.submit(stream.read) for stream in streams]
        until(lambda: all(stream.has_begun for stream in streams), "the answers have begun")
        service.kill()
        assert [one.result().end for one in reading] == ["service_unavailable"] * 4
        assert httpx.get(f"{gateway.root}/ready", timeout=60).status_code == 503
        script(*words).wait_for("Ready on")
        until(lambda: httpx.get(f"{gateway.root}/ready", timeout=60).status_code == 200, "the gateway is ready again")
        assert Stream(gateway.root, model=model).read().end == "[DONE]"
