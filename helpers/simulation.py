"""Simulate how long clients wait for their first token, by the rate of their requests and the number of services.

`simulate` repeats what the engine does between two steps (`helpers.scheduler`), with numbers in place of tokens, and
takes the times of the steps from a measurement. No model runs. Standard library only.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from .prefill import share_budget
from .sizing import StepTimes, require_positive


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """A request: when it arrives, in seconds, the tokens of its prompt that are not in the prefix cache, and the
    tokens of its answer. There is at least one of each."""

    seconds: float
    prompt_tokens: int
    completion_tokens: int


def poisson_arrivals(
    *, rate: float, count: int, prompt_tokens: int, completion_tokens: int, seed: int
) -> list[Arrival]:
    """Return `count` equal requests that arrive independently of one another, `rate` per second on average."""
    require_positive("rate", rate)
    gaps, now, arrivals = random.Random(seed), 0.0, []
    for _ in range(count):
        now += gaps.expovariate(rate)
        arrivals.append(Arrival(seconds=now, prompt_tokens=prompt_tokens, completion_tokens=completion_tokens))
    return arrivals


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What one client saw: `ttft` and `total` are the seconds until its first and its last token, of `tokens`."""

    ttft: float
    total: float
    tokens: int


@dataclass
class _Sequence:
    arrival: Arrival
    unread: int
    tokens: int = 0
    ttft: float = 0.0
    total: float = 0.0


@dataclass
class _Replica:
    """The engine's loop. `waiting` holds what will arrive too, in order."""

    max_num_seqs: int
    waiting: deque[_Sequence] = field(default_factory=deque)
    running: list[_Sequence] = field(default_factory=list)
    free_at: float = 0.0

    def next_step(self) -> float | None:
        """Return when the next step begins, or None if there is nothing left to do."""
        if self.running or not self.waiting:
            return self.free_at if self.running else None
        return max(self.free_at, self.waiting[0].arrival.seconds)

    def step(self, now: float, step_times: StepTimes) -> None:
        """Admit what has arrived, run a step, and remove the finished sequences."""
        while self.waiting and self.waiting[0].arrival.seconds <= now and len(self.running) < self.max_num_seqs:
            self.running.append(self.waiting.popleft())
        shares = share_budget([sequence.unread for sequence in self.running if sequence.unread > 1])
        prefill = (shares[n] for n in range(len(shares)))
        read = [next(prefill) if sequence.unread > 1 else sequence.unread for sequence in self.running]
        # a prompt that is read takes as long as a sequence that decodes, and then its tokens' time
        self.free_at = now + step_times.seconds(sum(n > 0 for n in read), sum(shares.values()))
        for sequence, n in zip(self.running, read, strict=True):
            sequence.unread -= n
            if not sequence.unread:
                sequence.total = self.free_at - sequence.arrival.seconds
                sequence.ttft = sequence.ttft or sequence.total
                sequence.tokens, sequence.unread = sequence.tokens + 1, 1
        self.running = [one for one in self.running if one.tokens < one.arrival.completion_tokens]


def simulate(
    arrivals: Sequence[Arrival],
    *,
    replicas: int,
    step_times: StepTimes,
    max_num_seqs: int = 32,
    together: StepTimes | None = None,
    overhead: float = 0.0,
) -> list[Timing]:
    """Return what each client sees if `replicas` services take turns, in the order of `arrivals`.

    - ``together``: the times of a step that begins while another replica runs one too, if replicas share memory or
      cores. None means that each has hardware of its own.
    - ``overhead``: the seconds that a request and its first token spend outside the engine.

    The queue has no limit and the KV cache has room for all. Raise `InvalidRequest` without any replica, if nothing
    can run, or if a request has no token.
    """
    require_positive("replicas", replicas)
    require_positive("max_num_seqs", max_num_seqs)
    for arrival in arrivals:
        require_positive("prompt_tokens", arrival.prompt_tokens)
        require_positive("completion_tokens", arrival.completion_tokens)
    sequences = [_Sequence(arrival, arrival.prompt_tokens) for arrival in arrivals]
    in_order = sorted(sequences, key=lambda sequence: sequence.arrival.seconds)
    engines = [_Replica(max_num_seqs, deque(in_order[n::replicas])) for n in range(replicas)]
    steps = [(start, n) for n, engine in enumerate(engines) if (start := engine.next_step()) is not None]
    heapq.heapify(steps)
    while steps:
        now, n = heapq.heappop(steps)
        is_shared = any(other.free_at > now for other in engines)
        engines[n].step(now, together if together and is_shared else step_times)
        if (start := engines[n].next_step()) is not None:
            heapq.heappush(steps, (start, n))
    return [Timing(ttft=one.ttft + overhead, total=one.total + overhead, tokens=one.tokens) for one in sequences]
