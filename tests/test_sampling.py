"""From logits to the next token: temperature, top_p and seed; and to its log-probability."""

from __future__ import annotations

import math
from typing import Any

import pytest

from helpers.options import SamplingParams


@pytest.fixture
def logits(torch: Any) -> Any:
    return torch.tensor([0.5, 0.3, 0.15, 0.05]).log()


def samples(logits: Any, n: int = 20, **options: Any) -> list[int]:
    from helpers.sampling import make_sampler

    sample = make_sampler(SamplingParams(**options))
    assert sample is not None
    return [sample(logits) for _ in range(n)]


@pytest.mark.parametrize("temperature", [0, 5e-324, 1e-38, 9e-6])
def test_greedy_decoding_needs_no_sampler(torch: Any, temperature: float) -> None:
    from helpers.sampling import make_sampler

    assert make_sampler(SamplingParams(temperature=temperature, seed=1)) is None


@pytest.mark.parametrize("options", [{"temperature": 1e-5}, {"temperature": 1, "top_p": 5e-324}], ids=str)
def test_the_smallest_values_take_the_most_likely_token(logits: Any, options: dict[str, float]) -> None:
    assert set(samples(logits, 20, **options)) == {0}
    assert set(samples(logits * 1000, 20, **options)) == {0}


def test_a_seed_repeats_its_tokens_and_others_differ(logits: Any) -> None:
    assert samples(logits, temperature=1, seed=7) == samples(logits, temperature=1, seed=7)
    assert samples(logits, temperature=1, seed=7) != samples(logits, temperature=1, seed=8)
    assert samples(logits, 100, temperature=1) != samples(logits, 100, temperature=1)


def test_without_top_p_tokens_come_as_often_as_their_probability_says(logits: Any) -> None:
    drawn = samples(logits, 2000, temperature=1, seed=0)
    shares = [drawn.count(token_id) / 2000 for token_id in range(4)]
    assert shares == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.04)


def test_a_low_temperature_prefers_the_most_likely_token(logits: Any) -> None:
    assert set(samples(logits, 200, temperature=0.01, seed=0)) == {0}


def test_top_p_leaves_out_unlikely_tokens(logits: Any) -> None:
    drawn = samples(logits, 2000, temperature=1, top_p=0.8, seed=0)
    assert set(drawn) == {0, 1}
    assert 0.55 < drawn.count(0) / 2000 < 0.7  # 0.5 / 0.8
    assert set(samples(logits, 200, temperature=1, top_p=1e-6, seed=0)) == {0}


def test_top_p_reaches_beyond_the_tokens_it_looks_at_first(torch: Any) -> None:
    from helpers.sampling import LIKELY_TOKENS

    flat = torch.zeros(4 * LIKELY_TOKENS)  # all equally likely, so half of them are needed for 0.5
    drawn = samples(flat, 2000, temperature=1, top_p=0.5, seed=0)
    assert LIKELY_TOKENS < len(set(drawn)) <= 2 * LIKELY_TOKENS


@pytest.mark.parametrize("n", [0, 1, 3, 20])
def test_log_probabilities_are_those_of_the_token_and_of_the_most_likely_ones(torch: Any, n: int) -> None:
    from helpers.sampling import token_logprobs

    logits = torch.tensor([2.0, -3.0, 7.5, 7.0, 0.25])
    expected = torch.log_softmax(logits.double(), dim=-1)
    token, *top = token_logprobs(logits, 4, n)
    assert token == (4, pytest.approx(float(expected[4])))
    assert top == [(token_id, pytest.approx(float(expected[token_id]))) for token_id in (2, 3, 0, 4, 1)[:n]]


@pytest.mark.parametrize("token_id", range(4))
def test_of_tokens_that_tie_the_sampled_one_comes_first(torch: Any, token_id: int) -> None:
    from helpers.sampling import token_logprobs

    logits = torch.full((4,), 1.5, dtype=torch.bfloat16)
    assert token_logprobs(logits, token_id, 1) == [(token_id, pytest.approx(math.log(0.25)))] * 2
    assert [one for one, _ in token_logprobs(logits, token_id, 4)][1:] == sorted(
        range(4), key=lambda one: one != token_id
    )
