"""A gateway as a process of its own, beside a service. This module imports nothing that serves HTTP."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from ..addresses import join
from .options import GatewayArgs

_SECONDS_BEYOND = 2
"""How long a gateway may take to end after its running answers have ended."""


class GatewayProcess:
    """A gateway at `host` and `port` for `services`, in a process of its own. It ends with this process in any case.

    `program` is the code that runs `helpers.__main__`. `log` is a file descriptor for its output, and `environment` its
    environment variables; by default, both are those of this process.
    """

    def __init__(
        self,
        services: Sequence[str],
        args: GatewayArgs,
        *,
        host: str,
        port: int,
        program: str,
        log: int | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._address, self._seconds_to_stop = join(host, port), args.seconds_to_stop
        self._must_stop = False
        words = [word for service in services for word in ("--service", service)]
        words += ["--host", host, "--port", str(port), "--parent", str(os.getpid())]
        self._process: subprocess.Popen[bytes] = subprocess.Popen(
            [sys.executable, "-c", program, "gateway", *words, *args.to_arguments()],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,  # Ctrl-C in a terminal must reach this process only, which stops both in order
        )

    @property
    def status(self) -> int | None:
        """Return the exit status, or None while the gateway runs."""
        return self._process.poll()

    def stop(self) -> None:
        """Stop the gateway and wait until it has ended. Running answers may go on for a while. May be called twice."""
        self._must_stop = True
        self._process.terminate()
        try:
            self._process.wait(self._seconds_to_stop + _SECONDS_BEYOND)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def hurry(self) -> None:
        """End the running answers of a gateway that stops. A signal handler may call this."""
        if self._must_stop and hasattr(signal, "SIGKILL"):  # not on Windows
            self._process.send_signal(signal.SIGINT)

    def wait_for_failure(self) -> str | None:
        """Wait until the gateway has ended. Return a sentence that says how, or None if `stop` was called."""
        status = self._process.wait()
        if self._must_stop:
            return None
        how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
        return f"The gateway on {self._address} {how}, and the service ends with it. Read the log and start both again."


@contextmanager
def beside(
    services: Sequence[str], args: GatewayArgs, *, host: str, port: int, program: str
) -> Iterator[GatewayProcess]:
    """Run a `GatewayProcess` during the block."""
    gateway = GatewayProcess(services, args, host=host, port=port, program=program)
    try:
        yield gateway
    finally:
        gateway.stop()
