"""The scheduler alone, without a model: which sequences run, what they read, and which prefixes are reused."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("transformers", reason="the KV cache is part of the service's side")

from helpers.kv_cache import KVCache
from helpers.prefill import BLOCK, PREFILL_BUDGET
from helpers.scheduler import Scheduler
from helpers.sequence import Sequence


def prompt_of(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(30_000), k=length)


def sequence_of(prompt: list[int], max_tokens: int = 5) -> Sequence:
    return Sequence(prompt, max_tokens=max_tokens, sampler=None)


def add(scheduler: Scheduler, *sequences: Sequence) -> None:
    for sequence in sequences:
        scheduler.add(sequence)
    scheduler.admit()


def step(scheduler: Scheduler) -> dict[Sequence, int]:
    """Take a step as the engine does, with a model that always says 7. Return how many ids each sequence reads."""
    import torch

    for sequence in scheduler.remove_cancelled():
        sequence.stream.end("cancelled")
    scheduler.admit()
    batch = scheduler.schedule()
    for chunk in batch:
        assert chunk.cache is chunk.sequence.cache
        assert chunk.ids == chunk.sequence.unread_ids[: len(chunk.ids)]
        chunk.cache.append(0, torch.tensor(chunk.ids).reshape(1, 1, -1, 1))
        chunk.cache.length += len(chunk.ids)
    for chunk in batch:
        if not chunk.sequence.unread_ids:
            chunk.sequence.ids.append(7)
            if chunk.sequence.completion_tokens == chunk.sequence.max_tokens:
                scheduler.finish(chunk.sequence)
                chunk.sequence.stream.end("length")
    return {chunk.sequence: len(chunk.ids) for chunk in batch}


def run(scheduler: Scheduler, *sequences: Sequence) -> list[dict[Sequence, int]]:
    """Add the sequences, and take steps until they have all finished."""
    add(scheduler, *sequences)
    steps = []
    while scheduler.running or scheduler.waiting:
        steps.append(step(scheduler))
    return steps


@pytest.fixture
def scheduler() -> Scheduler:
    return Scheduler(max_num_seqs=16, cache_capacity=10_000)


# --- Admission ------------------------------------------------------------------------------------


def test_first_come_first_served() -> None:
    scheduler = Scheduler(max_num_seqs=2, cache_capacity=10_000)
    sequences = [sequence_of(prompt_of(10, n)) for n in range(6)]
    steps = run(scheduler, *sequences)
    assert {len(reads) for reads in steps} == {2}
    assert list(dict.fromkeys(sequence for reads in steps for sequence in reads)) == sequences


def test_no_more_run_than_memory_holds() -> None:
    scheduler = Scheduler(max_num_seqs=16, cache_capacity=500)
    steps = run(scheduler, *(sequence_of(prompt_of(100, n), max_tokens=100) for n in range(5)))
    assert max(map(len, steps)) == 2  # of 200 tokens each


def test_a_short_request_does_not_overtake_a_long_one() -> None:
    scheduler = Scheduler(max_num_seqs=16, cache_capacity=500)
    running, long, short = (sequence_of(prompt_of(n, n), max_tokens=10) for n in (300, 400, 20))
    add(scheduler, running, long, short)
    assert (scheduler.running, list(scheduler.waiting)) == ([running], [long, short])


def test_asking_whether_a_sequence_can_be_admitted_changes_nothing() -> None:
    scheduler = Scheduler(max_num_seqs=16, cache_capacity=500)
    run(scheduler, *(sequence_of(prompt_of(200, n)) for n in range(2)))
    before = [(ids, cache, cache.capacity) for ids, cache in scheduler.prefix_cache]
    assert scheduler.can_admit(sequence_of(prompt_of(400, 3)))
    assert scheduler.can_admit(sequence_of([*prompt_of(200, 0), 1, 2, 3]))
    assert not scheduler.can_admit(sequence_of(prompt_of(500, 3)))
    assert [(ids, cache, cache.capacity) for ids, cache in scheduler.prefix_cache] == before
    assert len(before) == 2


def test_a_cancelled_sequence_makes_room_at_once() -> None:
    scheduler = Scheduler(max_num_seqs=1, cache_capacity=10_000)
    running, leaving, waiting = (sequence_of(prompt_of(300, n), max_tokens=100) for n in range(3))
    add(scheduler, running, leaving, waiting)
    step(scheduler)
    running.stream.cancel()
    leaving.stream.cancel()
    assert waiting in step(scheduler)
    assert (scheduler.running, list(scheduler.waiting)) == ([waiting], [])
    assert running.stream.finish_reason == leaving.stream.finish_reason == "cancelled"
    assert running.cache is None


def test_the_estimate_follows_the_latest_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr("helpers.scheduler.time", clock)
    scheduler = Scheduler(max_num_seqs=2, cache_capacity=10_000)
    assert scheduler.seconds_until_next_finish() == 1
    slow, fast, last = [[sequence_of(prompt_of(10, n)) for _ in range(2)] for n in range(3)]
    add(scheduler, *slow, *fast, *last)
    clock.now = 60
    assert scheduler.seconds_until_next_finish() == 30  # the two that run have taken 60 s so far
    for sequence in slow:
        scheduler.finish(sequence)
    scheduler.admit()
    clock.now = 70
    for sequence in fast:
        scheduler.finish(sequence)
    scheduler.admit()
    assert scheduler.seconds_until_next_finish() == 5  # the latest two took 10 s each


def test_the_stream_tells_how_long_its_sequence_waited(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=100.0, monotonic=lambda: clock.now)
    monkeypatch.setattr("helpers.scheduler.time", clock)
    scheduler = Scheduler(max_num_seqs=1, cache_capacity=10_000)
    first, second = sequence_of(prompt_of(10, 1)), sequence_of(prompt_of(10, 2))
    add(scheduler, first, second)
    clock.now = 103.5
    scheduler.finish(first)
    scheduler.admit()
    assert (first.stream.queue_seconds, second.stream.queue_seconds) == (0, 3.5)


# --- Chunked prefill ------------------------------------------------------------------------------


def test_a_long_prompt_holds_up_neither_running_sequences_nor_a_short_prompt(scheduler: Scheduler) -> None:
    decoding = sequence_of(prompt_of(10, 1), max_tokens=100)
    add(scheduler, decoding)
    step(scheduler)
    long, short = sequence_of(prompt_of(480, 2), max_tokens=3), sequence_of(prompt_of(20, 3), max_tokens=3)
    add(scheduler, long, short)
    prefill = []
    while long.unread_ids:
        prefill.append(step(scheduler))
        if long.completion_tokens:
            break
    assert all(reads[decoding] == 1 for reads in prefill)
    assert prefill[0][short] == 20
    half = PREFILL_BUDGET // 2
    assert [reads[long] for reads in prefill] == [half, *[PREFILL_BUDGET] * 3, 480 - half - 3 * PREFILL_BUDGET]


def test_new_prompts_together_stay_within_the_budget(scheduler: Scheduler) -> None:
    steps = run(scheduler, *(sequence_of(prompt_of(300, n)) for n in range(4)))
    assert max(sum(n for n in reads.values() if n > 1) for reads in steps) <= PREFILL_BUDGET
    assert list(steps[0].values()) == [PREFILL_BUDGET // 2, PREFILL_BUDGET // 2]  # the other two wait


# --- Prefix reuse ---------------------------------------------------------------------------------


def test_the_next_turn_takes_over_the_cache_of_the_turn_before(scheduler: Scheduler) -> None:
    first = sequence_of(prompt_of(200, 1), max_tokens=20)
    run(scheduler, first)
    ((_, cache),) = scheduler.prefix_cache
    second = sequence_of([*first.ids, *prompt_of(30, 2)])
    add(scheduler, second)
    assert step(scheduler)[second] == 250 - 219 // BLOCK * BLOCK  # the last token of the answer was never read
    assert (first.stream.cached_tokens, second.stream.cached_tokens) == (0, 219 // BLOCK * BLOCK)
    assert second.cache is not None and cache.num_layers == 0  # all has moved
    assert second.cache.capacity == second.max_total_tokens
    assert list(scheduler.prefix_cache) == []
    run(scheduler)
    assert [ids for ids, _ in scheduler.prefix_cache] == [second.ids[:-1]]


def test_a_question_under_the_same_system_prompt_copies_it(scheduler: Scheduler) -> None:
    system = prompt_of(100, 1)
    run(scheduler, sequence_of([*system, *prompt_of(40, 2)]))
    ((_, cache),) = scheduler.prefix_cache
    other = sequence_of([*system, 4, 5, 6])
    add(scheduler, other)
    assert step(scheduler)[other] == 103 - 100 // BLOCK * BLOCK
    assert other.stream.cached_tokens == 100 // BLOCK * BLOCK
    assert cache in scheduler.prefix_cache
    assert other.cache is not cache


def test_a_prefix_that_several_new_prompts_share_is_read_once(scheduler: Scheduler) -> None:
    system = prompt_of(300, 1)
    sequences = [sequence_of([*system, n, *prompt_of(10, n)]) for n in range(6)]
    steps = run(scheduler, *sequences)
    assert all(set(reads) == {sequences[0]} for reads in steps[:2])  # the others wait for it
    assert sum(n for reads in steps for n in reads.values()) == 288 + 6 * (23 + 4)


def test_prompts_that_share_a_prefix_wait_only_for_each_other(scheduler: Scheduler) -> None:
    system = prompt_of(100, 1)
    long = sequence_of(prompt_of(400, 2))
    sequences = [sequence_of([*system, n, *prompt_of(20, n)]) for n in range(3)]
    steps = run(scheduler, long, *sequences)
    assert set(steps[0]) == {long, sequences[0]}
    assert sum(n for reads in steps for sequence, n in reads.items() if sequence is not long) == 96 + 3 * (25 + 4)


def test_the_last_token_of_a_known_prompt_is_read_again(scheduler: Scheduler) -> None:
    """The step that reads the last token gives the logits for the first token of the answer."""
    prompt = prompt_of(3 * BLOCK + 1, 1)
    run(scheduler, sequence_of(prompt))
    again = sequence_of(prompt)
    add(scheduler, again)
    assert step(scheduler)[again] == 1


@pytest.mark.parametrize(("shared", "read"), [(BLOCK - 1, 50), (BLOCK, 50 - BLOCK), (BLOCK + 9, 50 - BLOCK)])
def test_a_prefix_is_reused_in_whole_blocks(scheduler: Scheduler, shared: int, read: int) -> None:
    prompt = prompt_of(50, 1)
    run(scheduler, sequence_of(prompt))
    other = sequence_of([*prompt[:shared], 1, *prompt_of(49 - shared, 2)])
    add(scheduler, other)
    assert step(scheduler)[other] == read


def test_a_short_sequence_is_not_kept(scheduler: Scheduler) -> None:
    run(scheduler, sequence_of(prompt_of(9, 1), max_tokens=2))
    assert list(scheduler.prefix_cache) == []


@pytest.mark.parametrize("changed", [[], [1, 2, 3]], ids=["continued", "edited"])
def test_the_previous_turn_is_reused_if_there_is_no_room_for_both(changed: list[int]) -> None:
    """It is also reused after another client's request, and if only a part of the turn fits."""
    scheduler = Scheduler(max_num_seqs=16, cache_capacity=400)
    first = sequence_of(prompt_of(250, 1), max_tokens=10)
    run(scheduler, first)
    run(scheduler, sequence_of(prompt_of(30, 3), max_tokens=10))
    second = sequence_of([*first.ids[: len(first.ids) - len(changed)], *changed, *prompt_of(20, 2)], max_tokens=10)
    add(scheduler, second)
    assert step(scheduler)[second] == 280 - 256
    assert second.cache is not None
    assert (second.cache.length, second.cache.capacity) == (len(second.ids) - 1, second.max_total_tokens)


