"""The engine with a real, tiny model, for many requests that come, fail and are cancelled at any time."""

from __future__ import annotations

import asyncio
import functools
import json
import random
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from eventually import until
from greedy import generated_answer
from helpers.errors import GenerationFailed, InvalidRequest, QueueFull, ServiceUnavailable
from helpers.options import EngineArgs, SamplingParams

PROMPT = [1, 518, 25580, 29962, 15043, 518, 29914, 25580, 29962]
BYTES_PER_TOKEN = 512
"""Of the tiny model's KV cache."""


def prompt_of(length: int, seed: int) -> list[int]:
    return [1, *random.Random(seed).choices(range(300, 30_000), k=length - 1)]


def params(max_tokens: int, **options: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, **options)


@pytest.fixture(scope="module", params=["Llama", "TransformersModel"])
def engine_model(request: pytest.FixtureRequest, torch: Any, tiny_folder: Path) -> Any:
    """A copy of the tiny model for the engine alone, because no other thread may call the engine's model."""
    from transformers import AutoModelForCausalLM

    from helpers.llama import Llama
    from helpers.llama_graphs import LlamaGraphs
    from helpers.packed_attention import TransformersModel

    if request.param == "TransformersModel":
        return TransformersModel(AutoModelForCausalLM.from_pretrained(tiny_folder).eval())
    config = json.loads((tiny_folder / "config.json").read_text())
    return Llama(LlamaGraphs(config, [str(tiny_folder / "model.safetensors")], "fp32"))


@pytest.fixture
def start(engine_model: Any) -> Iterator[Callable[..., Any]]:
    """Start engines with the tiny model and the given limits. They are closed after the test."""
    from helpers.engine import Engine

    started = []

    def start(**limits: Any) -> Any:
        engine = Engine(engine_model, eos_token_ids={2}, context_length=512, args=EngineArgs(**limits))
        started.append(engine)
        return engine

    yield start
    for engine in started:
        engine.close()


@pytest.fixture
def engine(start: Callable[..., Any]) -> Any:
    return start()


@pytest.fixture(scope="module")
def reference(tiny_reference: Any) -> Callable[[list[int], int], list[int]]:
    """The greedy answer of the same model by transformers' own `generate`."""
    return functools.partial(generated_answer, tiny_reference)


@pytest.fixture
def before_step(engine_model: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[list[int]], None]], None]:
    """Call a function before each step of the model, with the ids that it reads."""
    functions: list[Callable[[list[int]], None]] = []
    logits = engine_model.logits

    def observed_logits(ids: Any, chunks: Any) -> Any:
        for function in functions:
            function(ids.tolist())
        return logits(ids, chunks)

    monkeypatch.setattr(engine_model, "logits", observed_logits)
    return functions.append


class Gate:
    """A gate before each step of the model. `passed` holds the ids of each step since the gate was last shut."""

    def __init__(self) -> None:
        self.passed: list[list[int]] = []
        self._after = 0
        self._opened = threading.Event()
        self._opened.set()

    def wait(self, ids: list[int]) -> None:
        """Return when the gate is open."""
        if len(self.passed) >= self._after:
            self._opened.wait()
        self.passed.append(ids)

    @contextmanager
    def shut(self, after: int = 0) -> Iterator[None]:
        """Keep the engine from taking more than `after` steps. `submit` may be called as often as the test needs."""
        self.passed.clear()
        self._after = after
        self._opened.clear()
        try:
            yield
        finally:
            self._opened.set()


@pytest.fixture
def gate(before_step: Any) -> Gate:
    gate = Gate()
    before_step(gate.wait)
    return gate


@pytest.fixture
def fail_if(before_step: Any) -> Callable[..., None]:
    """Make the model run out of memory in the steps for which `condition` is true of the ids that it reads."""

    def fail_if(condition: Callable[[list[int]], bool]) -> None:
        def fail(ids: list[int]) -> None:
            if condition(ids):
                raise RuntimeError("out of memory")

        before_step(fail)

    return fail_if


