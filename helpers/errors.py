"""The exceptions of this package, told apart by who can cure what happened.

Each message is a sentence or two: what happened, and what to do now. The names cross the wire, so
that a failure inside the service is raised in the reader's program as the same class.
"""

from __future__ import annotations

from collections.abc import Iterable


class HelpersError(Exception):
    """Anything that this package reports on purpose. Its text is meant to be shown as it is."""


class InvalidRequest(HelpersError, ValueError):
    """The request cannot be answered as it stands: ask differently."""


class ModelUnavailable(HelpersError):
    """A model cannot be found, may not be downloaded, does not fit or does not load here."""


class ServiceUnavailable(HelpersError, ConnectionError):
    """No service could start, none answers, or it went away before its answer was complete."""


class ServiceBusy(ServiceUnavailable):
    """As many readers as the service takes are there already: ask again, in the time that the message says."""


class GenerationFailed(HelpersError, RuntimeError):
    """The model raised while it was generating: what came before is not a whole answer."""


_BY_NAME = {
    cls.__name__: cls
    for cls in (InvalidRequest, ModelUnavailable, ServiceUnavailable, ServiceBusy, GenerationFailed)
}


def to_wire(error: BaseException) -> str:
    """One line of text for `error`, ``"ClassName: message"``, which `from_wire` reads back.

    An exception from outside this family becomes a `GenerationFailed` that quotes it.
    """
    if not isinstance(error, HelpersError):
        error = GenerationFailed(
            f"The service failed ({type(error).__name__}: {error}). What came before is not a whole answer; "
            "ask again, and look into the service's log if it happens again."
        )
    return " ".join(f"{type(error).__name__}: {error}".split())


def from_wire(text: str) -> HelpersError:
    """The exception that `to_wire` described, ready to be raised."""
    return find_error([text]) or HelpersError(text)


def find_error(lines: Iterable[str]) -> HelpersError | None:
    """The exception of the last of `lines`, such as those of a log, that `to_wire` wrote, or None."""
    for line in reversed(list(lines)):
        name, _, message = line.partition(": ")
        if name in _BY_NAME:
            return _BY_NAME[name](message)
    return None
