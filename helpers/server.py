"""Run the service's own process: load the model, serve it, print that it is ready, and stop cleanly.

`helpers.service.serve` starts this as ``python -m helpers serve``; a user can do the same in a terminal. The model
loads in a thread while this process imports Jina.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Protocol

import psutil

from .addresses import bracketed, clean_host, join
from .catalog import INSTALL
from .errors import HelpersError, ModelUnavailable, ServiceUnavailable, to_wire
from .loading import start_loading
from .options import GRACE, HOST, PORT, EngineArgs
from .processes import call_when_parent_ends, kill, port_to_listen_on, raise_file_limit, raise_no_warnings, remove_log
from .service import announce

SECONDS_TO_STOP = 5
"""The seconds that the service has to stop, after its running answers, before it ends anyway."""


class Companion(Protocol):
    """A process that runs beside the service, such as a gateway. It stops first, and the service ends if it fails."""

    def stop(self) -> None:
        """Let it finish its work, and return when it has ended."""

    def hurry(self) -> None:
        """Shorten `stop`. A signal handler calls this."""

    def wait_for_failure(self) -> str | None:
        """Wait until it has ended. Return a sentence that says how, or None if `stop` was called."""


def run(
    model: str = "auto",
    precision: str = "auto",
    *,
    host: str = HOST,
    port: int = PORT,
    engine_args: EngineArgs | None = None,
    grace: float = GRACE,
    parent: int | None = None,
    log: Path | None = None,
    companion: Companion | None = None,
) -> None:
    """Run a service in this process until SIGTERM, Ctrl-C or the end of the process `parent` or of the `companion`.

    Then accept no new requests, and give the running answers `grace` seconds. A second Ctrl-C ends the process at once.
    When the service stops or `parent` ends, remove the file `log`, and its folder if it is then empty. After a
    failure, both stay.

    Raise `InvalidRequest` or `ServiceUnavailable` if the service cannot listen at `host` and `port`, or if Python
    removes docstrings. Raise `ServiceUnavailable` if the `companion` fails. Raise `ModelUnavailable` if the packages
    that run a model are not installed, and what `helpers.models.load` raises.
    """
    if sys.flags.optimize > 1:
        raise ServiceUnavailable(
            "Python runs with -OO or PYTHONOPTIMIZE=2, which removes the docstrings that transformers needs. Start the "
            "service without it, or with -O."
        )
    for package in ("torch", "transformers"):
        if importlib.util.find_spec(package) is None:
            raise ModelUnavailable(
                f"A service needs more packages than a client, and {package} is not installed. Install it: {INSTALL}"
            )
    host = clean_host(host)
    port = port_to_listen_on(host, port)
    raise_file_limit()
    gc.disable()  # it would look through the modules again and again while they are imported: a fifth of that time
    raise_no_warnings()
    lifetime = Lifetime(parent, log, companion, grace=grace)
    loading = start_loading(model, precision, engine_args or EngineArgs())

    from ._jina import CannotListen, prepare_service, serve_executor

    prepare_service()
    from .executor import TokenStreamingExecutor

    loaded = loading.result()

    def announce_when_ready() -> None:
        gc.freeze()  # what has been imported stays until the end
        gc.enable()
        lifetime.ready.set()
        announce(host, port)

    try:
        executor = TokenStreamingExecutor(loaded=loaded)
        serve_executor(
            executor,
            host=bracketed(host),
            port=port,
            stop=lifetime.stop,
            when_ready=announce_when_ready,
            has_room=executor.has_room,
            grace=grace,
        )
    except CannotListen as error:
        port_to_listen_on(host, port)  # raises if another process took the port in the meantime
        raise ServiceUnavailable(
            f"The service cannot listen on {join(host, port)} ({error}). Start it again."
        ) from error
    if lifetime.failure is not None:
        raise lifetime.failure
    remove_log(log)
    if parent is not None:
        sys.stdout.flush()
        os._exit(0)  # at once: Python takes a second to free the modules and the model


class Lifetime:
    """The lifetime of this process: `ready` is set when it answers, and `stop` when it must end.

    `failure` is the reason, if the companion has failed.
    """

    def __init__(
        self,
        parent: int | None = None,
        log: Path | None = None,
        companion: Companion | None = None,
        *,
        grace: float = 0,
    ) -> None:
        self.ready, self.stop = threading.Event(), threading.Event()
        self.failure: HelpersError | None = None
        self._log, self._companion, self._grace = log, companion, grace
        self._is_ending, self._must_end = False, threading.Event()
        for signal_number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signal_number, self._end)
        if parent is not None:
            call_when_parent_ends(parent, self._end_without_parent)
        threading.Thread(target=self._end_in_order, name="end-in-order", daemon=True).start()
        if companion is not None:
            threading.Thread(target=self._end_with, args=[companion], name="companion-watch", daemon=True).start()

    def _end(self, number: int | None = None, *_: object) -> None:
        """End, from a signal handler too. A second signal may arrive in the middle of this."""
        if not self._is_ending:
            self._is_ending = True
            self._must_end.set()
        elif number == signal.SIGINT and (self.stop.is_set() or self._companion is None):
            self._exit(1)
        elif number == signal.SIGINT and self._companion is not None:
            self._companion.hurry()

    def _end_in_order(self) -> None:
        """Stop the companion, then the service. End a service that does not stop in time.

        That happens, for example, while it tokenizes an enormous text.
        """
        self._must_end.wait()
        if self._companion is not None:
            self._companion.stop()
        if not self.ready.is_set():
            self._exit(1)  # the model is still loading
        self.stop.set()
        time.sleep(self._grace + SECONDS_TO_STOP)
        remove_log(self._log)
        kill(psutil.Process().children(recursive=True))
        self._exit(0)

    def _end_with(self, companion: Companion) -> None:
        if (failure := companion.wait_for_failure()) is not None:
            self.failure = ServiceUnavailable(failure)
            self._end()

    def _end_without_parent(self) -> None:
        remove_log(self._log)
        self._end()

    def _exit(self, status: int) -> None:
        if self.failure is not None:
            print(to_wire(self.failure), file=sys.stderr, flush=True)
            status = 1
        os._exit(status)
