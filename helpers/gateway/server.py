"""Run a gateway in this process, until it is stopped."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import socket

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..addresses import clean_host, is_loopback, join
from ..errors import InvalidRequest
from ..processes import call_when_parent_ends, port_to_listen_on, raise_file_limit
from .process import SECONDS_TO_STOP


def run(app: FastAPI, *, host: str, port: int, certificate: Path | None, key: Path | None, parent: int | None) -> None:
    """Serve `app` until SIGTERM, Ctrl-C or the end of the process `parent`.

    Then accept no new requests, and give the running ones `SECONDS_TO_STOP` seconds. `certificate` and `key` are files
    for TLS. The log goes to stderr, one line for each request.

    Raise `InvalidRequest` or `ServiceUnavailable` if the gateway cannot listen at `host` and `port`.
    """
    host = clean_host(host)
    port = port_to_listen_on(host, port)
    check_tls(certificate, key)
    raise_file_limit()
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("helpers.gateway").setLevel(logging.INFO)
    if not (is_loopback(host) or app.state.gateway.keys):
        log = logging.getLogger(__name__)
        log.warning("The gateway has no keys, and listens on %s: everyone who reaches it may use the model.", host)
    server = _Server(configure(app, host=host, port=port, certificate=certificate, key=key))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, server.handle_exit)
    if parent is not None:
        call_when_parent_ends(parent, server.stop)
    server.run()


def configure(
    app: FastAPI, *, host: str, port: int, certificate: Path | None = None, key: Path | None = None
) -> uvicorn.Config:
    """Return uvicorn's settings."""
    return uvicorn.Config(
        app,
        host=host,
        port=port,
        http=HttpProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=SECONDS_TO_STOP,
        ssl_certfile=certificate,
        ssl_keyfile=None if key is None else str(key),
    )


class HttpProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 for one connection. It closes a connection whose next headers do not arrive in time.

    h11 refuses headers of more than 64 KiB.
    """

    SECONDS_FOR_HEADERS = 30.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start to wait for headers."""
        super().connection_made(transport)
        self._deadline = self.loop.call_later(self.SECONDS_FOR_HEADERS, self._close_if_idle)

    def on_response_complete(self) -> None:
        """Start to wait for the next headers."""
        self._deadline.cancel()
        self._deadline = self.loop.call_later(self.SECONDS_FOR_HEADERS, self._close_if_idle)
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        self._deadline.cancel()
        super().connection_lost(exc)

    def _close_if_idle(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


def check_tls(certificate: Path | None, key: Path | None) -> None:
    """Raise `InvalidRequest` if one of the files for TLS is missing."""
    if (certificate is None) != (key is None):
        raise InvalidRequest("TLS needs a certificate and its key. Give both files.")
    for file in (certificate, key):
        if file is not None and not file.is_file():
            raise InvalidRequest(f"{file} is not a file. Name the files of the certificate and its key.")


class _Server(uvicorn.Server):
    """uvicorn's server. It prints where it listens, and leaves the signals to `run`: status 0 after SIGTERM."""

    async def startup(self, sockets: list[socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        scheme = "https" if self.config.is_ssl else "http"
        url = f"{scheme}://{join(self.config.host, self.config.port)}"
        print(f"OpenAI's API on {url}/v1, and a chat page on {url}/ (Ctrl-C stops the gateway)", flush=True)

    def stop(self) -> None:
        """Stop gracefully, from any thread."""
        self.should_exit = True

    def install_signal_handlers(self) -> None:
        """Leave the signals alone (uvicorn up to 0.28)."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals alone (uvicorn from 0.29 on)."""
        yield