# --- One request ----------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 9, 256, 257, 400])
def test_greedy_ids_are_those_of_transformers_generate(engine: Any, reference: Any, length: int) -> None:
    prompt = [1, *range(1000, 1000 + length - 1)]
    stream = engine.submit(prompt, params(40))
    assert list(stream) == reference(prompt, 40)
    assert stream.finish_reason == "length"


def test_each_token_costs_one_step(engine: Any) -> None:
    list(engine.submit(PROMPT, params(30)))
    assert engine.steps == 30


def test_an_answer_ends_before_an_eos_token(engine_model: Any, reference: Any) -> None:
    from helpers.engine import Engine

    expected = reference(PROMPT, 20)
    eos = expected[10]
    engine = Engine(engine_model, eos_token_ids={eos}, context_length=512)
    stream = engine.submit(PROMPT, params(20))
    assert list(stream) == expected[: expected.index(eos)]
    assert stream.finish_reason == "stop"
    engine.close()


def test_the_whole_context_can_be_used(engine: Any) -> None:
    assert len(list(engine.submit(PROMPT, params(512 - len(PROMPT))))) == 512 - len(PROMPT)


def test_temperature_top_p_and_seed_reach_the_sampler(engine: Any, reference: Any) -> None:
    def sample(seed: int | None, **options: float) -> list[int]:
        return list(engine.submit(PROMPT, params(20, seed=seed, **{"temperature": 1.0, **options})))

    assert sample(7) == sample(7) != sample(8)
    assert sample(None) != sample(None)
    assert sample(7, top_p=1e-6) == sample(7, temperature=1e-3) == reference(PROMPT, 20)


# --- Many requests at once ------------------------------------------------------------------------


def answers_in_company(engine: Any, requests: int) -> Iterator[tuple[list[int], list[int]]]:
    """Yield greedy prompts and answers. Beside them others sample, share prefixes, and are cancelled in the middle."""
    chance = random.Random(5)
    systems = [prompt_of(n, 1000 + n) for n in (1, 20, 150)]
    answers = []
    for n in range(requests):
        prompt = chance.choice(systems) + prompt_of(chance.randint(1, 180), n)
        answers.append((prompt, engine.submit(prompt, params(chance.randint(1, 30)))))
        if chance.random() < 0.3:
            engine.submit(prompt[:-1], params(20, temperature=1.5))
        if chance.random() < 0.3:
            cancelled = engine.submit(prompt_of(100, chance.randint(0, 3)), params(100))
            next(iter(cancelled))
            cancelled.cancel()
    for prompt, stream in answers:
        answer = list(stream)
        assert stream.finish_reason == "length"
        yield prompt, answer


@pytest.mark.parametrize("requests", [30, pytest.param(200, marks=pytest.mark.long)])
def test_greedy_answers_are_the_same_alone_and_beside_any_others(start: Any, reference: Any, requests: int) -> None:
    engine = start(max_queue_size=1000, cache_memory=10_000 * BYTES_PER_TOKEN)
    for prompt, answer in answers_in_company(engine, requests):
        assert answer == reference(prompt, len(answer))


def test_sampled_answers_are_the_same_alone_and_beside_others(engine: Any, gate: Gate) -> None:
    sampled = params(20, temperature=1.0, seed=3)
    alone = list(engine.submit(PROMPT, sampled))
    with gate.shut():
        others = [engine.submit(PROMPT, params(n + 5, temperature=1.3, seed=n)) for n in range(4)]
        same = engine.submit(PROMPT, sampled)
    assert list(same) == alone
    assert len({tuple(list(other)[:5]) for other in others}) == 4


def test_running_requests_share_their_steps(engine: Any, gate: Gate) -> None:
    with gate.shut():
        streams = [engine.submit(prompt_of(10, n), params(20)) for n in range(8)]
    assert [len(list(stream)) for stream in streams] == [20] * 8
    assert engine.steps <= 21  # the first request may begin a step before the others


