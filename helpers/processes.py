"""Ports and processes of this machine: who holds a port, when a parent has ended, what is left of a service."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from .errors import InvalidRequest, ServiceUnavailable


def wait_for_end_of_parent(parent: int) -> None:
    """Return when the process `parent`, which started this one, has ended, however that happened.

    A process whose parent ends gets another one at once, also while the old one is still a zombie.
    """
    while os.getppid() == parent:
        time.sleep(0.05)


def kill(processes: Sequence[psutil.Process]) -> None:
    """Kill them, and wait until they have ended: five seconds, because a dead one whose parent has gone too may
    stay for ever where nobody collects it, as in a container."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=5)


def remove_log(log: Path | None) -> None:
    """Remove the file, and its folder where nothing else is in it."""
    if log is not None:
        log.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # somebody else's files are there, or it is gone
            log.parent.rmdir()


def port_to_listen_on(host: str, port: int) -> int:
    """`port`, or a free one for 0, once it is known that a service can listen there.

    Raises `InvalidRequest` for what is no port, and `ServiceUnavailable`, with the name of the holder,
    for a port that is taken, or for a `host` that is not this machine's.
    """
    if not 0 <= port <= 65535:
        raise InvalidRequest(f"{port} is no port: take one from 1 to 65535, or 0 for any free one.")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port just given up is free
            probe.bind(address)
            return probe.getsockname()[1]
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ServiceUnavailable(
                f"Port {port} is taken by {_holder(port)}. Stop that, or take another port: 0 is any free one."
            ) from None
        raise ServiceUnavailable(
            f"A service cannot listen on {host}:{port} ({error}). Try another host or port."
        ) from error


def _holder(port: int) -> str:
    """Who listens there; by name only, because a command line may hold secrets."""
    try:
        for connection in psutil.net_connections(kind="tcp"):
            listens = connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
            if listens and connection.pid:
                return f"process {connection.pid} ({psutil.Process(connection.pid).name()})"
    except psutil.Error as error:  # without administrator rights macOS does not tell
        return f"another process ({type(error).__name__} hides which)"
    return "another process"