def test_a_reused_prefix_is_evicted_last() -> None:
    scheduler = Scheduler(max_num_seqs=16, cache_capacity=1000)
    a, b, c = (prompt_of(300, n) for n in range(3))
    run(scheduler, *(sequence_of(prompt) for prompt in (a, b, c)))
    run(scheduler, sequence_of([*a[:200], 7]))
    begins = [ids[:20] for ids, _ in scheduler.prefix_cache]
    assert begins == [c[:20], a[:20], a[:20]]  # b made room


def test_all_caches_together_stay_within_the_capacity() -> None:
    chance = random.Random(3)
    scheduler = Scheduler(max_num_seqs=8, cache_capacity=1500)
    systems = [prompt_of(n, n) for n in (20, 150, 300)]
    history: list[list[int]] = []
    entries = 0
    for n in range(150):
        begin = chance.choice([*systems, *history[-3:]])[:700]
        sequence = sequence_of([*begin, *prompt_of(chance.randint(1, 200), n)], chance.randint(1, 30))
        add(scheduler, sequence)
        for _ in range(chance.randint(1, 10)):
            step(scheduler)
            in_use = [sequence.cache.capacity for sequence in scheduler.running if sequence.cache]
            assert sum(in_use) + scheduler.prefix_cache.capacity <= 1500
            entries = max(entries, len(list(scheduler.prefix_cache)))
        if chance.random() < 0.2:
            sequence.stream.cancel()
        history.append(sequence.ids)
    assert entries > 3


