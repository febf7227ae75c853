"""Start a service, wait until it answers, and stop it so that nothing is left.

`serve` runs ``python -m helpers serve`` as a process of its own: a fork of a notebook's kernel would
inherit its threads, its output and its CUDA context. `run` is what that process does. The service
dies with the program that started it, also when that is killed, and frees its port.
"""

from __future__ import annotations

import multiprocessing.connection
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Callable, Sequence

import psutil

from . import access, client
from .client import HOST, PORT
from .errors import HelpersError, ModelUnavailable, ServiceUnavailable, find_error, to_wire
from .processes import kill, port_to_listen_on, remove_log, wait_for_end_of_parent
from .progress import progress
from .prompts import Message
from .schemas import ModelDocument

_READY = "Ready"
_PROJECT = Path(__file__).parents[1]


def serve(
    model: str = "auto",
    precision: str = "auto",
    *,
    host: str = HOST,
    port: int = PORT,
    context_length: int | None = None,
    max_live: int | None = None,
    max_waiting: int | None = None,
    cache_memory: int | None = None,
) -> "Service":
    """Start a service and wait until it answers; use it as ``with helpers.serve() as service:``.

    `model` and `precision` are those of `helpers.models.load`. `port` 0 takes a free one. `host` is where
    it listens; other machines reach it only if that is not the loopback address. The limits, of tokens that
    prompt and answer may take together, of readers who are answered at once, of those in line, and of bytes
    for keys and values, are explained at `helpers.engine.Engine`.

    Raises `ServiceUnavailable` if the port is taken, and says by whom; `ModelUnavailable` or
    `InvalidRequest` where the model is the reason; and `ServiceUnavailable`, with the end of the service's
    log, where it ends for a reason of its own.
    """
    limits = {
        "context-length": context_length,
        "max-live": max_live,
        "max-waiting": max_waiting,
        "cache-memory": cache_memory,
    }
    port = port_to_listen_on(host, port)
    words = ["--model", model, "--precision", precision, "--host", host, "--port", str(port)]
    words += [f"--{name}={value}" for name, value in limits.items() if value is not None]
    service = Service("helpers", "serve", *words, host=host, port=port)
    service._wait(lambda: any(line.startswith(_READY) for line in service._lines()) and bool(service.info()))
    return service


def serve_script(script: str | Path, *arguments: str, port: int = PORT) -> "Service":
    """Run a Python script of your own that deploys an `Executor` on `port`, and wait until it answers.

    For a script as in the article, that ends in ``with Deployment(..., port=12345, protocol="grpc") as dep: dep.block()``.
    `arguments` are its ``sys.argv[1:]``. It runs as a process of its own, like `serve`, and ends like one.

    Raises `ServiceUnavailable` if the port is taken, or, with the end of its log, where the script ends.
    """
    port = port_to_listen_on(HOST, port)
    service = Service("helpers.script", str(script), *arguments, host=HOST, port=port)
    service._wait(lambda: client.is_ready(host=HOST, port=port))
    return service


