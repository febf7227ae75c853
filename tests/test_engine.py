"""The engine: ids in, ids out, for many readers at once, who come and leave at any time."""

from __future__ import annotations

import asyncio
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.errors import GenerationFailed, InvalidRequest, ServiceBusy, ServiceUnavailable



def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.001)


PROMPT = [1, 518, 25580, 29962, 15043, 518, 29914, 25580, 29962]


@pytest.fixture(scope="session")
def handed_over(torch: Any, tiny_folder: Path) -> Any:
    """The tiny model once more: one that an engine has had is not to be used by others."""
    from helpers import models

    return models.load(str(tiny_folder), "fp32")


@pytest.fixture
def start(handed_over: Any) -> Iterator[Callable[..., Any]]:
    """Start engines with the tiny model; they are closed at the end."""
    from helpers.engine import Engine

    started = []

    def start(**options: Any) -> Any:
        defaults = {"eos_token_ids": handed_over.eos_token_ids, "context_length": handed_over.context_length}
        started.append(Engine(handed_over.model, **{**defaults, **options}))
        return started[-1]

    yield start
    for engine in started:
        engine.close()


@pytest.fixture
def engine(start: Any) -> Any:
    return start()


@pytest.fixture(scope="session")
def reference(torch: Any, tiny: Any) -> Callable[[list[int], int], list[int]]:
    """The same model by transformers' own `generate`."""

    def generate(prompt: list[int], n: int) -> list[int]:
        ids = torch.tensor([prompt])
        out = tiny.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False)
        return out[0, len(prompt) :].tolist()

    return generate


def prompt_of(length: int, seed: int) -> list[int]:
    return [1, *random.Random(seed).choices(range(300, 30000), k=length - 1)]


class Held:
    """While it is held, the engine takes no step; `submit` may then be called as often as is wanted."""

    def __init__(self, engine: Any) -> None:
        self.gate = threading.Event()
        self.steps: list[list[tuple[Any, list[int]]]] = []
        """What each step since then has fed."""
        step = engine._step

        def wait_and_step(feeds: list[tuple[Any, list[int]]]) -> None:
            self.gate.wait()
            self.steps.append([(g, list(ids)) for g, ids in feeds])
            step(feeds)

        engine._step = wait_and_step

    def __enter__(self) -> Held:
        return self

    def __exit__(self, *_: object) -> None:
        self.gate.set()


@pytest.mark.parametrize("length", [1, 9, 256, 257, 400])
def test_greedy_ids_are_those_of_generate(engine: Any, reference: Any, length: int) -> None:
    prompt = [1, *range(1000, 1000 + length - 1)]
    generation = engine.submit(prompt, max_tokens=40)
    assert list(generation) == reference(prompt, 40)
    assert (generation.finish_reason, generation.completion_tokens) == ("length", 40)


def test_the_prompt_is_read_once_and_each_token_costs_one_step(engine: Any) -> None:
    list(engine.submit(PROMPT, max_tokens=30))
    assert engine.steps == 30


def test_it_ends_at_an_eos_token_and_does_not_hand_it_out(engine: Any) -> None:
    ids = list(engine.submit(PROMPT, max_tokens=20))
    eos = ids[10]
    engine.eos_token_ids = frozenset({eos})
    generation = engine.submit(PROMPT, max_tokens=20)
    assert list(generation) == ids[: ids.index(eos)]
    assert generation.finish_reason == "stop"


def test_sampling_follows_its_seed_alone(engine: Any) -> None:
    def sample(seed: int | None, **options: float) -> list[int]:
        options = {"temperature": 1.0, **options}
        return list(engine.submit(PROMPT, max_tokens=20, seed=seed, **options))

    alone = sample(7)
    others = engine.submit(PROMPT, max_tokens=5, temperature=1.5, seed=1)
    assert sample(7) == alone
    assert len(list(others)) == 5
    assert sample(8) != alone
    assert sample(None) != sample(None)
    greedy = list(engine.submit(PROMPT, max_tokens=20))
    assert sample(7, top_p=1e-6) == greedy  # only the likeliest token is left
    assert sample(7, temperature=1e-3) == greedy


def test_top_p_leaves_out_the_unlikely(engine: Any) -> None:
    import torch

    from helpers.engine import _sampler

    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    choose = _sampler(1.0, 0.8, 0)
    drawn = [choose(logits) for _ in range(2000)]
    assert set(drawn) == {0, 1}
    assert 0.55 < drawn.count(0) / 2000 < 0.7  # 0.5 / 0.8


# --- Many at once ---------------------------------------------------------------------------------


