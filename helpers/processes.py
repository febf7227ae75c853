"""Ports and processes of this machine: which process holds a port, and when a parent process has ended."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import socket
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from .addresses import join
from .errors import ServiceUnavailable
from .options import check_port_to_serve


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


def end_forks_with_this_process() -> None:
    """Make every later fork of this process, such as a user's Executor, end with it, even if it is killed."""
    parent = os.getpid()
    if hasattr(os, "register_at_fork"):  # not on Windows

        def watch() -> None:
            if os.getppid() == parent:  # not a fork of a fork
                call_when_parent_ends(parent, lambda: os._exit(1))

        os.register_at_fork(after_in_child=watch)


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


def port_to_listen_on(host: str, port: Any) -> int:
    """Return `port`, or a free port for 0, if a service can listen there.

    Raise `InvalidRequest` if `check_port_to_serve` does. Raise `ServiceUnavailable` if the port is taken (the message
    says what holds it) or if `host` is not an address of this machine.
    """
    port = check_port_to_serve(port)
    failure: OSError | None = None
    free = 0
    for family, address in _addresses(host):  # a name such as localhost may have two
        try:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was just closed is free
                probe.bind((address[0], free or port, *address[2:]))
                free = probe.getsockname()[1]
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ServiceUnavailable(f"Port {port or free} is taken by {_holder_and_fix(port or free)}") from None
            failure = error
    if not free:
        raise ServiceUnavailable(
            f"A service cannot listen on {join(host, port)} ({failure}). Choose another host or port."
        ) from failure
    return free


def _addresses(host: str) -> list[tuple[int, tuple[Any, ...]]]:
    """Return the family and the socket address of each address of `host`, or raise `ServiceUnavailable`."""
    try:
        return [(family, address) for family, _, _, _, address in socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)]
    except (OSError, UnicodeError) as error:
        raise ServiceUnavailable(
            f"A service cannot listen on {host}, which has no address ({error}). Choose another host."
        ) from error


def raise_file_limit(files: int = 4096) -> None:
    """Let this process open at least `files` files if it may. A service holds a connection for each client."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource  # not on Windows

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != resource.RLIM_INFINITY and soft < files:
            resource.setrlimit(resource.RLIMIT_NOFILE, (files if hard < 0 else min(files, hard), hard))


def raise_no_warnings() -> None:
    """Let no warning be an exception in this process: with PYTHONWARNINGS=error, Jina does not start."""
    warnings.filters[:] = [one for one in warnings.filters if one[0] != "error"]  # type: ignore[index]


def _holder_and_fix(port: int) -> str:
    """Return what listens on `port`, and a sentence that says what to do.

    Of another process, tell only the id and the name, because a command line may hold secrets.
    """
    holder = "another process"
    try:
        for connection in psutil.net_connections(kind="tcp"):
            listens_on = connection.laddr.port if connection.status == psutil.CONN_LISTEN and connection.laddr else 0
            if listens_on == port and connection.pid:
                process = psutil.Process(connection.pid)
                if process.pid == os.getpid():
                    return "this program itself. Choose another port (0: any free one)."
                if any(parent.pid == os.getpid() for parent in process.parents()):
                    started = f"a service that this program has started (process {process.pid})"
                    return f"{started}. Stop it with its `.stop()`, or choose another port (0: any free one)."
                holder = f"process {process.pid} ({process.name()})"
                break
    except psutil.Error as error:  # macOS shows it to administrators only
        holder = f"another process ({type(error).__name__} hides which)"
    return f"{holder}. Stop that process, or choose another port (0: any free one)."