def test_a_long_prompt_does_not_hold_up_the_others(engine: Any, reference: Any, gate: Gate) -> None:
    from helpers.prefill import PREFILL_BUDGET

    with gate.shut(after=1):
        running = engine.submit(prompt_of(10, 1), params(400))
        next(iter(running))
        long, short = engine.submit(prompt_of(480, 2), params(3)), engine.submit(prompt_of(20, 3), params(3))
    assert list(long) == reference(prompt_of(480, 2), 3)
    assert list(short) == reference(prompt_of(20, 3), 3)
    running.cancel()
    assert max(map(len, gate.passed)) <= PREFILL_BUDGET + 2  # and the tokens of the two that decode


# --- Log-probabilities ----------------------------------------------------------------------------


def reference_logprobs(model: Any, prompt: list[int], answer: list[int]) -> Any:
    """Return transformers' own log-probabilities after the prompt and after each token but the last."""
    import torch

    with torch.inference_mode():
        logits = model(torch.tensor([prompt + answer[:-1]])).logits[0, len(prompt) - 1 :]
    return logits.double().log_softmax(dim=-1)


@pytest.mark.parametrize("together", [1, 4])
def test_log_probabilities_are_those_of_transformers(
    engine: Any, tiny_reference: Any, gate: Gate, together: int
) -> None:
    prompts = [prompt_of(40 + n, n) for n in range(together)]
    sampled = {"temperature": 1.2, "top_p": 0.9, "seed": 4}  # neither changes the log-probabilities
    with gate.shut():
        streams = [
            engine.submit(prompt, params(8, logprobs=5, **(sampled if n % 2 else {})))
            for n, prompt in enumerate(prompts)
        ]
    for n, (prompt, stream) in enumerate(zip(prompts, streams, strict=True)):
        answer = list(stream)
        expected = reference_logprobs(tiny_reference, prompt, answer)
        assert len(stream.logprobs) == len(answer) == 8
        for token_id, ((first, logprob), *top), row in zip(answer, stream.logprobs, expected, strict=True):
            assert (first, logprob) == (token_id, pytest.approx(float(row[token_id]), abs=1e-4))
            assert [one for one, _ in top] == row.topk(5).indices.tolist()
            assert [value for _, value in top] == pytest.approx(row.topk(5).values.tolist(), abs=1e-4)
            assert n % 2 or top[0] == (token_id, logprob)  # greedy


