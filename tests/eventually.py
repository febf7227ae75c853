"""Wait for a condition: with a limit that only a broken program reaches, however slow the machine is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from wire import ENDLESS


def until(condition: Callable[[], Any], what: str, seconds: float = 300) -> None:
    """Return when `condition` is true. Raise `AssertionError` if it never is."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"never happened: {what}"
        time.sleep(0.02)


def until_idle(service: Any) -> None:
    """Return when nothing runs or waits in a service."""

    def is_idle() -> bool:
        info = service.info()
        return not (info.running or info.waiting)

    until(is_idle, "the service is idle")


@contextmanager
def generation_stops(service: Any) -> Iterator[None]:
    """Assert that answers of `ENDLESS` tokens, which run in the block, stop long before their end."""
    before = service.info().steps
    yield
    until_idle(service)
    assert service.info().steps - before < ENDLESS // 10
