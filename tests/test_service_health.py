"""gRPC's health protocol: when a service says that it serves, and how it drains before it stops."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

import helpers
from background_program import Program
from eventually import until
from helpers.processes import is_listening, port_to_listen_on
from helpers.wire import open_channel
from wire import ENDLESS, SLOW

SERVING, NOT_SERVING = HealthCheckResponse.SERVING, HealthCheckResponse.NOT_SERVING
LONG = 1000
"""Tokens of an answer that a test reads to its end, while the service stops."""


class Watch:
    """A client that watches the health of the service on `port`. `seen` holds what it has been told."""

    def __init__(self, port: int) -> None:
        self.seen: list[int] = []
        self.channel = open_channel(f"127.0.0.1:{port}", {"grpc.enable_http_proxy": 0})
        replies = HealthStub(self.channel).Watch(HealthCheckRequest())
        self.seen.append(next(replies).status)
        threading.Thread(target=self._read, args=(replies,), daemon=True).start()

    def _read(self, replies: Any) -> None:
        try:
            self.seen.extend(reply.status for reply in replies)
        except Exception:
            self.seen.append(-1)  # the connection has ended

    def close(self) -> None:
        self.channel.close()


@pytest.fixture
def small_service(script: Callable[..., Program], endless_folder: Path) -> Callable[..., tuple[Program, int]]:
    """Start a service in the foreground, which answers one request at a time."""

    def start(*options: str) -> tuple[Program, int]:
        port = port_to_listen_on("127.0.0.1", 0)
        model = ("--model", str(endless_folder), "--precision=fp32", "--max-num-seqs=1")
        program = script("-m", "helpers", "serve", *model, "--port", str(port), *options)
        program.wait_for("Ready")
        return program, port

    return start


def test_a_service_serves_until_its_queue_is_full(small_service: Any) -> None:
    _, port = small_service("--max-queue-size=0")
    with ExitStack() as watches:
        leaving, staying = (watches.enter_context(closing(Watch(port))) for _ in range(2))
        assert leaving.seen == staying.seen == [SERVING]
        answer = helpers.stream(prompt=SLOW, max_tokens=ENDLESS, port=port)
        texts = iter(answer)
        next(texts)  # alone, it fills the queue
        until(lambda: NOT_SERVING in leaving.seen and NOT_SERVING in staying.seen, "the service says that it is full")
        leaving.channel.close()
        answer.stop()
        until(lambda: staying.seen[-1] == SERVING, "there is room again")


def test_a_service_that_stops_refuses_requests_and_finishes_the_running_answer(small_service: Any) -> None:
    program, port = small_service("--grace=300", "--max-queue-size=1")
    with closing(Watch(port)) as watch:
        answer = helpers.stream(prompt=SLOW, max_tokens=LONG, port=port)
        texts = iter(answer)
        next(texts)
        program.process.send_signal(signal.SIGTERM)
        until(lambda: NOT_SERVING in watch.seen, "the service says that it stops")
        until(lambda: not is_listening("127.0.0.1", port), "new requests are refused")
        for _ in texts:
            pass
        assert (answer.finish_reason, answer.completion_tokens) == ("length", LONG)
    assert program.process.wait(300) == 0
    assert "Traceback" not in program.log.read_text()
