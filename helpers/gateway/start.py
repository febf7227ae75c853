"""Start a gateway from a program or a notebook, wait until it listens, and stop it without leaving anything behind."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence

from ..addresses import join, split
from ..errors import InvalidRequest, ServiceUnavailable, find_error
from ..options import HOST
from ..processes import is_listening, port_to_listen_on
from ..progress import progress
from ..service import program_of
from .keys import VARIABLE, Keys
from .options import GatewayArgs
from .process import GatewayProcess


class Gateway:
    """A running gateway at `url`, such as ``http://127.0.0.1:8000``. OpenAI's API is at ``url + "/v1"``.

    `start_gateway` creates it. It ends with this program, even if this program is killed.
    """

    def __init__(self, services: Sequence[str], *, port: int, keys: Sequence[str]) -> None:
        self._port = port
        self.url = f"http://{join(HOST, port)}"
        # has no name, so it is gone when both programs have ended
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1"}
        environment.pop(VARIABLE, None)
        if keys:  # not as arguments, which every user of the machine can see
            environment[VARIABLE] = "\n".join(keys)
        self._process = GatewayProcess(
            services,
            GatewayArgs(timeout_graceful_shutdown=1),
            host=HOST,
            port=port,
            program=program_of("__main__"),
            log=self._log.fileno(),
            environment=environment,
        )
        try:
            self._wait_until_listening()
        except BaseException:
            self.stop()
            raise

    def __enter__(self) -> Gateway:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def __repr__(self) -> str:
        state = "running" if self._process.status is None else "stopped"
        return f"<Gateway on {self.url}, {state}>"

    def log(self) -> str:
        """Return what the gateway has written: a line for each request, without texts and keys."""
        size = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), size, 0).decode("utf-8", "replace")  # leaves the place of the writer

    def stop(self) -> None:
        """Stop the gateway and wait until it has ended. Running answers have a second. May be called twice."""
        self._process.stop()

    def _wait_until_listening(self) -> None:
        with progress("Starting the gateway"):
            while not is_listening(HOST, self._port):
                if (status := self._process.status) is not None:
                    lines = [line for line in self.log().splitlines() if line.strip()]
                    raise find_error(lines) or ServiceUnavailable(
                        f"The gateway ended with status {status} before it was ready. The end of its log:\n"
                        + "\n".join(lines[-20:])
                    )
                time.sleep(0.05)


def start_gateway(*services: str, port: int = 0, keys: Sequence[str] = ()) -> Gateway:
    """Start a gateway in front of `services`, each ``HOST:PORT``, in its own process, and wait until it listens.

    It listens on this machine only. Port 0 takes any free port. `keys` are lines ``KEY`` or ``NAME KEY``, as in a file
    of keys; without them, everyone on this machine may ask.

    Before anything is started, raise `InvalidRequest` for an invalid address or key or without any service, and
    `ServiceUnavailable` if the port is taken. Raise `ServiceUnavailable` with the end of the log if the gateway ends
    before it is ready.
    """
    if not services:
        raise InvalidRequest("The gateway has no service. Name the HOST:PORT of at least one.")
    for service in services:
        split(service)
    Keys(keys)
    return Gateway(services, port=port_to_listen_on(HOST, port), keys=keys)
