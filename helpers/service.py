"""Start a service, wait until it is ready, and stop it without leaving anything behind.

`serve` runs ``python -m helpers serve`` in its own process, because a fork of a notebook's kernel would
inherit its threads, its output and its CUDA context. The service ends with the program that started it, even if
that program is killed, and frees its port. The process runs `helpers.server`.

The client is imported after the service's process has started, so that both import at the same time.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from .addresses import clean_host, host_to_ask, join
from .errors import HelpersError, InvalidRequest, ServiceUnavailable, find_error
from .hub import find_token
from .memory import check_precision
from .options import HOST, PORT, EngineArgs
from .processes import kill, port_to_listen_on
from .progress import progress

if TYPE_CHECKING:
    from .answer import Answer
    from .conversation import Conversation
    from .fields import ModelFields
    from .prompts import Message

_PROGRAM = """
import sys
if sys.path[0] == "":
    del sys.path[0]
sys.path.insert(0, {project!r})
import helpers
sys.path.append(sys.path.pop(0))
from helpers.{module} import main
sys.exit(main())
"""
"""Runs a module of this package. The working directory, which may hold another `helpers`, is not on ``sys.path``: the
option ``-P`` does that too, but not in Python 3.10."""


def program_of(module: str) -> str:
    """Return the code for ``python -c`` that runs `main` of a module of this package, wherever the package is."""
    return _PROGRAM.format(project=str(Path(__file__).parents[1]), module=module)


def ready_line(host: str, port: int) -> str:
    """Return the line that a service's process prints when it is ready: the one sign of readiness."""
    return f"Ready on {join(host, port)}. Ctrl-C stops the service."


def announce(host: str, port: int) -> None:
    """Print the `ready_line`. The service's process calls this when it is ready."""
    sys.stdout.write(ready_line(host, port) + "\n")  # one write, which no other thread's output can break up
    sys.stdout.flush()


def serve(
    model: str = "auto", precision: str = "auto", *, host: str = HOST, port: int = PORT, **engine_args: Any
) -> Service:
    """Start a service and wait until it is ready. Use it as ``with helpers.serve() as service:``.

    - `model` and `precision` as in `helpers.models.load`.
    - `host`: the address to listen on, IPv4 or IPv6. Other machines cannot reach the default, the loopback address.
    - `port`: 0 takes any free port.
    - `engine_args`: the fields of `helpers.options.EngineArgs`.

    Before anything is started, raise `InvalidRequest` for an unknown precision, a limit out of range or an invalid
    host, and `ServiceUnavailable` if there is no folder for the log, or if the port is taken (the message says by
    what). If the service ends before it is ready, raise `ModelUnavailable` if the model is the reason, and otherwise
    `ServiceUnavailable` with the end of the log.
    """
    check_precision(precision)
    limits = EngineArgs(**engine_args)
    host = clean_host(host)
    port = port_to_listen_on(host, port)
    options = ["--model", model, "--precision", precision, "--host", host, "--grace=0", *limits.to_arguments()]
    return Service("__main__", ["serve"], options, host=host, port=port)


def serve_script(script: str | Path, *arguments: str, port: int = PORT) -> Service:
    """Run a Python script that deploys an `Executor` on `port`, and wait until it is ready.

    The script ends as the article's does: ``with Deployment(..., port=12345, protocol="grpc") as dep: dep.block()``.
    It runs as with ``python script *arguments``, in its own process, and stops like a service of `serve`. Its Executors
    do not wait for each other or for those of another service, as Jina would make them.

    Raise `InvalidRequest` if there is no such file, and `ServiceUnavailable` if the port is taken, or, with the end of
    its log, if the script ends.
    """
    script = os.path.expanduser(script)
    if not os.path.isfile(script):
        raise InvalidRequest(f"{script} is not a file. Name the script that deploys the service.")
    port = port_to_listen_on(HOST, port)
    return Service("script", [], [script, *arguments], host=HOST, port=port)


