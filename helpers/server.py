"""Run the service's own process: deploy the Executor, print that it is ready, and stop it cleanly.

`helpers.service.serve` starts this as ``python -m helpers serve``; a user can do the same in a terminal.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from .addresses import bracketed, clean_host
from .catalog import INSTALL
from .errors import ModelUnavailable, ServiceUnavailable, to_wire
from .options import HOST, PORT, EngineArgs
from .processes import call_when_parent_ends, kill, port_to_listen_on, raise_file_limit, remove_log
from .service import announce

SECONDS_TO_STOP = 5
"""The seconds that the executor has to stop before it is killed."""


def run(
    model: str = "auto",
    precision: str = "auto",
    *,
    host: str = HOST,
    port: int = PORT,
    engine_args: EngineArgs | None = None,
    parent: int | None = None,
    log: Path | None = None,
) -> None:
    """Run a service in this process until SIGTERM, Ctrl-C or the end of the process `parent`.

    When the service stops or `parent` ends, remove the file `log`, and its folder if it is then empty. After a
    failure, both stay.

    Raise `InvalidRequest` or `ServiceUnavailable` if the service cannot listen at `host` and `port`, or if Python
    removes docstrings, and `ModelUnavailable` if the packages that run a model are not installed. If the model does not
    load, print the reason on stderr and raise `SystemExit`.
    """
    if sys.flags.optimize > 1:
        raise ServiceUnavailable(
            "Python runs with -OO or PYTHONOPTIMIZE=2, which removes the docstrings that transformers needs. Start the "
            "service without it, or with -O."
        )
    host = clean_host(host)
    port = port_to_listen_on(host, port)
    raise_file_limit()
    lifetime = _Lifetime(parent, log)

    from ._jina import RuntimeFailToStart

    deployment = _deployment(model, precision, host, port, engine_args or EngineArgs())
    try:
        with deployment:
            lifetime.ready.set()
            announce(host, port)
            deployment.block(stop_event=lifetime.stop)
        remove_log(log)
    except RuntimeFailToStart:
        port_to_listen_on(host, port)  # raises if another process took the port in the meantime
        raise SystemExit(
            "The service did not start. If nothing above says why, set JINA_LOG_LEVEL=ERROR to see Jina's own log."
        ) from None


class _Lifetime:
    """The lifetime of this process: `ready` is set when it answers, and `stop` when it must end."""

    def __init__(self, parent: int | None, log: Path | None) -> None:
        self.ready, self.stop = threading.Event(), threading.Event()
        self._log = log
        for signal_number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signal_number, self._end)
        if parent is not None:
            call_when_parent_ends(parent, self._end_without_parent)
        threading.Thread(target=self._end_with_executor, name="executor-watch", daemon=True).start()
        threading.Thread(target=self._end_in_time, name="end-in-time", daemon=True).start()

    def _end(self, *_: object) -> None:
        if not self.ready.is_set():
            os._exit(1)  # the executor's process, which is still loading its model, then ends too
        self.stop.set()

    def _end_in_time(self) -> None:
        """Kill an executor that does not stop in time, for example because it is still tokenizing an enormous text."""
        self.stop.wait()
        time.sleep(SECONDS_TO_STOP)
        remove_log(self._log)
        kill(psutil.Process().children(recursive=True))
        os._exit(0)

    def _end_without_parent(self) -> None:
        remove_log(self._log)
        self._end()

    def _end_with_executor(self) -> None:
        """Report an executor that died, and end. Jina would wait for it for a minute or forever."""
        while not (executors := multiprocessing.active_children()):
            time.sleep(0.05)
        multiprocessing.connection.wait([executors[0].sentinel])
        executors[0].join()
        was_killed = (executors[0].exitcode or 0) < 0 and not self.stop.is_set()
        if was_killed or (self.ready.is_set() and not self.stop.wait(1)):
            died = "The model's process died, perhaps because memory ran out. Start the service again."
            print(to_wire(ServiceUnavailable(died)), file=sys.stderr, flush=True)
            os._exit(1)


def _deployment(model: str, precision: str, host: str, port: int, engine_args: EngineArgs) -> Any:
    """Return Jina's Deployment of `TokenStreamingExecutor`, not started yet."""
    from ._jina import Deployment, prepare_service, use_no_proxy_for

    prepare_service()
    use_no_proxy_for(host)
    try:
        from .executor import TokenStreamingExecutor
    except ModuleNotFoundError as error:
        raise ModelUnavailable(
            f"A service needs more packages than a client, and {error.name} is not installed. Install it: {INSTALL}"
        ) from error
    return Deployment(
        uses=TokenStreamingExecutor,
        uses_with={"model": model, "precision": precision, "engine_args": asdict(engine_args)},
        host=bracketed(host),
        port=port,
        protocol="grpc",
        include_gateway=False,  # Jina's gateway hides errors and repeats requests
        timeout_ready=-1,  # no limit, because a first download may take long
        grpc_server_options={
            "grpc.so_reuseport": 0,  # two services must not share a port unnoticed
            # Jina's client pings every 10 s, and gRPC closes a connection after the third ping without data.
            # Jina means to allow the pings, but gRPC does not know the names of its options.
            "grpc.http2.max_ping_strikes": 0,
        },
        proxy=True,  # a download may need the proxy of the environment
    )