def test_only_the_sequences_that_ask_for_log_probabilities_compute_them(
    engine: Any, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    from helpers import sampling

    computed: list[int] = []

    def observed(logits: Any, token_id: int, n: int) -> Any:
        computed.append(n)
        return sampling.token_logprobs(logits, token_id, n)

    monkeypatch.setattr("helpers.engine.token_logprobs", observed)
    with gate.shut():
        streams = [engine.submit(prompt_of(20, n), params(6, logprobs=n)) for n in (None, 0, None, 3)]
    assert [len(list(stream)) for stream in streams] == [6] * 4
    assert [[len(one) for one in stream.logprobs] for stream in streams] == [[], [1] * 6, [], [4] * 6]
    assert sorted(computed) == [0] * 6 + [3] * 6


def test_log_probabilities_do_not_change_a_sampled_answer(engine: Any) -> None:
    def sample(**options: Any) -> list[int]:
        return list(engine.submit(PROMPT, params(20, temperature=1.0, seed=7, **options)))

    assert sample() == sample(logprobs=0) == sample(logprobs=20)


def test_an_eos_token_has_no_log_probabilities(engine_model: Any, reference: Any) -> None:
    from helpers.engine import Engine

    eos = reference(PROMPT, 20)[10]
    engine = Engine(engine_model, eos_token_ids={eos}, context_length=512)
    stream = engine.submit(PROMPT, params(20, logprobs=1))
    assert list(stream) == [token_id for (token_id, _), _ in stream.logprobs] == reference(PROMPT, 20)[:10]
    engine.close()


# --- Prefix reuse ---------------------------------------------------------------------------------


def test_the_next_turn_reads_only_what_is_new(engine: Any, reference: Any, gate: Gate) -> None:
    first = prompt_of(200, 1)
    answer = list(engine.submit(first, params(20)))
    second = [*first, *answer, *prompt_of(30, 2)]
    with gate.shut():
        stream = engine.submit(second, params(10))
    assert list(stream) == reference(second, 10)
    from helpers.prefill import BLOCK

    reused = (len(first) + 19) // BLOCK * BLOCK  # the last token of the answer was never read
    assert stream.cached_tokens == reused
    assert gate.passed[0] == second[reused:]


def test_the_next_turn_is_reused_if_memory_holds_only_one(start: Any, reference: Any, gate: Gate) -> None:
    engine = start(cache_memory=400 * BYTES_PER_TOKEN)
    first = prompt_of(250, 1)
    answer = list(engine.submit(first, params(10)))
    list(engine.submit(prompt_of(30, 3), params(10)))  # another client in between
    second = [*first, *answer, *prompt_of(20, 2)]
    with gate.shut():
        stream = engine.submit(second, params(10))
    assert list(stream) == reference(second, 10)
    from helpers.prefill import BLOCK

    reused = (len(first) + len(answer) - 1) // BLOCK * BLOCK
    assert len(gate.passed[0]) == len(second) - reused


def test_a_shared_prefix_is_read_once(engine: Any, reference: Any, gate: Gate) -> None:
    system = prompt_of(300, 1)
    prompts = [[*system, *prompt_of(10 + n, 10 + n)] for n in range(6)]
    with gate.shut():
        streams = [engine.submit(prompt, params(5)) for prompt in prompts]
    assert [list(stream) for stream in streams] == [reference(prompt, 5) for prompt in prompts]
    from helpers.prefill import BLOCK

    shared = (len(system) + 1) // BLOCK * BLOCK  # the questions begin with the same token too
    assert sum(map(len, gate.passed)) == shared + sum(len(prompt) - shared + 4 for prompt in prompts)


def test_an_unread_answer_holds_no_memory(engine: Any) -> None:
    unread = engine.submit(PROMPT, params(40))
    until(lambda: unread.finish_reason is not None, "the answer ends")
    caches = [weakref.ref(cache) for _, cache in engine.scheduler.prefix_cache]
    engine.scheduler.prefix_cache.evict(0)
    until(lambda: [cache() for cache in caches] == [None], "the memory is free")
    assert len(list(unread)) == 40


# --- Limits ---------------------------------------------------------------------------------------


def test_a_full_queue_refuses_at_once_and_says_when_to_ask_again(start: Any, gate: Gate) -> None:
    engine = start(max_num_seqs=2, max_queue_size=3)
    with gate.shut():
        streams = [engine.submit(PROMPT, params(5))]
        until(lambda: engine.running == 1, "the first request runs")
        streams += [engine.submit(PROMPT, params(5)) for _ in range(4)]
        with pytest.raises(QueueFull) as refusal:
            engine.submit(PROMPT, params(5))
        assert str(refusal.value) == "The queue is full: 1 request is running and 4 waiting. Ask again in 1 s."
    assert [len(list(stream)) for stream in streams] == [5] * 5
    assert (engine.running, engine.waiting) == (0, 0)


def test_a_cancelled_request_leaves_its_place_in_the_queue_at_once(start: Any, gate: Gate) -> None:
    engine = start(max_num_seqs=1, max_queue_size=1)
    with gate.shut():
        streams = [engine.submit(PROMPT, params(5)) for _ in range(2)]
        streams.pop().cancel()
        streams.append(engine.submit(PROMPT, params(5)))
    assert [len(list(stream)) for stream in streams] == [5] * 2


def test_requests_that_are_about_to_be_submitted_count(start: Any) -> None:
    engine = start(max_num_seqs=2, max_queue_size=1)
    engine.check_queue(pending=2)
    with pytest.raises(QueueFull, match="0 requests are running and 3 waiting"):
        engine.check_queue(pending=3)


def test_without_a_queue_only_as_many_are_accepted_as_can_run(start: Any, gate: Gate) -> None:
    engine = start(max_num_seqs=2, max_queue_size=0)
    with gate.shut():
        streams = [engine.submit(PROMPT, params(5)) for _ in range(2)]
        with pytest.raises(QueueFull):
            engine.submit(PROMPT, params(5))
    assert [len(list(stream)) for stream in streams] == [5] * 2
    assert len(list(engine.submit(PROMPT, params(5)))) == 5


def test_the_context_is_as_long_as_the_smallest_limit(start: Any) -> None:
    assert start().context_length == 512
    assert start(context_length=100).context_length == 100
    assert start(context_length=1000).context_length == 512
    small = start(cache_memory=300 * BYTES_PER_TOKEN)
    assert (small.context_length, small.cache_capacity) == (300, 300)
    with pytest.raises(InvalidRequest, match="more than the 300 tokens"):
        small.submit(prompt_of(100, 1), params(201))


def test_a_context_length_above_the_models_is_reported(start: Any, caplog: pytest.LogCaptureFixture) -> None:
    start(context_length=512)
    assert not caplog.messages
    start(context_length=4096)
    assert caplog.messages == [
        "context_length is 4096, but the model reads at most 512 tokens, so the context window has 512 tokens"
    ]


def test_memory_for_less_than_two_tokens_is_refused(start: Any) -> None:
    with pytest.raises(InvalidRequest, match="a KV cache of 1 tokens, at 512 bytes each. Give cache_memory"):
        start(cache_memory=1000)


def test_a_request_that_does_not_fit_is_refused_at_once(engine: Any) -> None:
    with pytest.raises(InvalidRequest, match="9 tokens and max_tokens is 504: together more than the 512 tokens"):
        engine.submit(PROMPT, params(504))
    with pytest.raises(InvalidRequest, match="The prompt is empty"):
        engine.submit([], params(5))
    assert engine.steps == 0


@pytest.mark.parametrize("unknown", [-1, 32_000])
def test_a_token_without_embedding_is_refused_at_once(engine: Any, reference: Any, unknown: int) -> None:
    with pytest.raises(InvalidRequest, match=rf"token id {unknown}, but the model only knows 0 to 31999: .* Leave out"):
        engine.submit([*PROMPT, unknown, 5], params(5))
    assert engine.steps == 0
    last = [*PROMPT, 31_999]
    assert list(engine.submit(last, params(5))) == reference(last, 5)


# --- Cancelling -----------------------------------------------------------------------------------


def test_a_cancelled_request_costs_at_most_the_step_under_way(engine: Any, gate: Gate) -> None:
    with gate.shut(after=3):
        stream = engine.submit(PROMPT, params(400))
        until(lambda: engine.steps == 4, "the fourth step is under way")
        stream.cancel()
    list(stream)
    assert stream.finish_reason == "cancelled"
    assert engine.steps == 4


def test_a_request_that_is_cancelled_in_the_queue_never_runs(start: Any, gate: Gate) -> None:
    engine = start(max_num_seqs=1)
    with gate.shut():
        first, second, third = (engine.submit(PROMPT, params(n)) for n in (50, 50, 5))
        until(lambda: engine.running == 1, "the first request runs")
        second.cancel()
        assert engine.waiting == 1
    assert (len(list(first)), list(second), len(list(third))) == (50, [], 5)
    assert second.finish_reason == "cancelled"
    assert engine.steps == 55


def test_a_long_prompt_can_be_cancelled_between_its_chunks(engine: Any, gate: Gate) -> None:
    with gate.shut():
        stream = engine.submit(prompt_of(500, 1), params(5))
        until(lambda: engine.steps == 1, "the first chunk is read")
        stream.cancel()
    assert list(stream) == []
    assert (stream.finish_reason, engine.steps) == ("cancelled", 1)


def test_a_client_whose_event_loop_is_gone_has_cancelled(engine: Any, gate: Gate) -> None:
    async def read_one() -> None:
        async for _ in stream:
            return

    with gate.shut(after=1):
        stream = engine.submit(PROMPT, params(500))
        asyncio.run(read_one())
    until(lambda: stream.finish_reason is not None, "the answer ends")
    assert stream.finish_reason == "cancelled"


def test_closing_cancels_running_and_waiting_requests(start: Any, gate: Gate) -> None:
    engine = start(max_num_seqs=1)
    closing = threading.Thread(target=engine.close)
    with gate.shut(after=1):
        running, waiting = (engine.submit(PROMPT, params(500)) for _ in range(2))
        next(iter(running))
        closing.start()
        until(lambda: engine._closed, "the engine is closing")
    engine.close()
    closing.join()
    assert len(list(running)) <= 1
    assert list(waiting) == []
    assert running.finish_reason == waiting.finish_reason == "cancelled"
    with pytest.raises(ServiceUnavailable, match="has been shut down. Start the service again"):
        engine.submit(PROMPT, params(1))


def test_a_closed_engine_leaves_no_thread(start: Any) -> None:
    before = threading.active_count()
    engine = start()
    assert threading.active_count() == before + 1
    engine.close()
    assert threading.active_count() == before


# --- Failures -------------------------------------------------------------------------------------


def test_only_the_failing_request_fails(engine: Any, reference: Any, gate: Gate, fail_if: Any) -> None:
    """The engine retries the other requests one by one."""
    poison = 31_000
    fail_if(lambda ids: poison in ids)
    prompts = [prompt_of(50, n) for n in range(3)]
    with gate.shut():
        streams = [engine.submit(prompt, params(10)) for prompt in prompts]
        failing = engine.submit([*prompt_of(200, 9), poison], params(10))  # in the second chunk
    with pytest.raises(GenerationFailed, match=r"failed after 0 tokens \(RuntimeError: out of memory\)"):
        list(failing)
    assert [list(stream) for stream in streams] == [reference(prompt, 10) for prompt in prompts]


def test_a_failure_arrives_after_the_tokens_before_it(engine: Any, reference: Any, fail_if: Any) -> None:
    expected = reference(PROMPT, 10)
    fail_if(lambda ids: ids == [expected[3]])
    stream, received = engine.submit(PROMPT, params(10)), []
    with pytest.raises(GenerationFailed, match="failed after 4 tokens"):
        for token_id in stream:
            received.append(token_id)
    assert received == expected[:4]
    assert stream.finish_reason == "error"


def test_after_a_failure_the_engine_goes_on_and_the_memory_is_free(engine: Any, reference: Any, fail_if: Any) -> None:
    poison = 31_000
    fail_if(lambda ids: poison in ids)
    with pytest.raises(GenerationFailed):
        list(engine.submit([*prompt_of(200, 1), poison], params(10)))  # in the second chunk
    assert engine.running == 0
    assert engine.scheduler.prefix_cache.capacity == 0
    assert list(engine.submit(PROMPT, params(10))) == reference(PROMPT, 10)


def test_a_step_that_fails_in_the_middle_is_repeated_with_more_memory(
    engine: Any, reference: Any, gate: Gate, before_step: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first layer has stored its keys and values when the second fails. The prefix cache is then evicted."""
    from helpers.kv_cache import KVCache

    old = prompt_of(30, 9)
    list(engine.submit(old, params(2)))
    fails = iter([False, False, True])
    in_step: list[bool] = []

    def fail_once(store: Any) -> Any:
        def store_unless_in_step(cache: Any, layer: int, *arguments: Any, **options: Any) -> Any:
            if layer == 1 and in_step and in_step[-1]:
                raise RuntimeError("out of memory")
            return store(cache, layer, *arguments, **options)

        return store_unless_in_step

    prompts = [prompt_of(20, n) for n in range(3)]
    before_step(lambda ids: in_step.append(next(fails, False)))
    monkeypatch.setattr(KVCache, "append", fail_once(KVCache.append))  # of transformers' models
    monkeypatch.setattr(KVCache, "reserve", fail_once(KVCache.reserve))  # of `Llama`
    with gate.shut():
        streams = [engine.submit(prompt, params(10)) for prompt in prompts]
    assert [list(stream) for stream in streams] == [reference(prompt, 10) for prompt in prompts]
    assert in_step.count(True) == 1
    assert engine.scheduler.prefix_cache.lookup(old).length < 20


@pytest.fixture
def nan_at(torch: Any, engine_model: Any) -> Iterator[Callable[[int], None]]:
    """Make the embedding of a token id NaN, as a damaged weight does."""
    from helpers.packed_attention import TransformersModel

    if isinstance(engine_model, TransformersModel):
        weight = engine_model.model.get_input_embeddings().weight.data
    else:
        engine_model._graphs._embeddings = engine_model._graphs._embeddings.copy()  # of those in the file
        weight = torch.from_numpy(engine_model._graphs._embeddings)
    changed = {}

    def nan_at(token_id: int) -> None:
        changed[token_id] = weight[token_id].clone()
        weight[token_id] = torch.nan

    yield nan_at
    for token_id, row in changed.items():
        weight[token_id] = row


@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_of_nan_fail_their_request_and_no_other(
    engine: Any, reference: Any, gate: Gate, nan_at: Any, temperature: float
) -> None:
    poison = 31_000
    nan_at(poison)
    prompts = [prompt_of(50, n) for n in range(3)]
    broken = [[*prompt_of(40, 8), poison], [*prompt_of(100, 9), poison, *prompt_of(100, 9)]]  # here in one of 2 chunks
    with gate.shut():
        streams = [engine.submit(prompt, params(10)) for prompt in prompts]
        failing = [engine.submit(prompt, params(10, temperature=temperature)) for prompt in broken]
    for stream in failing:
        with pytest.raises(GenerationFailed, match=r"failed after 0 tokens .*NaN or infinite.* Serve it with --precis"):
            list(stream)
    assert [list(stream) for stream in streams] == [reference(prompt, 10) for prompt in prompts]
    same_prefix = broken[1][:100]
    assert list(engine.submit(same_prefix, params(10))) == reference(same_prefix, 10)


def test_logits_of_nan_end_an_answer_after_its_tokens(engine: Any, reference: Any, nan_at: Any) -> None:
    expected = reference(PROMPT, 10)
    nan_at(expected[3])
    stream, received = engine.submit(PROMPT, params(10)), []
    with pytest.raises(GenerationFailed, match="failed after 4 tokens"):
        for token_id in stream:
            received.append(token_id)
    assert received == expected[:4]


def test_a_failing_sampler_is_the_failure_of_one_request(
    engine: Any, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing_sampler(logits: Any) -> int:
        raise ValueError("not a number")

    monkeypatch.setattr("helpers.engine.make_sampler", lambda params: failing_sampler if params.temperature else None)
    with gate.shut():
        failing, other = engine.submit(PROMPT, params(5, temperature=1)), engine.submit(PROMPT, params(5))
    with pytest.raises(GenerationFailed, match="ValueError: not a number"):
        list(failing)
    assert len(list(other)) == 5


def test_a_failure_of_the_engine_itself_reaches_every_client(start: Any, gate: Gate) -> None:
    engine = start(max_num_seqs=2)
    with gate.shut():
        streams = [engine.submit(PROMPT, params(5)) for _ in range(3)]
        engine.scheduler.schedule = lambda: 1 / 0
    for stream in streams:
        with pytest.raises(GenerationFailed, match=r"The engine failed \(ZeroDivisionError.*Ask again"):
            list(stream)
    with pytest.raises(ServiceUnavailable):
        engine.submit(PROMPT, params(5))


# --- Async clients --------------------------------------------------------------------------------


def test_async_clients_get_the_same_and_do_not_block_the_event_loop(engine: Any, reference: Any) -> None:
    async def read() -> list[int]:
        return [token_id async for token_id in engine.submit(PROMPT, params(30))]

    async def read_and_count_turns() -> tuple[list[list[int]], int]:
        clients = asyncio.gather(*(read() for _ in range(3)))
        turns = 0
        while not clients.done():
            await asyncio.sleep(0)
            turns += 1
        return await clients, turns

    answers, turns = asyncio.run(read_and_count_turns())
    assert answers == [reference(PROMPT, 30)] * 3
    assert turns > 90  # the loop had its turn between the tokens