class Service:
    """A running service: `host`, `port`, `pid`, and `log`, the file that it writes its log into."""

    def __init__(self, *command: str, host: str, port: int) -> None:
        self.host = HOST if host == "0.0.0.0" else host
        self.port = port
        # PYTHONSAFEPATH: the working directory may hold another `helpers`
        path = os.pathsep.join(filter(None, [str(_PROJECT), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONSAFEPATH": "1", "PYTHONPATH": path}
        environment["TQDM_POSITION"] = "-1"  # huggingface_hub's bars in a log too: `_wait` shows them
        if (token := access.find_token()) and token.usable:
            environment["HF_TOKEN"] = token.value  # by environment: arguments are seen by everybody
        self.log = Path(tempfile.mkdtemp(prefix="helpers-service-")) / "service.log"
        command = (*command, "--parent", str(os.getpid()), "--log", str(self.log))
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *command],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C here, or a kernel's interrupt, is not meant for it
            )
        self.pid = self._process.pid

    def __enter__(self) -> "Service":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def __repr__(self) -> str:
        state = "running" if self._process.poll() is None else "stopped"
        return f"<Service on {self.host}:{self.port}, {state}>"

    def stream(self, messages: str | Sequence[Message] | None = None, **options: Any) -> client.Answer:
        """`helpers.stream`, asking this service."""
        return client.stream(messages, host=self.host, port=self.port, **options)

    def ask(self, messages: str | Sequence[Message] | None = None, **options: Any) -> client.Answer:
        """`helpers.ask`, asking this service."""
        return client.ask(messages, host=self.host, port=self.port, **options)

    def conversation(self, system: str | None = None, **options: Any) -> client.Conversation:
        """A `helpers.Conversation` with this service."""
        return client.Conversation(system, host=self.host, port=self.port, **options)

    def info(self) -> ModelDocument:
        """`helpers.info` of this service."""
        return client.info(host=self.host, port=self.port)

    def stop(self) -> None:
        """Stop the service and wait until its processes and its log are gone. May be called twice."""
        if self._process.poll() is None:
            children = psutil.Process(self.pid).children(recursive=True)
            self._process.terminate()
            try:
                self._process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            _, alive = psutil.wait_procs(children, timeout=5)
            kill(alive)
        shutil.rmtree(self.log.parent, ignore_errors=True)

    def _wait(self, is_ready: Callable[[], bool]) -> None:
        """Return once it is ready; until then show what its log says last. Stops it where it does not get so far."""
        try:
            with progress("Starting the service") as show:
                while not is_ready():
                    if self._process.poll() is not None:
                        raise self._failure()
                    show(*self._lines()[-1:])
                    time.sleep(0.05)
        except BaseException:
            self.stop()
            raise

    def _lines(self) -> list[str]:
        """What the service has written, a progress bar's every state as a line."""
        return [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]

    def _failure(self) -> HelpersError:
        lines = self._lines()
        return find_error(lines) or ServiceUnavailable(
            f"The service ended with status {self._process.returncode} before it was ready. "
            "The end of its log:\n" + "\n".join(lines[-20:])
        )


def run(
    model: str = "auto",
    precision: str = "auto",
    *,
    host: str = HOST,
    port: int = PORT,
    parent: int | None = None,
    log: Path | None = None,
    **limits: int,
) -> None:
    """Be a service, in the foreground, until SIGTERM, Ctrl-C or the end of the process `parent`.

    Prints a line that begins with "Ready" once it answers. When it stops, or `parent` ends, the file `log`
    goes, and its folder if that is empty then; after a failure they stay. The `limits` are those of `serve`.

    Raises what `serve` raises for a port, and `ModelUnavailable` where the packages that run a model are
    missing. Where the model does not load, the reason is printed on stderr and `SystemExit` raised.
    """
    port = port_to_listen_on(host, port)

    ready, stop = threading.Event(), threading.Event()

    def end(*_: object) -> None:
        if not ready.is_set():
            os._exit(1)  # the executor's process, still loading its model, follows
        stop.set()

    def end_with_parent() -> None:
        wait_for_end_of_parent(parent)
        remove_log(log)
        end()

    def end_with_executor() -> None:
        while not (executors := multiprocessing.active_children()):
            time.sleep(0.05)
        multiprocessing.connection.wait([executors[0].sentinel])
        executors[0].join()
        killed = (executors[0].exitcode or 0) < 0
        if killed or (ready.is_set() and not stop.wait(1)):
            # Jina would wait for it, a minute or for ever
            died = "The model's process has died, perhaps for want of memory. Start the service again."
            print(to_wire(ServiceUnavailable(died)), file=sys.stderr, flush=True)
            os._exit(1)

    for signal_number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signal_number, end)
    watchers = [end_with_executor] if parent is None else [end_with_executor, end_with_parent]
    for watch in watchers:
        threading.Thread(target=watch, daemon=True).start()

    from ._jina import Deployment, RuntimeFailToStart

    try:
        from .executor import TokenStreamingExecutor
    except ModuleNotFoundError as error:
        raise ModelUnavailable(
            f"A service needs more than a client does, and {error.name} is not installed. "
            f"Install it: {access.INSTALL}"
        ) from error

    deployment = Deployment(
        uses=TokenStreamingExecutor,
        uses_with={"model": model, "precision": precision, "parent": os.getpid(), **limits},
        host=host,
        port=port,
        protocol="grpc",
        include_gateway=False,  # Jina's gateway hides errors and repeats requests
        timeout_ready=-1,  # a first download takes as long as it takes
        grpc_server_options={
            "grpc.so_reuseport": 0,  # two services must not share a port unnoticed
            # Jina's clients ping a connection every 10 s, and gRPC would cut off all of its readers for the third ping
            # in silence (Jina means to allow it, by options whose names gRPC does not know)
            "grpc.http2.max_ping_strikes": 0,
        },
        proxy=True,  # a download may need it
    )
    try:
        with deployment:
            ready.set()
            print(f"{_READY} on {host}:{port}. Ctrl-C stops the service.", flush=True)
            deployment.block(stop_event=stop)
        remove_log(log)
    except RuntimeFailToStart:
        port_to_listen_on(host, port)  # has somebody else been quicker?
        raise SystemExit(
            "The service did not start. If nothing above says why, JINA_LOG_LEVEL=ERROR lets Jina tell."
        ) from None