def test_200_prompts_get_the_same_alone_and_in_any_company(start: Any, reference: Any) -> None:
    """Some leave before the end, some sample, some begin alike: the greedy ones stay what they are."""
    chance = random.Random(5)
    systems = [prompt_of(n, 1000 + n) for n in (1, 20, 150)]
    prompts = [chance.choice(systems) + prompt_of(chance.randint(1, 180), n) for n in range(200)]
    lengths = [chance.randint(1, 30) for _ in prompts]
    engine = start(max_waiting=1000, cache_memory=20_000 * 512)  # room for about 10,000 tokens
    generations = []
    for prompt, n in zip(prompts, lengths):
        generations.append(engine.submit(prompt, max_tokens=n))
        if chance.random() < 0.3:
            engine.submit(prompt[:-1], max_tokens=20, temperature=1.5)
        if chance.random() < 0.3:
            leaver = engine.submit(prompt_of(100, chance.randint(0, 3)), max_tokens=100)
            next(iter(leaver))
            leaver.cancel()
    answers = [list(generation) for generation in generations]
    assert [len(answer) for answer in answers] == lengths
    alone = [reference(prompt, n) for prompt, n in zip(prompts, lengths)]
    assert sum(a != b for a, b in zip(answers, alone)) == 0


def test_all_that_are_live_share_their_steps(engine: Any) -> None:
    with Held(engine):
        generations = [engine.submit(prompt_of(10, n), max_tokens=20) for n in range(8)]
    assert [len(list(g)) for g in generations] == [20] * 8
    # one step for whoever came before the others were there, and 20 for all of these
    assert engine.steps <= 21


def test_sampling_in_company_follows_its_seed_alone(engine: Any) -> None:
    options = dict(max_tokens=20, temperature=1.0, seed=3)
    alone = list(engine.submit(PROMPT, **options))
    with Held(engine):
        others = [engine.submit(PROMPT, max_tokens=n + 5, temperature=1.3, seed=n) for n in range(4)]
        same = engine.submit(PROMPT, **options)
    assert list(same) == alone
    assert len({tuple(list(g)[:5]) for g in others}) == 4


def test_first_come_first_served(start: Any) -> None:
    engine = start(max_live=2)
    with Held(engine) as held:
        generations = [engine.submit(prompt_of(10, n), max_tokens=5) for n in range(6)]
    for generation in generations:
        assert len(list(generation)) == 5
    assert max(map(len, held.steps)) == 2
    order = list(dict.fromkeys(generations.index(g) for feeds in held.steps for g, _ in feeds))
    assert order == [0, 1, 2, 3, 4, 5]
    assert (engine.live, engine.waiting) == (0, 0)


