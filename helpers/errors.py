"""The exceptions of this package. Each class stands for one kind of failure that a caller handles differently.

A message says what is wrong, and then what to do. Class names cross the wire, so a failure inside the service
is raised in the client's program as the same class.
"""

from __future__ import annotations

from collections.abc import Iterable


class HelpersError(Exception):
    """The base class. The text of these exceptions is written for users: show it as it is."""


class InvalidRequest(HelpersError, ValueError):
    """The request cannot be answered as it stands. Change it and ask again."""


class ModelUnavailable(HelpersError):
    """The model cannot be found, downloaded or loaded, or it does not fit into memory."""


class ServiceUnavailable(HelpersError, ConnectionError):
    """The service cannot start, does not answer, or went away before the answer was complete."""


class QueueFull(ServiceUnavailable):
    """The service's queue is full. Ask again after the time that the message gives."""


class GenerationFailed(HelpersError, RuntimeError):
    """The model raised an exception during generation. The text so far is not a complete answer."""


_BY_NAME = {
    cls.__name__: cls for cls in (InvalidRequest, ModelUnavailable, ServiceUnavailable, QueueFull, GenerationFailed)
}


def to_wire(error: BaseException) -> str:
    """Return `error` as one line of text, ``"ClassName: message"``, which `from_wire` reads back.

    An exception that is not a `HelpersError` becomes a `GenerationFailed` that quotes it.
    """
    if not isinstance(error, HelpersError):
        error = GenerationFailed(
            f"The service failed ({type(error).__name__}: {error}), so the answer is not complete. "
            "Ask again, and look into the service's log if it fails again."
        )
    return " ".join(f"{type(error).__name__}: {error}".split())


def from_wire(text: str) -> HelpersError:
    """Return the exception that `to_wire` described, ready to be raised."""
    return find_error([text]) or HelpersError(text)


def find_error(lines: Iterable[str]) -> HelpersError | None:
    """Return the exception of the last line that `to_wire` wrote, or None. `lines` may be those of a log."""
    for line in reversed(list(lines)):
        name, _, message = line.partition(": ")
        if name in _BY_NAME:
            return _BY_NAME[name](message)
    return None
