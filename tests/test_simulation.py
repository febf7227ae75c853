"""`helpers.simulation`: beside times computed by hand, what must hold at any load, and the real scheduler."""

from __future__ import annotations

import random
from statistics import median
from typing import Any

import pytest

from helpers import simulation
from helpers.errors import InvalidRequest
from helpers.simulation import Arrival, Timing, poisson_arrivals, simulate
from helpers.sizing import StepTimes, max_rate

STEPS = StepTimes(decode={1: 0.020, 8: 0.055, 32: 0.115}, prompt_token=0.001)
"""Seconds of a step: 5 ms more for each of the first 8 sequences, and then 2.5 ms more."""


def test_an_arrival_rate_is_kept_on_average_and_repeatable() -> None:
    arrivals = poisson_arrivals(rate=4, count=2000, prompt_tokens=7, completion_tokens=9, seed=3)
    times = [arrival.seconds for arrival in arrivals]
    assert times == sorted(times) and len(set(times)) == 2000
    assert times[-1] == pytest.approx(500, rel=0.1)
    assert {(arrival.prompt_tokens, arrival.completion_tokens) for arrival in arrivals} == {(7, 9)}
    assert arrivals == poisson_arrivals(rate=4, count=2000, prompt_tokens=7, completion_tokens=9, seed=3)
    assert arrivals != poisson_arrivals(rate=4, count=2000, prompt_tokens=7, completion_tokens=9, seed=4)


def timings(*, rate: float, replicas: int = 1, count: int = 300, **options: Any) -> list[Timing]:
    """Simulate requests with prompts of 60 tokens and answers of 40, by default for one replica."""
    arrivals = poisson_arrivals(rate=rate, count=count, prompt_tokens=60, completion_tokens=40, seed=1)
    return simulate(arrivals, replicas=replicas, step_times=STEPS, **options)


def median_ttft(**options: Any) -> float:
    return median(timing.ttft for timing in timings(**options))


LIMIT = max_rate(STEPS, prompt_tokens=60, completion_tokens=40)


def test_a_request_alone_waits_for_its_prompt_and_one_step() -> None:
    seconds = [Arrival(seconds=100.0 * n, prompt_tokens=60, completion_tokens=40) for n in range(3)]
    for timing in simulate(seconds, replicas=1, step_times=STEPS, overhead=0.004):
        assert timing.ttft == pytest.approx(0.020 + 60 * 0.001 + 0.004)
        assert timing.total == pytest.approx(timing.ttft + 39 * 0.020)
        assert timing.tokens == 40


def test_a_long_prompt_is_read_in_several_steps() -> None:
    (timing,) = simulate([Arrival(seconds=5, prompt_tokens=300, completion_tokens=1)], replicas=1, step_times=STEPS)
    assert timing.ttft == timing.total == pytest.approx(3 * 0.020 + 300 * 0.001)


def test_a_request_that_arrives_in_a_step_waits_for_its_end() -> None:
    arrivals = [Arrival(seconds=s, prompt_tokens=60, completion_tokens=2) for s in (0.0, 0.01)]
    first, second = simulate(arrivals, replicas=1, step_times=STEPS)
    assert first.ttft == pytest.approx(0.08)
    assert second.ttft == pytest.approx(0.07 + 0.085)  # the rest of the step, and one with the first one's token


def test_no_more_sequences_run_than_may() -> None:
    arrivals = [Arrival(seconds=0, prompt_tokens=1, completion_tokens=10)] * 3
    ttfts = [timing.ttft for timing in simulate(arrivals, replicas=1, step_times=STEPS, max_num_seqs=2)]
    assert ttfts == pytest.approx([0.025, 0.025, 10 * 0.025 + 0.020])


def test_the_replicas_take_turns() -> None:
    arrivals = [Arrival(seconds=0, prompt_tokens=1, completion_tokens=10)] * 4
    (*all_four,) = simulate(arrivals, replicas=2, step_times=STEPS)
    assert [timing.ttft for timing in all_four] == pytest.approx([0.025] * 4)


def test_replicas_that_share_a_machine_slow_each_other_down() -> None:
    arrivals = [Arrival(seconds=0, prompt_tokens=1, completion_tokens=2)] * 2
    together = StepTimes(decode={1: 0.030}, prompt_token=0.001)
    first, second = simulate(arrivals, replicas=2, step_times=STEPS, together=together)
    assert first.ttft == pytest.approx(0.020)  # nothing else runs when its step begins
    assert second.ttft == pytest.approx(0.030)
    assert first.total == pytest.approx(0.020 + 0.030)


