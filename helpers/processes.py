"""Ports and processes of this machine: who holds a port, and when a parent has ended."""

from __future__ import annotations

import errno
import os
import socket
import time

import psutil

from .errors import InvalidRequest, ServiceUnavailable


def wait_for_end_of_parent(parent: int) -> None:
    """Return when the process `parent`, which started this one, has ended, however that happened.

    A process whose parent ends gets another one at once, also while the old one is still a zombie.
    """
    while os.getppid() == parent:
        time.sleep(0.05)


def free_port(host: str) -> int:
    """A port on `host` that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def check_port(host: str, port: int) -> None:
    """Raise `ServiceUnavailable`, with the name of the holder, where a service could not listen."""
    if not 1 <= port <= 65535:
        raise InvalidRequest(f"{port} is no port: take one from 1 to 65535, or 0 for any free one.")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port just given up is free
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise ServiceUnavailable(
                    f"A service cannot listen on {host}:{port} ({error}). Try another --host or --port."
                ) from error
            raise ServiceUnavailable(
                f"Port {port} is taken by {_holder(port)}. Stop that, or take another port: 0 is any free one."
            ) from None


def _holder(port: int) -> str:
    try:
        for connection in psutil.net_connections(kind="tcp"):
            if connection.laddr and connection.laddr.port == port and connection.pid:
                process = psutil.Process(connection.pid)
                return f"process {process.pid} ({' '.join(process.cmdline())[:80] or process.name()})"
    except psutil.Error as error:  # without administrator rights macOS does not tell
        return f"another process ({type(error).__name__} hides which)"
    return "another process"
