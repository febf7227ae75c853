"""Ports and processes of this machine: which process holds a port, and when a parent process has ended."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from .errors import InvalidRequest, ServiceUnavailable


def call_when_parent_ends(parent: int, action: Callable[[], object]) -> None:
    """Call `action` in a thread when the process `parent`, which started this one, ends for any reason."""

    def wait() -> None:
        # a process whose parent ends gets another parent at once, even while the old one is still a zombie
        while os.getppid() == parent:
            time.sleep(0.05)
        action()

    threading.Thread(target=wait, name="parent-watch", daemon=True).start()


def exit_with_parent_process() -> None:
    """End this process when its `multiprocessing` parent ends. Without such a parent, do nothing.

    A parent that is killed cannot stop its children.
    """
    if (parent := multiprocessing.parent_process()) is not None and parent.pid is not None:
        call_when_parent_ends(parent.pid, lambda: os._exit(1))


def kill(processes: Sequence[psutil.Process]) -> None:
    """Kill the processes and wait until they have ended, for 5 seconds at most.

    In a container, a dead process whose parent is gone may stay a zombie forever.
    """
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=5)


def remove_log(log: Path | None) -> None:
    """Remove the file, and its folder if nothing else is in it."""
    if log is not None:
        log.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # the folder holds other files, or is gone
            log.parent.rmdir()


def is_listening(host: str, port: int) -> bool:
    """Return whether a process accepts connections at `host` and `port`."""
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError:
        return False
    return True


def port_to_listen_on(host: str, port: int) -> int:
    """Return `port`, or a free port for 0, if a service can listen there.

    Raise `InvalidRequest` for a number that is not a port. Raise `ServiceUnavailable` if the port is taken (the
    message names the process that holds it) or if `host` is not an address of this machine.
    """
    if not 0 <= port <= 65535:
        raise InvalidRequest(f"{port} is not a port. Choose one from 1 to 65535, or 0 for any free port.")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was just closed is free
            probe.bind(address)
            free: int = probe.getsockname()[1]
            return free
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ServiceUnavailable(
                f"Port {port} is taken by {_holder(port)}. Stop that process, or choose another port (0: any free one)."
            ) from None
        raise ServiceUnavailable(
            f"A service cannot listen on {host}:{port} ({error}). Choose another host or port."
        ) from error


def _holder(port: int) -> str:
    """Return which process listens on `port`: its id and name only, because a command line may hold secrets."""
    try:
        for connection in psutil.net_connections(kind="tcp"):
            listens_on = connection.laddr.port if connection.status == psutil.CONN_LISTEN and connection.laddr else 0
            if listens_on == port and connection.pid:
                return f"process {connection.pid} ({psutil.Process(connection.pid).name()})"
    except psutil.Error as error:  # macOS shows it to administrators only
        return f"another process ({type(error).__name__} hides which)"
    return "another process"