def test_every_request_gets_all_of_its_tokens_in_order() -> None:
    order = random.Random(0)
    arrivals = [
        Arrival(
            seconds=order.uniform(0, 20), prompt_tokens=order.randint(1, 400), completion_tokens=order.randint(1, 60)
        )
        for _ in range(200)
    ]
    seen = simulate(arrivals, replicas=3, step_times=STEPS, max_num_seqs=4)
    assert [timing.tokens for timing in seen] == [arrival.completion_tokens for arrival in arrivals]
    for arrival, timing in zip(arrivals, seen, strict=True):
        assert timing.ttft >= STEPS.seconds(0, arrival.prompt_tokens) - 1e-9
        assert timing.total >= timing.ttft + (arrival.completion_tokens - 1) * 0.020 - 1e-9


def test_a_simulation_is_repeatable() -> None:
    assert timings(rate=LIMIT) == timings(rate=LIMIT)


def test_beyond_the_highest_rate_the_wait_grows_with_every_request() -> None:
    below, beyond = (median_ttft(rate=share * LIMIT, count=1000) for share in (0.9, 1.5))
    assert below < 0.5 < 5 < beyond
    assert median_ttft(rate=1.5 * LIMIT, count=2000) > 1.8 * beyond
    assert median_ttft(rate=0.9 * LIMIT, count=2000) < 1.2 * below


@pytest.mark.parametrize("share", [0.3, 0.9, 1.5])
def test_more_replicas_never_let_a_client_wait_longer(share: float) -> None:
    medians = [median_ttft(rate=share * LIMIT, replicas=replicas) for replicas in (1, 2, 4)]
    assert medians == sorted(medians, reverse=True)


def test_the_simulated_steps_are_those_of_the_real_scheduler() -> None:
    pytest.importorskip("torch")
    scheduler = pytest.importorskip("helpers.scheduler")
    sequences = pytest.importorskip("helpers.sequence")
    assert simulation.share_budget is scheduler.share_budget
    order = random.Random(5)
    lengths = [(order.choice([1, 2, 20, 33, 90, 128, 500]), order.randint(1, 9)) for _ in range(60)]
    real = scheduler.Scheduler(max_num_seqs=6, cache_capacity=10**6)
    asked = [
        sequences.Sequence(order.choices(range(30_000), k=prompt), max_tokens=answer, sampler=None)
        for prompt, answer in lengths
    ]
    for sequence in asked:
        real.add(sequence)
    firsts, lasts, step = {}, {}, 0
    while real.waiting or real.running:
        real.admit()
        batch, step = real.schedule(), step + 1
        for chunk in batch:
            chunk.cache.length += len(chunk.ids)
        for chunk in batch:
            if not chunk.sequence.unread_ids:
                chunk.sequence.ids.append(7)
                firsts.setdefault(chunk.sequence, step)
                if chunk.sequence.completion_tokens == chunk.sequence.max_tokens:
                    lasts[chunk.sequence] = step
                    real.finish(chunk.sequence)
    one_second = StepTimes(decode={1: 1.0}, prompt_token=1e-12)
    arrivals = [Arrival(seconds=0, prompt_tokens=prompt, completion_tokens=answer) for prompt, answer in lengths]
    simulated = simulate(arrivals, replicas=1, step_times=one_second, max_num_seqs=6)
    assert [round(timing.ttft) for timing in simulated] == [firsts[sequence] for sequence in asked]
    assert [round(timing.total) for timing in simulated] == [lasts[sequence] for sequence in asked]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: poisson_arrivals(rate=0, count=1, prompt_tokens=1, completion_tokens=1, seed=0), "rate is 0"),
        (lambda: simulate([], replicas=0, step_times=STEPS), "replicas is 0"),
        (lambda: simulate([], replicas=1, step_times=STEPS, max_num_seqs=0), "max_num_seqs is 0"),
        (
            lambda: simulate([Arrival(seconds=0, prompt_tokens=0, completion_tokens=1)], replicas=1, step_times=STEPS),
            "prompt_tokens is 0",
        ),
    ],
)
def test_a_wrong_value_is_refused(call: Any, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        call()
