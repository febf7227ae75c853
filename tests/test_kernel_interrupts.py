"""Interrupt a real Jupyter kernel at random moments of an answer, as the stop button of a notebook does."""

from __future__ import annotations

import os
import queue
import random
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from connections import connections_to
from eventually import until, until_idle
from wire import ENDLESS

STREAM = """
for piece in helpers.stream("Tell me everything.", max_tokens={max_tokens}, port={port}):
    pass
"""
AASK = """
answer = await helpers.aask("Tell me everything.", max_tokens={max_tokens}, port={port})
"""
ASYNC_STREAM = """
async for piece in helpers.stream("Tell me everything.", max_tokens={max_tokens}, port={port}):
    pass
"""


class Kernel:
    """A kernel and its client."""

    def __init__(self) -> None:
        from jupyter_client.manager import start_new_kernel

        self.manager, self.client = start_new_kernel(kernel_name="python3", env={**os.environ, "OMP_NUM_THREADS": "1"})
        self.process = psutil.Process(self.manager.provisioner.pid)
        self.written = ""

    def run(self, code: str) -> dict[str, Any]:
        """Run `code` to its end, and return the reply."""
        return self.finish(self.client.execute(code, store_history=False))

    def finish(self, message: str, seconds: float = 300) -> dict[str, Any]:
        while True:
            reply = self.client.get_shell_msg(timeout=seconds)
            if reply["parent_header"]["msg_id"] == message:
                return reply["content"]

    def interrupt(self, code: str, seconds: float) -> dict[str, Any]:
        """Run `code`, interrupt it after `seconds`, and return the reply.

        ipykernel sends no reply if the interrupt arrives just when the cell has ended. It becomes idle in any case.
        """
        message = self.client.execute(code, store_history=False)
        self._wait_until(message, "execute_input")
        time.sleep(seconds)
        self.manager.interrupt_kernel()
        self._wait_until(message, "idle")
        try:
            return self.finish(message, seconds=30)
        except queue.Empty:
            return {"status": "ok"}

    def _wait_until(self, message: str, state: str) -> None:
        """Wait until the kernel says that `message` is in this state. Keep what the kernel writes to stderr."""
        while True:
            said = self.client.get_iopub_msg(timeout=300)
            self._keep_stderr(said)
            states = (said["msg_type"], said["content"].get("execution_state"))
            if said["parent_header"].get("msg_id") == message and state in states:
                return

    def _keep_stderr(self, said: dict[str, Any]) -> None:
        if said["msg_type"] == "stream" and said["content"]["name"] == "stderr":
            self.written += said["content"]["text"]

    def stderr(self) -> str:
        """Return what the kernel has written to stderr."""
        while self.client.iopub_channel.msg_ready():
            self._keep_stderr(self.client.get_iopub_msg(timeout=1))
        return self.written


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    pytest.importorskip("ipykernel", reason="ipykernel is not installed. Install it: pip install ipykernel")
    kernel = Kernel()
    yield kernel
    kernel.client.stop_channels()
    kernel.manager.shutdown_kernel(now=True)


@pytest.mark.parametrize("count", [pytest.param(8, id="8"), pytest.param(200, id="200", marks=pytest.mark.long)])
@pytest.mark.parametrize("code", [STREAM, AASK, ASYNC_STREAM], ids=["stream", "aask", "async for"])
def test_an_interrupted_cell_leaves_no_generation_and_no_connection(
    endless_service: Any, kernel: Kernel, code: str, count: int
) -> None:
    """Some interrupts arrive at the end of the answer, or after it. The last cell cannot end by itself."""
    port, chance = endless_service.port, random.Random(count)
    cell, endless_cell = (code.format(port=port, max_tokens=number) for number in (200, ENDLESS))
    assert kernel.run("import helpers" + cell)["status"] == "ok"  # the first call imports jina
    started = time.perf_counter()
    assert kernel.run(cell)["status"] == "ok"
    whole = time.perf_counter() - started
    moments = [*((cell, chance.uniform(0, whole)) for _ in range(count)), (endless_cell, whole)]
    for n, (interrupted, moment) in enumerate(moments):
        reply = kernel.interrupt(interrupted, moment)
        assert reply.get("ename") in (None, "KeyboardInterrupt", "CancelledError"), reply
        until_idle(endless_service)
        until(lambda: not connections_to(port, kernel.process), f"{n}: the connection closes")
        again = kernel.run(f"assert helpers.ask('And?', max_tokens=3, port={port}).completion_tokens == 3")
        assert again["status"] == "ok", again
    assert reply["status"] == "error"
    assert not kernel.stderr()
