"""Ports and parents, without any service."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from background_program import Program
from eventually import until
from helpers.errors import InvalidRequest, ServiceUnavailable
from helpers.processes import is_listening, kill, port_to_listen_on, remove_log


@pytest.fixture
def taken_port() -> int:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        yield holder.getsockname()[1]


def test_a_free_port_is_found_and_a_given_one_is_kept() -> None:
    port = port_to_listen_on("127.0.0.1", 0)
    assert port > 0
    assert port_to_listen_on("127.0.0.1", port) == port


HOLDING = """
import os, socket, sys
holder = socket.create_server(("127.0.0.1", 0))
if sys.argv[1] == "fork" and os.fork():
    os.wait()
print("holds", holder.getsockname()[1], os.getpid(), flush=True)
input()
"""


@pytest.mark.main
def test_a_taken_port_names_what_holds_it_and_the_fix(taken_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_listening("127.0.0.1", taken_port)
    with pytest.raises(ServiceUnavailable, match=rf"Port {taken_port} is taken by this program itself.*0: any free"):
        port_to_listen_on("127.0.0.1", taken_port)
    for kind in ("child", "fork"):  # as Jina's executor is a child of the service
        command = [sys.executable, "-c", HOLDING, kind]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
            _, port, pid = child.stdout.readline().split()
            own = rf"a service that this program has started \(process {pid}\)\. Stop it with its `\.stop\(\)`.*0: any"
            with pytest.raises(ServiceUnavailable, match=f"Port {port} is taken by {own}"):
                port_to_listen_on("127.0.0.1", int(port))
            with monkeypatch.context() as another_program:
                another_program.setattr(os, "getpid", lambda: -1)
                with pytest.raises(ServiceUnavailable, match=rf"by process {pid} \(.*\)\. Stop that process.*0: any"):
                    port_to_listen_on("127.0.0.1", int(port))


@pytest.mark.parametrize("port", ["0", "12345", None])
def test_a_port_may_be_a_text_or_the_default(port: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("helpers.processes._addresses", lambda host: [(socket.AF_INET, ("127.0.0.2", 0))])
    found = port_to_listen_on("127.0.0.2", port)
    assert found == 12345 if port != "0" else found > 0


@pytest.mark.parametrize("port", [-1, 65536, 10**6, "-1", "many", 1.5])
def test_a_number_that_is_not_a_port_is_refused(port: int) -> None:
    with pytest.raises(InvalidRequest, match="is not a port"):
        port_to_listen_on("127.0.0.1", port)


@pytest.mark.parametrize("port", [0, 12345])
@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid"])
def test_an_address_of_another_machine_is_refused(host: str, port: int) -> None:
    with pytest.raises(ServiceUnavailable, match=f"cannot listen on {host}"):
        port_to_listen_on(host, port)


@pytest.mark.parametrize("host", ["::1", "::"])
def test_an_ipv6_address_is_one_to_listen_on(host: str) -> None:
    try:
        holder = socket.create_server((host, 0), family=socket.AF_INET6)
    except OSError:
        pytest.skip("This machine has no IPv6.")
    with holder:
        assert is_listening("::1", port := holder.getsockname()[1])
        with pytest.raises(ServiceUnavailable, match=f"Port {port} is taken"):
            port_to_listen_on(host, port)
    assert port_to_listen_on(host, port) == port


def test_a_name_with_two_addresses_is_taken_if_one_of_them_is(taken_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    addresses = [(socket.AF_INET, ("127.0.0.2", 0)), (socket.AF_INET, ("127.0.0.1", 0))]
    monkeypatch.setattr("helpers.processes._addresses", lambda host: addresses)
    with pytest.raises(ServiceUnavailable, match=f"Port {taken_port} is taken by this program"):
        port_to_listen_on("localhost", taken_port)
    monkeypatch.setattr("helpers.processes._addresses", lambda host: [(socket.AF_INET, ("192.0.2.1", 0)), *addresses])
    assert port_to_listen_on("localhost", 0) > 0  # such as localhost in a container without IPv6


@pytest.mark.parametrize(("limits", "raised"), [((256, 1024), 1024), ((256, 8192), 4096), ((5000, 8192), 5000)])
def test_a_service_may_open_many_files(program: Callable[..., Program], limits: tuple[int, int], raised: int) -> None:
    resource = pytest.importorskip("resource")
    if 0 <= resource.getrlimit(resource.RLIMIT_NOFILE)[1] < limits[1]:
        pytest.skip("The limit of this machine is lower.")
    limited = program(
        "import resource; from helpers.processes import raise_file_limit\n"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, {limits}); raise_file_limit()\n"
        "print('limits', *resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    assert limited.wait_for("limits") == f"limits {raised} {limits[1]}"


def test_nothing_listens_on_a_free_port() -> None:
    assert not is_listening("127.0.0.1", port_to_listen_on("127.0.0.1", 0))


def test_a_log_is_removed_with_its_folder_but_without_the_files_of_others(tmp_path: Path) -> None:
    log, others = tmp_path / "a" / "service.log", tmp_path / "b" / "service.log"
    for file in (log, others, others.with_name("other")):
        file.parent.mkdir(exist_ok=True)
        file.touch()
    for file in (log, others, log):  # a second call finds nothing, and does nothing
        remove_log(file)
    remove_log(None)
    assert [path.name for path in sorted(tmp_path.rglob("*"))] == ["b", "other"]


PARENT = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", sys.argv[1]])
time.sleep(3600)
"""
CHILD = """
import os, time
from pathlib import Path
from helpers.processes import call_when_parent_ends
call_when_parent_ends(os.getppid(), lambda: (Path(os.environ["FOUND"]).touch(), os._exit(0)))
print("watching", flush=True)
time.sleep(3600)
"""
FORKED = """
import multiprocessing, sys, time
from helpers.processes import exit_with_parent_process

def child():
    exit_with_parent_process()
    print("watching", flush=True)
    time.sleep(3600)

if __name__ == "__main__":
    exit_with_parent_process()  # which has no parent of this kind: nothing happens
    multiprocessing.get_context("fork").Process(target=child).start()
    time.sleep(3600)
"""


