"""A service starts, reports why it cannot start, stops, and ends with its parent, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

import helpers
from eventually import until
from helpers.errors import InvalidRequest, ModelUnavailable, ServiceUnavailable
from helpers.processes import is_listening, port_to_listen_on
from helpers.service import serve_script
from helpers.transport import is_ready

TESTS = Path(__file__).parent

pytestmark = pytest.mark.main


def has_ended(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def until_ended(processes: list[psutil.Process]) -> None:
    until(lambda: all(map(has_ended, processes)), f"all of {processes} end")


def is_free(port: int) -> bool:
    return not is_listening("127.0.0.1", port)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files, which no other test uses."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


# --- Starting ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["auto", "fp32"])
def test_the_port_of_another_service_is_not_shared(tiny_service: Any, precision: str) -> None:
    with pytest.raises(ServiceUnavailable, match=f"Port {tiny_service.port} is taken by a service that this"):
        helpers.serve("smollm2", precision, port=tiny_service.port)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [({"max_num_seqs": 0}, "max_num_seqs is 0"), ({"precision": "fp8"}, "fp32, bf16, int8, nf4"), ({"port": -1}, "-1")],
    ids=str,
)
def test_a_wrong_value_is_refused_before_anything_starts(
    wrong: dict[str, Any], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    with pytest.raises(InvalidRequest, match=sentence):
        helpers.serve(**{"port": 0, **wrong})


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, ImportError])
def test_an_interrupted_start_leaves_nothing(
    interruption: type[BaseException], monkeypatch: pytest.MonkeyPatch, temporary: Path
) -> None:
    def interrupt(*_: object) -> None:
        raise interruption

    monkeypatch.setattr("helpers.service.Service._wait_until_ready", interrupt)
    before = psutil.Process().children(recursive=True)
    with pytest.raises(interruption):
        helpers.serve("smollm2", port=0)
    assert psutil.Process().children(recursive=True) == before
    assert list(temporary.iterdir()) == []


def test_a_process_that_cannot_be_started_leaves_no_log(monkeypatch: pytest.MonkeyPatch, temporary: Path) -> None:
    monkeypatch.setattr("sys.executable", "/no/such/python")
    with pytest.raises(FileNotFoundError):
        helpers.serve("smollm2", port=0)
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize(
    ("model", "precision", "error", "sentence"),
    [
        ("/no/such/folder", "auto", ModelUnavailable, "/no/such/folder"),
        ("nobody/no-such-model", "auto", ModelUnavailable, "--model smollm2"),
    ],
)
def test_a_service_that_cannot_start_says_why_and_leaves_nothing(
    torch: Any, model: str, precision: str, error: type, sentence: str, monkeypatch: Any, temporary: Path
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port_to_listen_on('127.0.0.1', 0)}")  # no network
    before = psutil.Process().children(recursive=True)
    with pytest.raises(error, match=sentence):
        helpers.serve(model, precision, port=0)
    assert psutil.Process().children(recursive=True) == before
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("starts", [2, pytest.param(20, marks=pytest.mark.long)])
def test_starts_and_stops_side_by_side_leave_nothing(
    tiny_service: Any, tiny_folder: Path, temporary: Path, starts: int
) -> None:
    """No process, thread, port, file handle or temporary file is left."""

    def state() -> tuple[Any, ...]:
        processes = {child.pid for child in psutil.Process().children(recursive=True)}
        return processes, threading.active_count(), list(temporary.iterdir())

    tiny_service.ask("Hello", max_tokens=1)  # imports the client
    gc.collect()  # closes what earlier tests have left
    before, files, ports = state(), psutil.Process().num_fds(), []

    def start_ask_stop(_: int) -> None:
        with helpers.serve(str(tiny_folder), port=0) as service:
            ports.append(service.port)
            assert service.ask("Hello", max_tokens=2).completion_tokens == 2

    with ThreadPoolExecutor(2) as side_by_side:
        list(side_by_side.map(start_ask_stop, range(starts)))
    until(lambda: state() == before, "nothing is left")
    until(lambda: psutil.Process().num_fds() <= files + 3, "the files are closed")  # gRPC closes its sockets later
    assert len(ports) == starts
    assert all(map(is_free, ports))


def test_the_token_is_handed_over_by_environment_only(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "hf_" + "notarealtoken" * 3
    monkeypatch.setenv("HF_TOKEN", secret)
    with helpers.serve(str(tiny_folder), port=0) as service:
        process = psutil.Process(service.pid)
        assert process.environ()["HF_TOKEN"] == secret
        assert secret not in " ".join(process.cmdline())
        service.ask("Hello", max_tokens=1)
        assert secret not in service.log.read_text()
        assert secret not in repr(service)


@pytest.mark.parametrize("host", [pytest.param("0:0:0:0:0:0:0:1", marks=pytest.mark.long), "[::]"])
def test_a_service_listens_at_an_ipv6_address(
    tiny_folder: Path, host: str, monkeypatch: pytest.MonkeyPatch, temporary: Path
) -> None:
    try:
        port_to_listen_on("::1", 0)
    except ServiceUnavailable:
        pytest.skip("This machine has no IPv6.")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # a proxy there would fail Jina's readiness check
    with helpers.serve(str(tiny_folder), host=host, port=0) as service:
        assert service.host == "::1"
        assert service.ask("Hello", max_tokens=2).completion_tokens == 2
        assert helpers.ask("Hello", host="[::1]", port=service.port, max_tokens=2).completion_tokens == 2
        assert f"Ready on [::{'1' * (host != '[::]')}]:{service.port}." in service.log.read_text()


@pytest.mark.long
def test_starts_of_the_same_service_do_not_wait_for_each_other(
    tiny_folder: Path, monkeypatch: Any, tmp_path: Path
) -> None:
    """Hold Jina's lock for Executors of this name, as another service does while it downloads its model."""
    filelock = pytest.importorskip("filelock")
    locks = tmp_path / ".cache" / "jina" / "locks"
    locks.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    with (
        filelock.FileLock(locks / "TokenStreamingExecutor.lock"),
        helpers.serve(str(tiny_folder), port=0) as service,
    ):
        assert service.ask("Hello", max_tokens=2).completion_tokens == 2


