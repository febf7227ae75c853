"""A gateway for tests: a real HTTP server on a free port, in a thread of the test's own process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI

from eventually import until
from helpers.gateway import create_app
from helpers.gateway.options import GatewayArgs
from helpers.gateway.records import Record
from helpers.gateway.server import configure
from helpers.processes import port_to_listen_on


class RunningGateway:
    """`url` ends with ``/v1``, `port` is its port, and `records` holds a record of each request that has ended."""

    def __init__(self, port: int) -> None:
        self.port, self.root = port, f"http://127.0.0.1:{port}"
        self.url = f"{self.root}/v1"
        self.records: list[Record] = []

    def wait_for_records(self, count: int) -> list[Record]:
        """Return the records when `count` requests have ended."""
        until(lambda: len(self.records) >= count, f"{count} requests ended")
        return self.records


@contextmanager
def running_gateway(
    *services: int | str, mounted_at: str = "", port: int = 0, **options: Any
) -> Iterator[RunningGateway]:
    """Run a gateway during the block, for services that are ports or URLs. `mounted_at` is its place in another app."""
    gateway = RunningGateway(port_to_listen_on("127.0.0.1", port))
    app = create_app([f"127.0.0.1:{one}" if isinstance(one, int) else one for one in services], **options)
    metrics = app.state.gateway.metrics
    add = metrics.add

    def add_and_keep(record: Record) -> None:
        add(record)
        if record.method != "PRI":  # gRPC's greeting: an earlier test's channel may look for its service on this port
            gateway.records.append(record)

    metrics.add = add_and_keep
    if mounted_at:
        inner, app = app, FastAPI()
        app.mount(mounted_at, inner)
    with running_app(app, gateway.port):
        yield gateway


@contextmanager
def running_app(app: Any, port: int) -> Iterator[None]:
    """Serve an ASGI app during the block, with a gateway's own server."""
    config = configure(app, GatewayArgs(timeout_graceful_shutdown=1), host="127.0.0.1", port=port)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        until(lambda: server.started, "the server listens")
        yield
    finally:
        server.should_exit = True
        thread.join()
