"""The TCP connections of a process, for tests that assert that none is left."""

from __future__ import annotations

from typing import Any

import psutil


def connections_to(port: int, process: psutil.Process | None = None) -> list[Any]:
    """Return the connections of a process, by default this one, to `port`."""
    connections = (process or psutil.Process()).net_connections("tcp")
    return [one for one in connections if one.raddr and one.raddr.port == port]
