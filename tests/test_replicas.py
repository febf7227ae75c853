"""Several services behind one gateway, started by one command: what happens when one is killed, frozen or replaced."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from background_program import Program
from eventually import until
from helpers.__main__ import main
from helpers.replicas import environments

Script = Callable[..., Program]
LENGTH = 60
"""Tokens of each answer. The tiny model never ends an answer by itself."""


class Running:
    """Two services behind a gateway at `url`. `model` is their model's name."""

    def __init__(self, script: Script, model: Path, *options: str) -> None:
        arguments = ("--model", str(model), "--precision=fp32", "--replicas=2", "--http=127.0.0.1:0", *options)
        self.program = script("-m", "helpers", "serve", *arguments)
        found = re.search(r"(https?://\S+)/v1", self.program.wait_for("OpenAI's API on"))
        assert found is not None
        self.url, self.model = found[1], model.name
        until(self.both_serve, "both services are ready")

    def services(self) -> list[psutil.Process]:
        """Return the processes of the services."""
        found = []
        for child in psutil.Process(self.program.process.pid).children():
            try:
                if "--grace" in child.cmdline():
                    found.append(child)
            except psutil.Error:  # it has just ended
                continue
        return found

    def wait_for_another(self, ended: psutil.Process) -> None:
        """Wait until the service `ended` has ended, and another one serves in its place."""
        until(lambda: ended not in self.services(), "the service has ended")
        until(lambda: len(self.services()) == 2 and self.both_serve(), "another one serves")

    def up(self) -> list[float]:
        """Return `service_up` of each service."""
        metrics = httpx.get(f"{self.url}/metrics", timeout=60).text
        return [float(value) for value in re.findall(r"^service_up\S* (\S+)$", metrics, re.MULTILINE)]

    def both_serve(self) -> bool:
        return self.up() == [1, 1]

    def body(self, question: str, **fields: Any) -> dict[str, Any]:
        return {"model": self.model, "prompt": question, "max_tokens": LENGTH, **fields}

    def ask(self, question: str) -> str:
        """Return the whole answer, or raise `Refused` if it is an error."""
        response = httpx.post(f"{self.url}/v1/completions", json=self.body(question), timeout=300)
        if response.status_code != 200:
            assert response.json()["error"]["message"]
            raise Refused(response.text)
        reply = response.json()
        assert reply["usage"]["completion_tokens"] == LENGTH
        return str(reply["choices"][0]["text"])

    def stream(self, question: str) -> str:
        """Return the whole answer, read piece by piece, or raise `Refused` if it is an error or ends in one."""
        text = ""
        body = self.body(question, stream=True)
        with httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=300) as response:
            if response.status_code != 200:
                raise Refused(response.read().decode())
            for line in response.iter_lines():
                if line == "data: [DONE]":
                    return text
                if line.startswith("data: "):
                    chunk = httpx.Response(200, text=line.removeprefix("data: ")).json()
                    if "error" in chunk:
                        raise Refused(chunk["error"]["message"])
                    text += chunk["choices"][0]["text"]
        raise AssertionError(f"The stream ended without [DONE] and without an error: {text!r}")


class Refused(Exception):
    """A client got an error that says so."""