def test_a_long_prompt_does_not_hold_up_the_others(engine: Any) -> None:
    """It is read in pieces, and each of the others gets its token in every step."""
    from helpers.engine import PREFILL_CHUNK

    reading = engine.submit(prompt_of(10, 1), max_tokens=400)
    ids = iter(reading)
    next(ids)
    with Held(engine) as held:
        long = engine.submit(prompt_of(480, 2), max_tokens=3)
        short = engine.submit(prompt_of(20, 3), max_tokens=3)
    list(long), list(short)
    reading.cancel()
    fed = [{g: len(ids) for g, ids in feeds} for feeds in held.steps]
    while_long = [step for step in fed if step.get(long, 0) > 1]
    # the first part beside the short one, which does not wait for the others
    assert [step[long] for step in while_long] == [PREFILL_CHUNK // 2, *[PREFILL_CHUNK] * 3, 416 - 3 * PREFILL_CHUNK]
    assert while_long[0][short] > 1 and while_long[1][short] == 1
    assert all(step[reading] == 1 for step in while_long)
    assert all(sum(n for n in step.values() if n > 1) <= PREFILL_CHUNK for step in fed)


# --- What was read once is not read again -----------------------------------------------------------


def test_the_next_turn_reads_only_what_is_new(engine: Any, reference: Any) -> None:
    first = prompt_of(200, 1)
    answer = list(engine.submit(first, max_tokens=20))
    second = [*first, *answer, *prompt_of(30, 2)]
    with Held(engine) as held:
        next_turn = engine.submit(second, max_tokens=10)
    assert list(next_turn) == reference(second, 10)
    # the last token of the answer was handed out, and never read
    assert [len(ids) for feeds in held.steps for _, ids in feeds][0] == len(second) - (len(first) + 19)
    assert [len(ids) for ids, _ in engine._kept] == [len(second) + 9]  # which begins with all the first had


def test_a_beginning_shared_by_all_is_read_once(engine: Any, reference: Any) -> None:
    system = prompt_of(300, 1)
    prompts = [[*system, *prompt_of(10 + n, 10 + n)] for n in range(6)]
    with Held(engine) as held:
        generations = [engine.submit(prompt, max_tokens=5) for prompt in prompts]
    assert [list(g) for g in generations] == [reference(prompt, 5) for prompt in prompts]
    read = sum(len(ids) for feeds in held.steps for _, ids in feeds)
    shared = len(system) + 1  # the first of what follows is the same too
    assert read == shared + sum(len(prompt) - shared + 4 for prompt in prompts)


def test_a_beginning_is_shared_also_behind_a_long_prompt(engine: Any, reference: Any) -> None:
    system = prompt_of(100, 1)
    prompts = [prompt_of(400, 2), *([*system, *prompt_of(20, 10 + n)] for n in range(3))]
    with Held(engine) as held:
        generations = [engine.submit(prompt, max_tokens=2) for prompt in prompts]
    assert [list(g) for g in generations] == [reference(prompt, 2) for prompt in prompts]
    read = sum(len(ids) for feeds in held.steps for g, ids in feeds if g is not generations[0])
    assert read == 101 + 3 * (19 + 1)


def test_the_next_turn_finds_its_past_where_there_is_no_room_for_two(start: Any, reference: Any) -> None:
    """The keys and values of its first turn become its own."""
    engine = start(cache_memory=400 * 512)
    first = prompt_of(250, 1)
    answer = list(engine.submit(first, max_tokens=10))
    list(engine.submit(prompt_of(30, 3), max_tokens=10))  # somebody else was there since
    second = [*first, *answer, *prompt_of(20, 2)]
    with Held(engine) as held:
        next_turn = engine.submit(second, max_tokens=10)
    assert list(next_turn) == reference(second, 10)
    assert [len(ids) for feeds in held.steps for _, ids in feeds][0] == 21
    assert engine._kept.tokens <= 400


def test_many_short_answers_do_not_pile_up(start: Any) -> None:
    from helpers.kv_cache import Kept, KeyValues

    kept = Kept()
    for n in range(300):
        kept.add(prompt_of(20, n), KeyValues(20))
    assert len(list(kept)) == Kept.MOST
    engine = start()
    list(engine.submit(PROMPT, max_tokens=2))
    assert list(engine._kept) == []  # too short to be worth it


def test_an_answer_that_is_not_read_holds_no_memory(start: Any) -> None:
    engine = start()
    unread = engine.submit(PROMPT, max_tokens=20)
    until(lambda: unread.finish_reason is not None)
    ((_, past),) = engine._kept
    there = weakref.ref(past)
    del past
    engine._kept.shrink(0)
    assert there() is None
    assert len(list(unread)) == 20


def test_what_is_kept_stays_within_its_memory(start: Any) -> None:
    engine = start(cache_memory=1000 * 512)
    assert engine.cache_tokens == 1000
    a, b, c = (prompt_of(300, n) for n in range(3))
    for prompt in (a, b, c):
        list(engine.submit(prompt, max_tokens=10))
    assert [ids[:300] for ids, _ in engine._kept] == [a, b, c]
    assert engine._kept.tokens == 930
    list(engine.submit(prompt_of(60, 4), max_tokens=5))  # 65 fit beside them
    list(engine.submit([*b[:200], 7], max_tokens=4))  # 205 do not: a goes; b is used
    assert [ids[:60] for ids, _ in engine._kept] == [one[:60] for one in (c, prompt_of(60, 4), b, b)]
    list(engine.submit(prompt_of(300, 5), max_tokens=1))
    assert [ids[:60] for ids, _ in engine._kept] == [one[:60] for one in (prompt_of(60, 4), b, b, prompt_of(300, 5))]
    assert engine._kept.tokens <= 1000


# --- Limits -----------------------------------------------------------------------------------------


def test_a_full_line_answers_at_once_and_a_leaver_makes_room(start: Any) -> None:
    engine = start(max_live=2, max_waiting=3)
    with Held(engine) as held:
        generations = [engine.submit(PROMPT, max_tokens=5)]
        until(lambda: engine.live == 1)
        generations += [engine.submit(PROMPT, max_tokens=5) for _ in range(4)]
        with pytest.raises(ServiceBusy, match=r"answers 1 readers, and 4 more stand in line.*Try again in 1 s"):
            engine.submit(PROMPT, max_tokens=5)
        generations.pop().cancel()
        generations.append(engine.submit(PROMPT, max_tokens=5))
        assert held.steps == []
    assert [len(list(g)) for g in generations] == [5] * 5


def test_without_a_line_as_many_are_answered_as_may_be_live(start: Any) -> None:
    engine = start(max_live=2, max_waiting=0)
    with Held(engine):
        generations = [engine.submit(PROMPT, max_tokens=5) for _ in range(2)]
        with pytest.raises(ServiceBusy):
            engine.submit(PROMPT, max_tokens=5)
        with pytest.raises(ServiceBusy, match="answers 1 readers|answers 0 readers"):
            engine.check_place(coming=1)
    assert [len(list(g)) for g in generations] == [5] * 2
    assert len(list(engine.submit(PROMPT, max_tokens=5))) == 5


def test_memory_bounds_how_many_are_live(start: Any) -> None:
    engine = start(cache_memory=500 * 512, max_live=16)
    with Held(engine) as held:
        generations = [engine.submit(prompt_of(100, n), max_tokens=100) for n in range(5)]
    assert [len(list(g)) for g in generations] == [100] * 5
    assert max(map(len, held.steps)) == 2  # 2 × 200 tokens fit in 500
    with pytest.raises(InvalidRequest, match="more than the 500 tokens"):
        engine.submit(prompt_of(100, 1), max_tokens=401)


@pytest.mark.parametrize(
    ("limits", "sentence"),
    [({"max_live": 0}, "max_live is 0"), ({"max_waiting": -1}, "max_waiting -1"), ({"cache_memory": 100}, "at 512 bytes each")],
)
def test_limits_under_which_nobody_could_be_answered_are_refused(start: Any, limits: dict, sentence: str) -> None:
    with pytest.raises(InvalidRequest, match=sentence):
        start(**limits)


# --- Leaving ----------------------------------------------------------------------------------------


def test_a_cancelled_generation_takes_at_most_the_step_under_way(engine: Any) -> None:
    generation = engine.submit(PROMPT, max_tokens=400)
    ids = iter(generation)
    next(ids)
    generation.cancel()
    before = engine.steps
    list(ids)
    assert generation.finish_reason == "cancelled"
    assert engine.steps <= before + 1


def test_one_that_is_cancelled_in_line_never_runs(start: Any) -> None:
    engine = start(max_live=1)
    with Held(engine):
        first = engine.submit(PROMPT, max_tokens=50)
        second = engine.submit(PROMPT, max_tokens=50)
        third = engine.submit(PROMPT, max_tokens=5)
        until(lambda: engine.live == 1)
        second.cancel()
        assert engine.waiting == 1
    assert (len(list(first)), list(second), len(list(third))) == (50, [], 5)
    assert second.finish_reason == "cancelled"
    assert engine.steps == 55


def test_a_long_prompt_can_be_left_between_its_parts(engine: Any) -> None:
    with Held(engine) as held:
        generation = engine.submit(prompt_of(500, 1), max_tokens=5)
        until(lambda: engine.live == 1)
        generation.cancel()
    assert list(generation) == []
    assert (generation.finish_reason, engine.steps, len(held.steps)) == ("cancelled", 1, 1)


def test_a_failure_reaches_the_one_whose_it_is_and_the_others_go_on(engine: Any, reference: Any) -> None:
    """In the middle of an answer, and one of several: the model is run again for each of them alone."""
    poison = 31_000

    def fail(_: Any, __: Any, inputs: dict[str, Any]) -> None:
        if poison in inputs["input_ids"]:
            raise RuntimeError("out of memory")

    prompts = [prompt_of(50, n) for n in range(4)]
    prompts[2] = [*prompt_of(200, 2), poison]  # in its second piece
    hook = engine.model.register_forward_pre_hook(fail, with_kwargs=True)
    with Held(engine):
        generations = [engine.submit(prompt, max_tokens=10) for prompt in prompts]
    with pytest.raises(GenerationFailed, match=r"failed after 0 tokens \(RuntimeError: out of memory\)"):
        list(generations.pop(2))
    del prompts[2]
    hook.remove()
    assert [list(g) for g in generations] == [reference(prompt, 10) for prompt in prompts]
    assert list(engine.submit(PROMPT, max_tokens=10)) == reference(PROMPT, 10)


def test_a_failure_in_the_middle_of_a_step_leaves_nothing_behind(engine: Any, reference: Any) -> None:
    """After the first layer has stored its keys and values; and what was kept is let go of, for its memory."""
    list(engine.submit(prompt_of(30, 9), max_tokens=2))
    failing = iter([False, False, True])

    def fail(*_: Any) -> None:
        if next(failing, False):
            raise RuntimeError("out of memory")

    prompts = [prompt_of(20, n) for n in range(3)]
    hook = engine.model.model.layers[1].register_forward_pre_hook(fail)
    with Held(engine):
        generations = [engine.submit(prompt, max_tokens=10) for prompt in prompts]
    assert [list(g) for g in generations] == [reference(prompt, 10) for prompt in prompts]
    hook.remove()
    assert all(ids[:20] != prompt_of(30, 9)[:20] for ids, _ in engine._kept)


def test_where_the_engine_itself_fails_every_reader_is_told(start: Any) -> None:
    engine = start()
    with Held(engine):
        generations = [engine.submit(PROMPT, max_tokens=5) for _ in range(3)]
        engine._plan = lambda: 1 / 0
    for generation in generations:
        with pytest.raises(GenerationFailed, match="ZeroDivisionError"):
            list(generation)
    with pytest.raises(ServiceUnavailable):
        engine.submit(PROMPT, max_tokens=5)


def test_a_failure_arrives_after_what_came_before_it(engine: Any, reference: Any) -> None:
    expected = reference(PROMPT, 10)
    poison = expected[3]

    def fail(_: Any, __: Any, inputs: dict[str, Any]) -> None:
        if inputs["input_ids"].tolist() == [[poison]]:
            raise RuntimeError("out of memory")

    hook = engine.model.register_forward_pre_hook(fail, with_kwargs=True)
    failing, read = engine.submit(PROMPT, max_tokens=10), []
    with pytest.raises(GenerationFailed, match="failed after 4 tokens"):
        for token_id in failing:
            read.append(token_id)
    hook.remove()
    assert read == expected[:4]
    assert failing.finish_reason == "error"
    assert list(engine.submit(PROMPT, max_tokens=10)) == expected


def test_a_failing_draw_is_the_failure_of_one(engine: Any) -> None:
    """As where the logits are no numbers."""
    with Held(engine):
        failing, other = (engine.submit(PROMPT, max_tokens=5) for _ in range(2))
        failing.sample = lambda logits: [][0]
    with pytest.raises(GenerationFailed, match="IndexError"):
        list(failing)
    assert len(list(other)) == 5


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"max_tokens": 0}, "at least 1"),
        ({"max_tokens": -5}, "at least 1"),
        ({"max_tokens": 504}, "more than the 512 tokens for which there is room"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": float("nan")}, "top_p"),
        ({"seed": -1}, "seed"),
        ({"prompt_ids": []}, "empty"),
    ],
)
def test_what_cannot_be_answered_is_refused_at_once(engine: Any, options: dict, sentence: str) -> None:
    options = {"prompt_ids": PROMPT, "max_tokens": 5, **options}
    with pytest.raises(InvalidRequest, match=sentence):
        engine.submit(options.pop("prompt_ids"), **options)
    assert engine.steps == 0


