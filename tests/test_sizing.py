"""`helpers.sizing`: the calculator beside numbers computed by hand."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest

from helpers import sizing
from helpers.errors import InvalidRequest
from helpers.sizing import StepTimes

STEPS = StepTimes(decode={1: 0.020, 8: 0.055, 32: 0.115}, prompt_token=0.001)
"""Seconds of a step: 5 ms more for each of the first 8 sequences, and then 2.5 ms more."""


def test_a_step_takes_what_was_measured_and_grows_evenly_between() -> None:
    seconds = {n: round(STEPS.seconds(n), 6) for n in (0, 1, 2, 8, 20, 32, 40)}
    assert seconds == {0: 0.020, 1: 0.020, 2: 0.025, 8: 0.055, 20: 0.085, 32: 0.115, 40: 0.135}
    assert STEPS.seconds(8, 100) == pytest.approx(0.155)
    assert StepTimes(decode={4: 0.5}, prompt_token=1).seconds(9) == 0.5


def test_a_clients_tokens_wait_for_the_prompts_of_the_others_too() -> None:
    assert STEPS.inter_token_latency(8) == pytest.approx(0.055)
    # every 64 steps, each of 8 clients sends a new prompt of 128 tokens: 16 prompt tokens a step
    assert STEPS.inter_token_latency(8, prompt_tokens=128, completion_tokens=64) == pytest.approx(0.055 + 0.016)


def test_the_clients_of_a_replica_are_those_that_wait_no_longer_than_they_accept() -> None:
    assert sizing.max_clients(STEPS, inter_token_latency=0.0601) == 10
    assert sizing.max_clients(STEPS, inter_token_latency=0.0601, prompt_tokens=128, completion_tokens=64) == 6
    assert sizing.max_clients(STEPS, inter_token_latency=0.019) == 0
    assert sizing.max_clients(STEPS, inter_token_latency=9, max_num_seqs=16) == 16


def test_the_highest_rate_is_that_of_a_full_replica() -> None:
    rate = sizing.max_rate(STEPS, clients=32, prompt_tokens=50, completion_tokens=100)
    assert rate == pytest.approx(32 / (100 * (0.115 + 32 * 0.5 * 0.001)))


def test_the_memory_of_a_sequence_is_that_of_its_keys_and_values() -> None:
    llama_2_7b = sizing.cache_bytes_per_token(layers=32, kv_heads=32, head_size=128, bytes_per_value=2)
    assert llama_2_7b == 524_288
    assert sizing.max_sequences(8 * 2**30, bytes_per_token=llama_2_7b, tokens=4096) == 4
    assert sizing.max_sequences(8 * 2**30 - 1, bytes_per_token=llama_2_7b, tokens=4096) == 3


def test_a_million_tokens_cost_the_hours_that_they_take() -> None:
    assert sizing.cost_per_million_tokens(price_per_hour=3.6, tokens_per_second=1000) == pytest.approx(1)
    assert sizing.cost_per_million_tokens(
        price_per_hour=3.6, tokens_per_second=1000, utilisation=0.25
    ) == pytest.approx(4)


def test_the_bytes_per_token_are_those_of_a_real_kv_cache() -> None:
    torch = pytest.importorskip("torch")
    kv_cache = pytest.importorskip("helpers.kv_cache")
    cache = kv_cache.KVCache(8)
    for layer in range(3):  # keys and values of 2 KV heads and 5 tokens
        cache.append(layer, torch.zeros(2, 2, 5, 16, dtype=torch.float32))
    real = sum(cache.bytes_per_token.values())
    assert real == sizing.cache_bytes_per_token(layers=3, kv_heads=2, head_size=16, bytes_per_value=4)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: StepTimes(decode={}, prompt_token=1), "decode is empty"),
        (lambda: StepTimes(decode={1: 0}, prompt_token=1), "A step time is 0"),
        (lambda: sizing.max_sequences(1, bytes_per_token=1, tokens=0), "tokens is 0"),
        (lambda: sizing.cost_per_million_tokens(price_per_hour=1, tokens_per_second=0), "tokens_per_second is 0"),
        (
            lambda: sizing.cost_per_million_tokens(price_per_hour=1, tokens_per_second=1, utilisation=1.5),
            "utilisation is 1.5",
        ),
    ],
)
def test_a_wrong_value_is_refused_with_a_way_to_fix_it(call: Any, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        call()


def test_the_programs_of_the_page_print_what_it_says() -> None:
    page = (Path(__file__).parents[1] / "docs/sizing.md").read_text(encoding="utf-8")
    programs = re.findall(r"^```python\n(.*?)^```\n\n```text\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(programs) == page.count("```python") > 0
    names: dict[str, Any] = {}
    for program, output in programs:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(program, names)
        assert printed.getvalue() == output