# --- The service in the foreground ------------------------------------------------------------------


def test_the_foreground_service_stops_on_sigterm(script: Any, tiny_folder: Path) -> None:
    port = port_to_listen_on("127.0.0.1", 0)
    running = script("-m", "helpers", "serve", "--model", str(tiny_folder), "--port", str(port))
    assert f"127.0.0.1:{port}" in running.wait_for("Ready")
    assert helpers.ask("Hello", max_tokens=2, port=port).completion_tokens == 2
    running.process.send_signal(signal.SIGTERM)
    assert running.process.wait(300) == 0
    assert is_free(port)
    assert "Traceback" not in running.log.read_text()


def test_ctrl_c_stops_the_foreground_service_that_has_no_stdin(script: Any, tiny_folder: Path) -> None:
    port = port_to_listen_on("127.0.0.1", 0)
    command = f"exec {sys.executable} -m helpers serve --model '{tiny_folder}' --port {port} <&-"
    running = script("-c", f"import os; os.execvp('sh', ['sh', '-c', {command!r}])", start_new_session=True)
    running.wait_for("Ready")
    os.killpg(running.process.pid, signal.SIGINT)  # a terminal's Ctrl-C goes to the whole group
    assert running.process.wait(300) == 0
    assert is_free(port)
    assert "Traceback" not in running.log.read_text()


# --- A killed parent --------------------------------------------------------------------------------


def test_a_service_ends_when_its_parent_is_killed(script: Any, tiny_folder: Path) -> None:
    parent = script(str(TESTS / "serving_parent.py"), "serve", str(tiny_folder), "0")
    _, port, log = parent.wait_for("PORT").split()
    _, *family = parent.family()
    assert len(family) == 1
    assert helpers.ask(prompt="Hello", max_tokens=2, port=int(port)).completion_tokens == 2
    parent.process.kill()
    until_ended(family)
    assert is_free(int(port))
    assert not Path(log).parent.exists()


def test_a_starting_service_ends_when_its_parent_is_killed(script: Any, tiny_folder: Path) -> None:
    port = port_to_listen_on("127.0.0.1", 0)
    parent = script(str(TESTS / "serving_parent.py"), "serve", str(tiny_folder), str(port))
    until(lambda: len(parent.family()) > 1, "the service starts")
    _, *family = parent.family()
    parent.process.kill()
    until_ended(family)
    assert is_free(port)


def test_the_processes_of_a_script_end_when_the_script_is_killed() -> None:
    service = serve_script(
        TESTS / "counting_service.py", "--port", str(port := port_to_listen_on("127.0.0.1", 0)), port=port
    )
    family = psutil.Process(service.pid).children(recursive=True)
    assert len(family) >= 2  # Jina's gateway and the executor
    os.kill(service.pid, signal.SIGKILL)
    until_ended(family)
    service.stop()
    until(lambda: is_free(port), "the port is free")


def test_a_script_ends_when_its_parent_is_killed(script: Any) -> None:
    port = port_to_listen_on("127.0.0.1", 0)
    parent = script(str(TESTS / "serving_parent.py"), "serve_script", str(TESTS / "counting_service.py"), str(port))
    log = parent.wait_for("PORT").split()[2]
    _, *family = parent.family()
    assert len(family) >= 3  # the script, Jina's gateway and the executor
    parent.process.kill()
    until_ended(family)
    assert is_free(port)
    assert not Path(log).parent.exists()


# --- A user's script --------------------------------------------------------------------------------


def test_a_users_script_is_served_and_leaves_nothing() -> None:
    from jina import Client

    from counting_service import Number

    async def count() -> list[int]:
        client = Client(port=port, protocol="grpc", asyncio=True)
        return [doc.n async for doc in client.stream_doc(on="/count", inputs=Number(n=3), return_type=Number)]

    port = port_to_listen_on("127.0.0.1", 0)
    assert not is_ready(host="127.0.0.1", port=port)
    service = serve_script(TESTS / "counting_service.py", "--p", str(port), port=port)  # which begins like ours
    family = psutil.Process(service.pid).children(recursive=True)
    assert len(family) >= 2  # Jina's gateway and the executor
    assert is_ready(host="127.0.0.1", port=port)
    assert asyncio.run(count()) == [0, 1, 2]
    service.stop()
    until_ended(family)
    assert is_free(port)
    assert not service.log.parent.exists()


def test_a_users_script_needs_no_gateway() -> None:
    port = port_to_listen_on("127.0.0.1", 0)
    service = serve_script(TESTS / "counting_service.py", "--p", str(port), "--no-gateway", port=port)
    family = psutil.Process(service.pid).children(recursive=True)
    assert is_ready(host="127.0.0.1", port=port)
    service.stop()
    until_ended(family)
    assert is_free(port)


def test_a_script_that_ends_says_why(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import no_such_package")
    with pytest.raises(ServiceUnavailable, match="before it was ready(.|\n)*No module named 'no_such_package'"):
        serve_script(tmp_path / "broken.py", port=port_to_listen_on("127.0.0.1", 0))