def test_the_whole_window_can_be_used(engine: Any) -> None:
    assert len(list(engine.submit(PROMPT, max_tokens=512 - len(PROMPT)))) == 512 - len(PROMPT)


def test_async_readers_get_the_same_and_do_not_stop_the_loop(engine: Any) -> None:
    expected = list(engine.submit(PROMPT, max_tokens=30))

    async def read() -> list[int]:
        return [i async for i in engine.submit(PROMPT, max_tokens=30)]

    async def count_while(readers: list[asyncio.Task]) -> int:
        turns = 0
        while not all(r.done() for r in readers):
            await asyncio.sleep(0)
            turns += 1
        return turns

    async def main() -> None:
        readers = [asyncio.create_task(read()) for _ in range(3)]
        assert await count_while(readers) > 90  # the loop had its turn between the tokens
        assert [r.result() for r in readers] == [expected] * 3

    asyncio.run(main())


def test_a_reader_whose_loop_is_gone_is_a_reader_who_left(engine: Any) -> None:
    generation = engine.submit(PROMPT, max_tokens=500)

    async def begin() -> None:
        async for _ in generation:
            return

    asyncio.run(begin())
    until(lambda: generation.finish_reason is not None)
    assert generation.finish_reason == "cancelled"
    assert generation.completion_tokens < 500


def test_closing_ends_everything(start: Any) -> None:
    engine = start()
    running, waiting = (engine.submit(PROMPT, max_tokens=500) for _ in range(2))
    next(iter(running))
    engine.close()
    engine.close()
    list(running), list(waiting)
    assert running.finish_reason == waiting.finish_reason == "cancelled"
    assert not engine._thread.is_alive()
    with pytest.raises(ServiceUnavailable, match="Start the service again"):
        engine.submit(PROMPT, max_tokens=1)
