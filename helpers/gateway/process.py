"""A gateway as a process of its own, beside a service. This module imports nothing that serves HTTP."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

SECONDS_TO_STOP = 8
"""How long running answers may go on after SIGTERM. Docker kills a container after 10 s."""


@contextmanager
def beside(service: str, arguments: Sequence[str], *, program: str) -> Iterator[None]:
    """Run a gateway for `service` in a process of its own during the block. It ends with this process in any case.

    `arguments` are those of ``python -m helpers gateway``, and `program` the code that runs `helpers.__main__`.
    """
    watched = ["--service", service, "--parent", str(os.getpid())]
    gateway: subprocess.Popen[bytes] = subprocess.Popen(
        [sys.executable, "-c", program, "gateway", *watched, *arguments], stdin=subprocess.DEVNULL
    )
    try:
        yield
    finally:
        gateway.terminate()
        try:
            gateway.wait(SECONDS_TO_STOP + 2)
        except subprocess.TimeoutExpired:
            gateway.kill()
            gateway.wait()
