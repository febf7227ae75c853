"""Run several services of one model on this machine, and start each one again that ends.

Each service is a process: ``python -m helpers serve`` on a free port of the loopback address. With several GPUs, each
gets one of its own. Without a GPU, they divide the cores among them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from .errors import ServiceUnavailable
from .hardware import cores, gpu_indices
from .options import HOST
from .processes import port_to_listen_on
from .server import SECONDS_TO_STOP, Companion, Lifetime
from .service import program_of, ready_line

_SECONDS_BEYOND = 2
"""How long this process may take to end after the last service."""
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0
"""Seconds before a service that has ended starts again. The pause doubles while it does not run longer than that."""


def free_ports(count: int) -> list[int]:
    """Return `count` different free ports of the loopback address."""
    ports: set[int] = set()
    while len(ports) < count:
        ports.add(port_to_listen_on(HOST, 0))
    return sorted(ports)


def environments(count: int) -> list[dict[str, str]]:
    """Return the environment variables that each of `count` services gets: a GPU, or its share of the cores."""
    gpus = gpu_indices()
    shared: dict[str, Any] = {"PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1"}
    if not gpus and "OMP_NUM_THREADS" not in os.environ:
        shared["OMP_NUM_THREADS"] = str(max(1, cores() // count))
    own = [{"CUDA_VISIBLE_DEVICES": gpus[index % len(gpus)]} if gpus else {} for index in range(count)]
    return [{**shared, **variables} for variables in own]


def run(ports: Sequence[int], arguments: Sequence[str], *, grace: float, companion: Companion | None = None) -> None:
    """Run a service on each of `ports` until SIGTERM, Ctrl-C or the end of the `companion`.

    Then stop the companion, and give the running answers of the services `grace` seconds.

    `arguments` are those of ``python -m helpers serve`` that all services share. Each line of their output is printed
    with the number of its service in front.

    Raise `ServiceUnavailable` if the companion fails, or if a service ends before it was ready for the first time: it
    would end again.
    """
    lifetime = Lifetime(companion=companion, grace=grace + _SECONDS_BEYOND)
    lifetime.ready.set()  # a service that is still loading ends at once
    replicas = [
        _Replica(
            index,
            [*arguments, "--host", HOST, "--port", str(port), "--grace", str(grace)],
            ready=ready_line(HOST, port),
            environment=environment,
            stop=lifetime.stop,
        )
        for index, (port, environment) in enumerate(zip(ports, environments(len(ports)), strict=True), start=1)
    ]
    for replica in replicas:
        replica.start()
    lifetime.stop.wait()
    for replica in replicas:
        replica.terminate()
    for replica in replicas:
        replica.join_or_kill(grace + SECONDS_TO_STOP)
    if lifetime.failure is not None:
        raise lifetime.failure
    if failed := [str(replica.number) for replica in replicas if replica.has_failed]:
        raise ServiceUnavailable(f"Service {', '.join(failed)} could not start. Read its output above.")


class _Replica(threading.Thread):
    """The thread that runs a service, prints its output, and starts it again."""

    def __init__(
        self, number: int, arguments: list[str], *, ready: str, environment: dict[str, str], stop: threading.Event
    ) -> None:
        super().__init__(name=f"replica-{number}", daemon=True)
        self.number, self.has_failed = number, False
        self._arguments, self._ready, self._environment, self._stopping = arguments, ready, environment, stop
        self._was_ready = False
        self._lock = threading.Lock()  # held to start and to terminate, so that nothing starts after `terminate`
        self._process: subprocess.Popen[str] | None = None

    def run(self) -> None:
        """Run the service until it must stop."""
        pause = _FIRST_PAUSE
        while (process := self._start_process()) is not None:
            started = time.monotonic()
            assert process.stdout is not None
            for line in process.stdout:
                self._was_ready = self._was_ready or self._ready in line
                self._print(line.rstrip())
            status = process.wait()
            if self._stopping.is_set():
                return
            if not self._was_ready:
                self.has_failed = True
                self._stopping.set()
                return
            pause = _FIRST_PAUSE if time.monotonic() - started > _LONGEST_PAUSE else pause
            self._print(f"The service ended with status {status}. It starts again in {pause:.0f} s.")
            self._stopping.wait(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def terminate(self) -> None:
        """Send SIGTERM to the service."""
        with self._lock:
            if self._process is not None:
                self._process.terminate()

    def join_or_kill(self, seconds: float) -> None:
        """Wait until the service has ended. Kill it after `seconds`."""
        self.join(seconds)
        if self.is_alive() and self._process is not None:
            self._process.kill()
            self.join()

    def _start_process(self) -> subprocess.Popen[str] | None:
        """Start the service, or return None if all must stop."""
        with self._lock:
            if self._stopping.is_set():
                return None
            command = [sys.executable, "-c", program_of("__main__"), "serve", "--parent", str(os.getpid())]
            self._process = subprocess.Popen(
                [*command, *self._arguments],
                env={**os.environ, **self._environment},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,  # Ctrl-C must not reach it: this process stops it
            )
            return self._process

    def _print(self, line: str) -> None:
        sys.stdout.write(f"[service {self.number}] {line}\n")  # one write, which no other thread's line can break up
        sys.stdout.flush()
