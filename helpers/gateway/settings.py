"""What all routes of a gateway share."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from starlette.requests import HTTPConnection

from .backend import Backend
from .keys import Keys
from .metrics import Metrics

MAX_BODY = 8 * 2**20
"""Bytes of a request's body, about as much as the longest dialog that a service accepts."""
KEEP_ALIVE = 15.0
"""Seconds after which a silent stream sends a comment. Proxies often end a silent connection after 60 s."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The service behind a gateway, its keys, its limits and its metrics. `created` is its start, in Unix seconds."""

    backend: Backend
    keys: Keys
    max_body: int
    keep_alive: float
    metrics: Metrics = field(default_factory=Metrics)
    created: int = field(default_factory=lambda: int(time.time()))


def settings_of(connection: HTTPConnection) -> Settings:
    """Return the settings of the gateway that a request reached."""
    settings: Settings = connection.app.state.gateway
    return settings
