"""The options of a gateway: ``python -m helpers gateway`` takes them, and ``serve --http`` hands them on."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import InvalidRequest

SECONDS_TO_STOP = 8
"""How long running answers may go on after SIGTERM, by default. Docker kills a container after 10 s."""
LOG_LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True, kw_only=True)
class GatewayArgs:
    """The options of a gateway, apart from its addresses. The constructor raises `InvalidRequest` for a wrong one.

    From `ssl_certfile` on, they are options of uvicorn, the server, with the same names. `ssl_ca_certs` also demands a
    certificate from each client. None means the default.
    """

    keys: Path | None = None
    cors: Sequence[str] | None = None
    allowed_host: Sequence[str] | None = None
    ssl_certfile: Path | None = None
    ssl_keyfile: Path | None = None
    ssl_ca_certs: Path | None = None
    root_path: str | None = None
    limit_concurrency: int | None = None
    timeout_graceful_shutdown: int | None = None
    log_level: str | None = None

    def __post_init__(self) -> None:
        if self.allowed_host:
            from ..addresses import clean_host  # not earlier: every start of a service would wait for it

            for host in self.allowed_host:
                clean_host(host)
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise InvalidRequest("TLS needs a certificate and its key. Give both files.")
        if self.ssl_ca_certs is not None and self.ssl_certfile is None:
            raise InvalidRequest("ssl_ca_certs needs TLS. Give the files of a certificate and its key too.")
        for file in (self.ssl_certfile, self.ssl_keyfile, self.ssl_ca_certs):
            if file is not None and not file.is_file():
                raise InvalidRequest(f"{file} is not a file. Name the files of the certificates and the key.")
        if self.root_path is not None and (not self.root_path.startswith("/") or self.root_path.endswith("/")):
            raise InvalidRequest(f"root_path is {self.root_path!r}. Write it like /llm.")
        if self.limit_concurrency is not None and self.limit_concurrency < 1:
            raise InvalidRequest(f"limit_concurrency is {self.limit_concurrency}. Choose at least 1.")
        if self.seconds_to_stop < 0:
            raise InvalidRequest(f"timeout_graceful_shutdown is {self.seconds_to_stop}. Choose at least 0 seconds.")

    @property
    def seconds_to_stop(self) -> int:
        """How long running answers may go on after SIGTERM."""
        return SECONDS_TO_STOP if self.timeout_graceful_shutdown is None else self.timeout_graceful_shutdown

    @staticmethod
    def add_to(parser: argparse.ArgumentParser) -> None:
        """Add the options to `parser`; `from_namespace` reads them back."""
        group = parser.add_argument_group("the gateway")
        for name, settings in _OPTIONS.items():
            group.add_argument(_option(name), **settings)

    @classmethod
    def from_namespace(cls, options: argparse.Namespace) -> GatewayArgs:
        """Return the options from the command line, with None for the others."""
        return cls(**{field.name: getattr(options, field.name) for field in fields(cls)})

    def given(self) -> list[str]:
        """Return the names of the options that were given, such as ``--keys``."""
        return [_option(field.name) for field in fields(self) if getattr(self, field.name) is not None]

    def to_arguments(self) -> list[str]:
        """Return the words of a command line from which `from_namespace` reads the same options."""
        values = {_option(field.name): getattr(self, field.name) for field in fields(self)}
        return [
            f"{option}={one}"
            for option, value in values.items()
            if value is not None
            for one in (value if isinstance(value, list) else [value])
        ]


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


_FILE = {"type": Path, "metavar": "FILE"}
_OPTIONS: dict[str, dict[str, Any]] = {
    "keys": {**_FILE, "help": "API keys, one on each line (default: none)"},
    "cors": {"action": "append", "metavar": "ORIGIN", "help": "pages of this origin may call the gateway"},
    "allowed_host": {"action": "append", "metavar": "HOST", "help": "requests may call the gateway by this name"},
    "ssl_certfile": {**_FILE, "help": "the certificate for HTTPS"},
    "ssl_keyfile": {**_FILE, "help": "the certificate's key"},
    "ssl_ca_certs": {**_FILE, "help": "clients need a certificate that one of these signed"},
    "root_path": {"metavar": "PATH", "help": "the path that a proxy removes, such as /llm"},
    "limit_concurrency": {"type": int, "metavar": "N", "help": "refuse requests while N connections are open"},
    "timeout_graceful_shutdown": {
        "type": int,
        "metavar": "SECONDS",
        "help": f"how long answers may run after SIGTERM (default: {SECONDS_TO_STOP})",
    },
    "log_level": {"choices": LOG_LEVELS, "help": "default: info"},
}