class Clients:
    """16 clients that ask one question each, again and again. `answers` counts the whole and right ones.

    `wrong` holds what no client may get: a short answer, or that of another question. `refused` holds the errors.
    """

    def __init__(self, running: Running, count: int = 16) -> None:
        self.answers, self.wrong, self.refused = 0, list[str](), list[str]()
        self._running, self._lock, self._stop = running, threading.Lock(), threading.Event()
        self._right = {question: running.ask(question) for question in (f"Question {n}" for n in range(count))}
        assert len(set(self._right.values())) == count
        self._threads = [threading.Thread(target=self._ask, args=(n, q)) for n, q in enumerate(self._right)]
        for thread in self._threads:
            thread.start()

    def _ask(self, number: int, question: str) -> None:
        ask = self._running.stream if number % 2 else self._running.ask
        while not self._stop.is_set():
            try:
                answer = ask(question)
            except Refused as error:
                with self._lock:
                    self.refused.append(str(error))
            except Exception as error:
                with self._lock:
                    self.wrong.append(repr(error))
            else:
                with self._lock:
                    self.answers += answer == self._right[question]
                    self.wrong += [] if answer == self._right[question] else [answer]

    def wait_for_answers(self, count: int) -> None:
        """Wait until the clients have got `count` more answers."""
        end = self.answers + count
        until(lambda: self.answers >= end or self.wrong, f"{count} more answers")

    def close(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


@pytest.mark.long
@pytest.mark.parametrize("kills", [1, 10])
def test_a_killed_service_costs_no_client_more_than_an_error(script: Script, tiny_folder: Path, kills: int) -> None:
    running = Running(script, tiny_folder)
    with closing(Clients(running)) as clients:
        for kill in range(kills):
            clients.wait_for_answers(16)
            killed = running.services()[kill % 2]
            killed.kill()
            running.wait_for_another(killed)
        clients.wait_for_answers(16)
    print(f"{clients.answers} answers, {len(clients.refused)} errors")
    assert clients.wrong == []
    assert all("went away" in error for error in clients.refused)
    processes = running.program.family()
    running.program.process.send_signal(signal.SIGTERM)
    assert running.program.process.wait(300) == 0
    until(lambda: not any(process.is_running() for process in processes), "all processes have ended")
    log = running.program.log.read_text()
    assert "[service 1] Ready on" in log and "[service 2] Ready on" in log
    assert "ended with status -9. It starts again" in log
    assert "Traceback" not in log


@pytest.mark.long
def test_a_rolling_replacement_costs_no_client_anything(script: Script, tiny_folder: Path) -> None:
    running = Running(script, tiny_folder, "--grace=300")
    with closing(Clients(running)) as clients:
        for replaced in running.services():
            clients.wait_for_answers(32)
            replaced.terminate()
            running.wait_for_another(replaced)
        clients.wait_for_answers(32)
    print(f"{clients.answers} answers, {len(clients.refused)} errors")
    assert clients.wrong == clients.refused == []


@pytest.mark.long
def test_a_frozen_service_is_left_out(script: Script, tiny_folder: Path) -> None:
    running = Running(script, tiny_folder)
    frozen, _ = running.services()
    frozen.suspend()
    try:
        until(lambda: sorted(running.up()) == [0, 1], "the metrics show it")
        for n in range(10):  # the first ones may reach the frozen service, and are sent again
            running.ask(f"Question {n}")
    finally:
        frozen.resume()
    until(running.both_serve, "it is back")


def test_each_service_gets_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("helpers.replicas.gpu_indices", lambda: ["2", "5"])
    assert [one["CUDA_VISIBLE_DEVICES"] for one in environments(3)] == ["2", "5", "2"]


def test_without_a_gpu_the_services_divide_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("helpers.replicas.gpu_indices", lambda: [])
    monkeypatch.setattr("psutil.cpu_count", lambda logical: 8)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(8), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [one["OMP_NUM_THREADS"] for one in environments(3)] == ["2", "2", "2"]
    assert environments(16)[0]["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    assert "OMP_NUM_THREADS" not in environments(3)[0]


def test_a_model_that_cannot_be_loaded_is_not_started_again(script: Script) -> None:
    program = script("-m", "helpers", "serve", "--model=/no/such/folder", "--replicas=2", "--http=127.0.0.1:0")
    assert program.process.wait(300) == 1
    log = program.log.read_text()
    assert "ModelUnavailable" in log and "could not start" in log
    assert "starts again" not in log


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--replicas=0", "--http=0"], "Start at least 1 service"),
        (["--replicas=2"], "Add --http 8000"),
        (["--replicas=2", "--http=0", "--port=5"], "Leave --host and --port out"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    def start(*_: Any, **__: Any) -> None:
        raise AssertionError("something was started")

    monkeypatch.setattr("subprocess.Popen", start)
    assert main(["serve", *options]) == 1
    assert words in capsys.readouterr().err