@pytest.fixture
def program(tmp_path: Path) -> Callable[..., Program]:
    """Start a small program that needs only the standard library and no service."""
    started: list[Program] = []

    def start(*command: str) -> Program:
        environment = {**os.environ, "FOUND": str(tmp_path / "found"), "PYTHONPATH": os.pathsep.join(sys.path)}
        started.append(Program("-c", *command, log=tmp_path / "output.log", env=environment))
        return started[-1]

    yield start
    for one in started:
        one.kill()


def test_the_action_is_called_when_the_parent_is_killed(program: Callable[..., Program], tmp_path: Path) -> None:
    parent = program(PARENT, CHILD)
    parent.wait_for("watching")
    assert not (tmp_path / "found").exists()
    parent.process.kill()
    until((tmp_path / "found").exists, "the child notices that its parent has ended")


def test_a_child_of_multiprocessing_ends_with_its_parent(program: Callable[..., Program]) -> None:
    parent = program(FORKED)
    parent.wait_for("watching")
    (child,) = parent.family()[1:]
    parent.process.kill()
    until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, "the child ends")


FORKING = """
import os, time
from helpers.processes import end_forks_with_this_process
end_forks_with_this_process()
if os.fork() == 0:
    print("watching", flush=True)
    if os.fork() == 0:  # as a program that becomes a daemon does
        os.setsid()
        print("apart", flush=True)
time.sleep(3600)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="This system has no fork.")
def test_a_fork_ends_with_its_parent_but_a_fork_of_the_fork_does_not(program: Callable[..., Program]) -> None:
    parent = program(FORKING)
    parent.wait_for("watching")
    parent.wait_for("apart")
    child, apart = parent.family()[1:]
    parent.process.kill()
    until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, "the child ends")
    assert apart.is_running()
    apart.kill()


def test_kill_ends_what_runs_and_accepts_what_has_ended(program: Callable[..., Program]) -> None:
    running = program("import time; print('started', flush=True); time.sleep(3600)")
    running.wait_for("started")
    process = psutil.Process(running.process.pid)
    kill([process])
    kill([process])
    assert not process.is_running()
