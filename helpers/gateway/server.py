"""Run a gateway in this process, until it is stopped."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import ssl
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from socket import socket

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..addresses import clean_host, is_loopback, join
from ..errors import InvalidRequest
from ..processes import call_when_parent_ends, port_to_listen_on, raise_file_limit
from .options import GatewayArgs
from .sse import SECONDS_TO_READ

PASSWORD_VARIABLE = "HELPERS_SSL_KEYFILE_PASSWORD"
"""The environment variable with the password of TLS's key: every user of the machine can see an argument."""


def run(app: FastAPI, args: GatewayArgs, *, host: str, port: int, parent: int | None) -> None:
    """Serve `app` until SIGTERM, Ctrl-C or the end of the process `parent`.

    Then accept no new requests, and give the running ones ``args.seconds_to_stop`` seconds. The log goes to stderr, one
    line for each request.

    Raise `InvalidRequest` or `ServiceUnavailable` if the gateway cannot listen at `host` and `port`, or cannot use its
    certificate.
    """
    host = clean_host(host)
    port = port_to_listen_on(host, port)
    raise_file_limit()
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("helpers.gateway").setLevel(_log_level(args))
    if not (is_loopback(host) or app.state.gateway.keys):
        log = logging.getLogger(__name__)
        log.warning("The gateway has no keys, and listens on %s: everyone who reaches it may use the model.", host)
    config = configure(app, args, host=host, port=port)
    try:
        config.load()
    except (ssl.SSLError, OSError) as error:
        raise InvalidRequest(
            f"The certificate or its key cannot be used ({error}). Name PEM files that belong together, and set "
            f"{PASSWORD_VARIABLE} if the key has a password."
        ) from None
    server = _Server(config)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, server.handle_exit)
    if parent is not None:
        call_when_parent_ends(parent, server.stop)
    server.run()


def configure(app: FastAPI, args: GatewayArgs, *, host: str, port: int) -> uvicorn.Config:
    """Return uvicorn's settings."""
    return uvicorn.Config(
        app,
        host=host,
        port=port,
        http=HttpProtocol,
        ws="none",
        log_config=None,
        log_level=max(_log_level(args), logging.WARNING),
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=args.seconds_to_stop,
        limit_concurrency=args.limit_concurrency,
        root_path=args.root_path or "",
        ssl_certfile=args.ssl_certfile,
        ssl_keyfile=None if args.ssl_keyfile is None else str(args.ssl_keyfile),
        ssl_keyfile_password=os.environ.get(PASSWORD_VARIABLE),
        ssl_ca_certs=None if args.ssl_ca_certs is None else str(args.ssl_ca_certs),
        ssl_cert_reqs=ssl.CERT_NONE if args.ssl_ca_certs is None else ssl.CERT_REQUIRED,
    )


def _log_level(args: GatewayArgs) -> int:
    level: int = getattr(logging, (args.log_level or "info").upper())
    return level


class HttpProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 for one connection.

    It closes a connection whose next headers do not arrive in time, and one whose client does not read its answer. h11
    refuses headers of more than 64 KiB.
    """

    SECONDS_FOR_HEADERS = 30.0
    SECONDS_TO_READ = float(SECONDS_TO_READ)
    _patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start to wait for headers."""
        super().connection_made(transport)
        self._deadline = self.loop.call_later(self.SECONDS_FOR_HEADERS, self._close_if_idle)

    def on_response_complete(self) -> None:
        """Start to wait for the next headers."""
        self._deadline.cancel()
        self._deadline = self.loop.call_later(self.SECONDS_FOR_HEADERS, self._close_if_idle)
        super().on_response_complete()

    def pause_writing(self) -> None:
        """Start to wait for the client to read."""
        super().pause_writing()
        self._patience = self.loop.call_later(self.SECONDS_TO_READ, self.transport.abort)

    def resume_writing(self) -> None:
        """Stop waiting for the client to read."""
        super().resume_writing()
        if self._patience is not None:
            self._patience.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        self._deadline.cancel()
        if self._patience is not None:
            self._patience.cancel()
        super().connection_lost(exc)

    def _close_if_idle(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()  # `close` would wait for a client that does not read


class _Server(uvicorn.Server):
    """uvicorn's server. It prints where it listens, and leaves the signals to `run`: status 0 after SIGTERM."""

    async def serve(self, sockets: list[socket] | None = None) -> None:
        await super().serve(sockets)
        if self.started and self.servers:  # a signal while it starts: older versions of uvicorn just return
            await self.shutdown(sockets)

    async def startup(self, sockets: list[socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        scheme = "https" if self.config.is_ssl else "http"
        url = f"{scheme}://{join(self.config.host, self.config.port)}"
        print(f"OpenAI's API on {url}/v1, and a chat page on {url}/ (Ctrl-C stops the gateway)", flush=True)

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        # uvicorn up to 0.23 waits for the servers first, which from Python 3.12 on wait for all of their connections
        for server in self.servers:
            server.close()
        self.servers = []
        await super().shutdown(sockets)

    def stop(self) -> None:
        """Stop gracefully, from any thread."""
        self.should_exit = True

    def install_signal_handlers(self) -> None:
        """Leave the signals alone (uvicorn up to 0.28)."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals alone (uvicorn from 0.29 on)."""
        yield
