"""The engine: ids in, ids out, one after the other, and out of it at any time."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from helpers.errors import GenerationFailed, InvalidRequest, ServiceUnavailable

PROMPT = [1, 518, 25580, 29962, 15043, 518, 29914, 25580, 29962]


@pytest.fixture
def engine(tiny: Any) -> Iterator[Any]:
    from helpers.engine import Engine

    engine = Engine(tiny.model, eos_token_ids=tiny.eos_token_ids, context_length=tiny.context_length)
    yield engine
    engine.close()


def reference(model: Any, prompt: list[int], n: int) -> list[int]:
    """The same model by transformers' own `generate`."""
    import torch

    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False)
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("length", [1, 9, 256, 257, 400])
def test_greedy_ids_are_those_of_generate(engine: Any, tiny: Any, length: int) -> None:
    prompt = [1, *range(1000, 1000 + length - 1)]
    generation = engine.submit(prompt, max_tokens=40)
    assert list(generation) == reference(tiny.model, prompt, 40)
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

    from helpers.engine import _chooser

    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    choose = _chooser(1.0, 0.8, 0)
    drawn = [choose(logits) for _ in range(2000)]
    assert set(drawn) == {0, 1}
    assert 0.55 < drawn.count(0) / 2000 < 0.7  # 0.5 / 0.8


def test_others_wait_in_order(engine: Any) -> None:
    generations = [engine.submit(PROMPT, max_tokens=n) for n in (30, 20, 10)]
    order: list[int] = []

    def read(number: int) -> None:
        list(generations[number])
        order.append(number)

    readers = [threading.Thread(target=read, args=(n,)) for n in (2, 1, 0)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert order == [0, 1, 2]
    assert engine.waiting == 0


def test_a_cancelled_generation_takes_at_most_the_step_under_way(engine: Any) -> None:
    generation = engine.submit(PROMPT, max_tokens=400)
    ids = iter(generation)
    next(ids)
    generation.cancel()
    before = engine.steps
    list(ids)
    assert generation.finish_reason == "cancelled"
    assert engine.steps <= before + 1


def test_one_that_is_cancelled_in_line_never_runs(engine: Any) -> None:
    first = engine.submit(PROMPT, max_tokens=50)
    second = engine.submit(PROMPT, max_tokens=50)
    third = engine.submit(PROMPT, max_tokens=5)
    second.cancel()
    assert (len(list(first)), list(second), len(list(third))) == (50, [], 5)
    assert second.finish_reason == "cancelled"
    assert engine.steps == 55


def test_a_long_prompt_can_be_left_between_its_parts(engine: Any, monkeypatch: Any) -> None:
    generation = None
    step = engine._step

    def cancel_at_the_first(*arguments: Any) -> Any:
        generation.cancel()
        return step(*arguments)

    monkeypatch.setattr(engine, "_step", cancel_at_the_first)
    with engine._changed:  # the engine cannot take it before its name is bound
        generation = engine.submit([1] * 500, max_tokens=5)
    assert list(generation) == []
    assert (generation.finish_reason, engine.steps) == ("cancelled", 1)


def test_a_failure_arrives_where_it_is_read_and_the_engine_goes_on(engine: Any, monkeypatch: Any) -> None:
    expected = list(engine.submit(PROMPT, max_tokens=10))
    steps = engine.steps

    def fail(*_: Any, **__: Any) -> Any:
        if engine.steps == steps + 4:
            raise RuntimeError("out of memory")

    hook = engine.model.register_forward_pre_hook(fail)
    failing = engine.submit(PROMPT, max_tokens=10)
    waiting = engine.submit(PROMPT, max_tokens=10)
    read: list[int] = []
    with pytest.raises(GenerationFailed, match=r"failed after 3 tokens \(RuntimeError: out of memory\)"):
        for token_id in failing:
            read.append(token_id)
    hook.remove()
    assert read == expected[:3]
    assert failing.finish_reason == "error"
    assert list(waiting) == expected


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"max_tokens": 0}, "at least 1"),
        ({"max_tokens": -5}, "at least 1"),
        ({"max_tokens": 504}, "more than the 512 tokens of the model's window"),
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
    list(engine.submit(PROMPT, max_tokens=1))  # its turn comes when the other has ended
    assert generation.finish_reason == "cancelled"
    assert generation.completion_tokens < 500


def test_closing_ends_everything(tiny: Any) -> None:
    from helpers.engine import Engine

    engine = Engine(tiny.model, eos_token_ids=tiny.eos_token_ids, context_length=tiny.context_length)
    running, waiting = (engine.submit(PROMPT, max_tokens=500) for _ in range(2))
    next(iter(running))
    engine.close()
    engine.close()
    list(running), list(waiting)
    assert running.finish_reason == waiting.finish_reason == "cancelled"
    assert not engine._thread.is_alive()
    with pytest.raises(ServiceUnavailable, match="Start the service again"):
        engine.submit(PROMPT, max_tokens=1)
