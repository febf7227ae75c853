"""Estimate how many clients a service can have, how much memory they take, and what their tokens cost.

The estimates come from measured step times (`StepTimes`). Standard library only. `helpers.simulation` says how long
clients wait.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from .errors import InvalidRequest


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """How long a step of the engine takes.

    - ``decode``: the number of sequences that read one token each → seconds of a step. Between two numbers, the time
      grows evenly, and beyond the largest as between the last two.
    - ``prompt_token``: the seconds that each prompt token adds to a step.
    """

    decode: Mapping[int, float]
    prompt_token: float

    def __post_init__(self) -> None:
        if not self.decode:
            raise InvalidRequest("decode is empty. Give the seconds of a step for at least 1 sequence.")
        for seconds in [*self.decode.values(), self.prompt_token]:
            require_positive("A step time", seconds)

    def seconds(self, sequences: int, prompt_tokens: int = 0) -> float:
        """Return the seconds of a step of `sequences`, some of which may read a part of their prompts: `prompt_tokens`
        in all."""
        sizes = sorted(self.decode)
        lower = max([size for size in sizes[:-1] if size <= sequences], default=sizes[0])
        upper = min([size for size in sizes if size > lower], default=lower)
        time = self.decode[lower]
        if upper > lower and sequences > lower:
            time += (self.decode[upper] - time) * (sequences - lower) / (upper - lower)
        return time + prompt_tokens * self.prompt_token

    def inter_token_latency(self, clients: int, *, prompt_tokens: int = 0, completion_tokens: int = 1) -> float:
        """Return the mean seconds between two tokens of a client, while `clients` answers run all the time.

        Each answer has `completion_tokens`, after a prompt of which `prompt_tokens` are not in the prefix cache.
        """
        return self.seconds(clients) + clients * prompt_tokens / completion_tokens * self.prompt_token


def max_clients(
    step_times: StepTimes,
    *,
    inter_token_latency: float,
    prompt_tokens: int = 0,
    completion_tokens: int = 1,
    max_num_seqs: int = 32,
) -> int:
    """Return how many answers can run at once on one replica if a client waits at most `inter_token_latency` seconds
    for a token, on average. The result is 0 if even one client waits longer, and at most `max_num_seqs`."""
    lengths = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
    clients = 0
    while clients < max_num_seqs and step_times.inter_token_latency(clients + 1, **lengths) <= inter_token_latency:
        clients += 1
    return clients


def max_rate(step_times: StepTimes, *, clients: int = 32, prompt_tokens: int, completion_tokens: int) -> float:
    """Return the requests per second that one replica answers while `clients` answers run all the time.

    If more arrive, the queue grows without end.
    """
    latency = step_times.inter_token_latency(clients, prompt_tokens=prompt_tokens, completion_tokens=completion_tokens)
    return clients / (completion_tokens * latency)


def cache_bytes_per_token(*, layers: int, kv_heads: int, head_size: int, bytes_per_value: float) -> int:
    """Return the bytes of the KV cache for one token: a key and a value in each layer, for each KV head.

    `bytes_per_value` is 4 for fp32 and 2 for 16 bit.
    """
    return math.ceil(2 * layers * kv_heads * head_size * bytes_per_value)


def max_sequences(cache_bytes: int, *, bytes_per_token: int, tokens: int) -> int:
    """Return how many sequences of `tokens` tokens, prompt and answer together, a KV cache of `cache_bytes` holds."""
    require_positive("tokens", tokens)
    return cache_bytes // (bytes_per_token * tokens)


def cost_per_million_tokens(*, price_per_hour: float, tokens_per_second: float, utilisation: float = 1.0) -> float:
    """Return the cost of a million tokens, in the currency of `price_per_hour`, which pays for the whole machine.

    `tokens_per_second` are those of all its clients together, while it is busy. `utilisation` is the share of the time
    that it is busy, from above 0 to 1: an idle machine costs as much.
    """
    require_positive("tokens_per_second", tokens_per_second)
    if not 0 < utilisation <= 1:
        raise InvalidRequest(f"utilisation is {utilisation}. Give a share above 0 and at most 1.")
    return price_per_hour / (tokens_per_second * utilisation * 3600) * 1_000_000


def require_positive(name: str, value: float) -> None:
    """Raise `InvalidRequest` if `value` is not above 0."""
    if not value > 0:
        raise InvalidRequest(f"{name} is {value}. Give a number above 0.")