class Service:
    """A running service: `host`, `port`, `pid`, and `log`, the file that it writes its log into.

    `serve` and `serve_script` create it. The constructor returns when the service is ready.
    """

    def __init__(self, module: str, command: Sequence[str], arguments: Sequence[str], *, host: str, port: int) -> None:
        self.host = host_to_ask(host)
        self.port = port
        environment = _environment()
        program = program_of(module)
        self._owner = os.getpid()
        self.log = _folder_for_log() / "service.log"
        watched = ["--port", str(port), "--parent", str(os.getpid()), "--log", str(self.log)]
        try:
            with self.log.open("wb") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-c", program, *command, *watched, *arguments],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C here, or a kernel's interrupt, must not reach it
                )
        except BaseException:
            shutil.rmtree(self.log.parent, ignore_errors=True)
            raise
        self.pid = self._process.pid
        try:
            from . import conversation  # noqa: F401  while the service starts

            self._wait_until_ready(ready_line(host, port))
        except BaseException:
            self.stop()
            raise

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def __repr__(self) -> str:
        state = "running" if self._process.poll() is None else "stopped"
        return f"<Service on {join(self.host, self.port)}, {state}>"

    def stream(self, messages: str | Sequence[Message] | None = None, **options: Any) -> Answer:
        """Ask this service, as `helpers.stream` does."""
        from . import client

        return client.stream(messages, host=self.host, port=self.port, **options)

    def ask(self, messages: str | Sequence[Message] | None = None, **options: Any) -> Answer:
        """Ask this service and wait for the complete answer, as `helpers.ask` does."""
        from . import client

        return client.ask(messages, host=self.host, port=self.port, **options)

    def conversation(self, system: str | None = None, **options: Any) -> Conversation:
        """Return a `helpers.Conversation` with this service."""
        from .conversation import Conversation

        return Conversation(system, host=self.host, port=self.port, **options)

    def info(self) -> ModelFields:
        """Return this service's model and load, as `helpers.info` does."""
        from . import client

        return client.info(host=self.host, port=self.port)

    def stop(self) -> None:
        """Stop the service, and wait until its processes and its log are gone. May be called twice.

        In a fork of the program that started the service, do nothing.
        """
        if self._owner != os.getpid():
            return
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

    def _wait_until_ready(self, ready: str) -> None:
        """Wait until the log contains `ready`, and show the latest line of the log meanwhile."""
        with progress("Starting the service") as show, self.log.open(encoding="utf-8", errors="replace") as log:
            unfinished = ""
            while True:
                if self._process.poll() is not None:
                    raise self._failure()
                *lines, unfinished = (unfinished + log.read()).split("\n")  # the log may end in the middle of a line
                # a script's own output may precede it in the same line
                if any(ready in line for line in [*lines, unfinished]):
                    return
                if shown := [line for line in [*lines, unfinished] if line.strip()]:
                    show(shown[-1])
                time.sleep(0.02)

    def _failure(self) -> HelpersError:
        lines = [line for line in self.log.read_text("utf-8", errors="replace").splitlines() if line.strip()]
        if hasattr(signal, "SIGKILL") and self._process.returncode == -signal.SIGKILL:  # not on Windows
            return ServiceUnavailable(
                "The service was killed, perhaps because memory ran out. Close other programs and start it again."
            )
        return find_error(lines) or ServiceUnavailable(
            f"The service ended with status {self._process.returncode} before it was ready. "
            "The end of its log:\n" + "\n".join(lines[-20:])
        )


def _folder_for_log() -> Path:
    try:
        return Path(tempfile.mkdtemp(prefix="helpers-service-"))
    except OSError as error:
        raise ServiceUnavailable(
            f"The service has no folder for its log ({error.strerror or error}). "
            "Set TMPDIR to a folder that you can write to, with free space."
        ) from error


def _environment() -> dict[str, str]:
    """Return the environment of a service's process."""
    environment = {
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        "PYTHONUTF8": "1",  # reads a model's path in a locale that knows ASCII only
        "TQDM_POSITION": "-1",  # huggingface_hub then shows its bars in a log too, and `progress` passes them on
    }
    if environment.get("PYTHONOPTIMIZE", "") not in ("", "0"):
        environment["PYTHONOPTIMIZE"] = "1"  # 2 removes the docstrings, which transformers needs
    if (token := find_token()) and token.usable:
        environment["HF_TOKEN"] = token.value  # not as an argument, which every user of the machine can see
    return environment
