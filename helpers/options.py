"""The options of a request and of a service: defaults, limits, and their form on the command line.

This module imports only the errors. So the command line, the client, the wire and the engine all check a value here,
with the same messages, and a wrong value is refused before anything is started.
"""

from __future__ import annotations

import argparse
import math
import operator
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from .errors import InvalidRequest

HOST = "127.0.0.1"
PORT = 12345
"""The article's port."""
GRACE = 8
"""The seconds that running answers have when a service stops. Docker kills a container after 10 s."""
GREEDY_TEMPERATURE = 1e-5
"""Below this, a temperature counts as 0 (vLLM's ``_SAMPLING_EPS``): dividing logits by it may overflow."""
MAX_MESSAGES, MAX_CHARACTERS = 20_000, 8_000_000
"""The limits of a dialog, far above those of any real conversation."""
MAX_STOP_STRINGS, MAX_STOP_LENGTH = 16, 256
"""The limits of stop strings. Each new token is compared with all of them, while all other answers wait."""
MAX_TOKENS = 2**31 - 1
"""The tokens that a request may ask for: the wire's limit."""
MAX_LOGPROBS = 20
"""The most likely tokens that a request may ask for at each place. OpenAI's limit."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to generate an answer. The constructor raises `InvalidRequest` for a value out of range.

    None means the default.

    - ``max_tokens``: the maximum number of tokens to generate, from 1 to 2**31 - 1.
    - ``temperature``: 0 always takes the most likely token (greedy), and so does any value below 0.00001; higher
      values, up to 2, vary more.
    - ``top_p``: sample from the most likely tokens that together reach this probability, 0 < p <= 1.
    - ``seed``: a whole number from 0 to 2**31 - 1 that makes a sample repeatable.
    - ``stop``: the answer ends before the first of these strings, at most 16 of at most 256 characters each. A single
      string is one stop string.
    - ``logprobs``: report the log-probability of each token, and of this many of the most likely tokens at its place,
      from 0 to 20. None reports nothing.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: Sequence[str] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        _set_defaults(self)
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", [self.stop])
        if self.max_tokens < 1:
            raise InvalidRequest(f"max_tokens is {self.max_tokens}. Ask for at least 1 token.")
        if self.max_tokens >= 2**31:
            raise InvalidRequest(f"max_tokens is {self.max_tokens}. Ask for at most 2**31 - 1 tokens.")
        if not (math.isfinite(self.temperature) and 0 <= self.temperature <= 2):
            raise InvalidRequest(
                f"temperature is {self.temperature}. Choose a value from 0 (always the most likely token) to 2."
            )
        if not 0 < self.top_p <= 1:
            raise InvalidRequest(f"top_p is {self.top_p}. Choose a probability above 0 and at most 1.")
        if self.seed is not None and not 0 <= self.seed < 2**31:
            raise InvalidRequest(f"seed is {self.seed}. Choose a whole number from 0 to 2**31 - 1.")
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidRequest(f"There are {len(self.stop):,} stop strings. Give at most {MAX_STOP_STRINGS}.")
        if (longest := max(map(len, self.stop), default=0)) > MAX_STOP_LENGTH:
            raise InvalidRequest(
                f"A stop string has {longest:,} characters. Give stop strings of at most {MAX_STOP_LENGTH} characters."
            )
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise InvalidRequest(
                f"logprobs is {self.logprobs}. Ask for 0 to {MAX_LOGPROBS} of the most likely tokens at each place."
            )


@dataclass(frozen=True, kw_only=True)
class EngineArgs:
    """The limits of a service. The constructor raises `InvalidRequest` for a limit under which nothing can run.

    A limit may be a string of digits, as in an environment variable. None means the default.

    - ``context_length``: tokens that a prompt and its answer may take together; None means the model's own.
    - ``max_num_seqs``: the maximum number of sequences that run at once. On two CPU cores, a step for 32 sequences
      takes about three times as long as a step for one.
    - ``max_queue_size``: the maximum number of requests that are accepted beyond ``max_num_seqs``, and wait.
    - ``cache_memory``: bytes for the KV cache; None means `helpers.kv_cache.cache_capacity` decides.
    """

    context_length: int | None = None
    max_num_seqs: int = 32
    max_queue_size: int = 64
    cache_memory: int | None = None

    def __post_init__(self) -> None:
        _set_defaults(self)
        for name, value in asdict(self).items():
            if value is not None:
                if (number := _whole_number(value)) is None:
                    raise InvalidRequest(f"{name} is {value!r}. Give a whole number.")
                object.__setattr__(self, name, number)
        if self.context_length is not None and self.context_length < 2:
            raise InvalidRequest(
                f"context_length is {self.context_length}. Choose at least 2: a prompt token and an answer token."
            )
        if self.max_num_seqs < 1:
            raise InvalidRequest(f"max_num_seqs is {self.max_num_seqs}. Choose at least 1.")
        if self.max_queue_size < 0:
            raise InvalidRequest(f"max_queue_size is {self.max_queue_size}. Choose at least 0.")
        if self.cache_memory is not None and self.cache_memory < 1:
            raise InvalidRequest(f"cache_memory is {self.cache_memory}. Choose at least 1 byte.")

    @staticmethod
    def add_to(parser: argparse.ArgumentParser) -> None:
        """Add an option for each limit to `parser`; `from_namespace` reads them back."""
        for name, help in _ENGINE_HELP.items():
            parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=help)

    @classmethod
    def from_namespace(cls, options: argparse.Namespace) -> EngineArgs:
        """Return the limits from the command line, with the defaults for the others."""
        return cls(**{field.name: getattr(options, field.name) for field in fields(cls)})

    def to_arguments(self) -> list[str]:
        """Return the words of a command line from which `from_namespace` reads the same limits."""
        return [f"--{name.replace('_', '-')}={value}" for name, value in asdict(self).items() if value is not None]


_ENGINE_HELP = {
    "context_length": "tokens that prompt and answer may take together (default: the model's context length)",
    "max_num_seqs": f"the maximum number of sequences that run at once (default: {EngineArgs.max_num_seqs})",
    "max_queue_size": f"the maximum number of requests that wait in the queue (default: {EngineArgs.max_queue_size})",
    "cache_memory": "bytes for the KV cache (default: depends on the free memory)",
}


def check_port(port: Any) -> int:
    """Return the port that a client connects to, given as a number, a string of digits, or None for the default.

    Raise `InvalidRequest` if it is anything else.
    """
    return _checked_port(port, 1, "Give the port that the service printed when it was ready.")


def check_port_to_serve(port: Any) -> int:
    """Return the port that a service listens on, given as for `check_port`, or 0 for any free port.

    Raise `InvalidRequest` if it is anything else.
    """
    return _checked_port(port, 0, "Choose one from 1 to 65535, or 0 for any free port.")


def _checked_port(port: Any, lowest: int, fix: str) -> int:
    number = PORT if port is None else _whole_number(port)
    if number is None or not lowest <= number <= 65535:
        raise InvalidRequest(f"{port!r} is not a port. {fix}")
    return number


def _whole_number(value: Any) -> int | None:
    """Return `value`, an integer or a string of digits, as an int, or None if it is anything else."""
    if isinstance(value, bool):
        return None
    try:
        return int(value) if isinstance(value, str) else operator.index(value)
    except (TypeError, ValueError):
        return None


def _set_defaults(options: SamplingParams | EngineArgs) -> None:
    """Set each field that is None to its default."""
    for field in fields(options):
        if getattr(options, field.name) is None:
            object.__setattr__(options, field.name, field.default)