def test_a_reused_prefix_holds_the_prefix(scheduler: Scheduler) -> None:
    """The fake model stores the ids themselves as keys and values, so that each cache shows what it holds."""
    import torch

    chance = random.Random(4)
    scheduler = Scheduler(max_num_seqs=8, cache_capacity=1500)
    systems = [prompt_of(n, n) for n in (20, 150, 300)]
    for _ in range(100):
        prompt = [*chance.choice(systems), *prompt_of(chance.randint(1, 100), chance.randint(0, 5))]
        add(scheduler, sequence_of(prompt, chance.randint(1, 5)))
        for _ in range(chance.randint(1, 5)):
            step(scheduler)
            for sequence in scheduler.running:
                if sequence.cache is not None:
                    stored = sequence.cache.append(0, torch.empty(1, 1, 0, 1)).flatten().tolist()
                    assert stored == sequence.ids[: sequence.cache.length]


@pytest.mark.parametrize("method", ["copy_prefix", "move_prefix"])
def test_without_memory_for_a_known_prefix_it_is_read_again(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("out of memory")

    run(scheduler, sequence_of(prompt_of(100, 1), max_tokens=2))
    monkeypatch.setattr(KVCache, method, fail)
    other = sequence_of([*prompt_of(100, 1)[: 100 if method == "move_prefix" else 50], 7, *prompt_of(20, 2)])
    add(scheduler, other)
    assert step(scheduler)[other] == len(other.ids) - 1
    assert other.cache is not None
