"""One module decides which values are valid, and gives every caller the same message."""

from __future__ import annotations

import argparse
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.errors import InvalidRequest
from helpers.options import PORT, EngineArgs, SamplingParams, check_port, check_port_to_serve


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"max_tokens": 0}, "max_tokens is 0. Ask for at least 1 token."),
        ({"max_tokens": -3}, "max_tokens is -3. Ask for at least 1 token."),
        ({"max_tokens": 2**31}, "max_tokens is 2147483648. Ask for at most 2**31 - 1 tokens."),
        ({"temperature": 2.5}, "temperature is 2.5. Choose a value from 0 (always the most likely token) to 2."),
        ({"temperature": -0.1}, "temperature is -0.1. Choose a value from 0"),
        ({"temperature": float("nan")}, "temperature is nan. Choose a value from 0"),
        ({"temperature": float("inf")}, "temperature is inf. Choose a value from 0"),
        ({"top_p": 0}, "top_p is 0. Choose a probability above 0 and at most 1."),
        ({"top_p": 1.1}, "top_p is 1.1. Choose a probability"),
        ({"top_p": float("nan")}, "top_p is nan. Choose a probability"),
        ({"seed": -1}, "seed is -1. Choose a whole number from 0 to 2**31 - 1."),
        ({"seed": 2**31}, "seed is 2147483648. Choose a whole number"),
        ({"logprobs": -1}, "logprobs is -1. Ask for 0 to 20 of the most likely tokens at each place."),
        ({"logprobs": 21}, "logprobs is 21. Ask for 0 to 20"),
        ({"stop": ["a"] * 100_000}, "There are 100,000 stop strings. Give at most 16."),
        ({"stop": ["a", "b" * 257]}, "A stop string has 257 characters. Give stop strings of at most 256 characters."),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_sampling_option_out_of_range_is_refused(wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        SamplingParams(**wrong)
    assert str(refused.value).startswith(sentence)


@pytest.mark.parametrize(
    "right",
    [
        {"max_tokens": 1},
        {"temperature": 0},
        {"temperature": 1e-38},
        {"temperature": 2.0},
        {"top_p": 1},
        {"top_p": 1e-9},
        {"seed": 2**31 - 1},
        {"logprobs": 0},
        {"logprobs": 20},
        {"stop": ["a" * 256] * 16},
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_sampling_option_at_the_end_of_its_range_is_accepted(right: dict[str, Any]) -> None:
    SamplingParams(**right)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"context_length": 1}, "context_length is 1. Choose at least 2"),
        ({"max_num_seqs": 0}, "max_num_seqs is 0. Choose at least 1."),
        ({"max_queue_size": -1}, "max_queue_size is -1. Choose at least 0."),
        ({"cache_memory": 0}, "cache_memory is 0. Choose at least 1 byte."),
        ({"context_length": "1"}, "context_length is 1. Choose at least 2"),
        ({"context_length": "4k"}, "context_length is '4k'. Give a whole number."),
        ({"max_num_seqs": ""}, "max_num_seqs is ''. Give a whole number."),
        ({"max_queue_size": 1.5}, "max_queue_size is 1.5. Give a whole number."),
        ({"cache_memory": "1e9"}, "cache_memory is '1e9'. Give a whole number."),
        ({"max_num_seqs": True}, "max_num_seqs is True. Give a whole number."),
        ({"max_num_seqs": [1]}, "max_num_seqs is [1]. Give a whole number."),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_limit_under_which_nothing_can_run_is_refused(wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        EngineArgs(**wrong)
    assert str(refused.value).startswith(sentence)


@given(
    context_length=st.none() | st.integers(2, 10**6),
    max_num_seqs=st.integers(1, 1000),
    max_queue_size=st.integers(0, 1000),
    cache_memory=st.none() | st.integers(1, 10**12),
)
def test_limits_survive_the_command_line(**limits: int | None) -> None:
    parser = argparse.ArgumentParser()
    EngineArgs.add_to(parser)
    args = EngineArgs(**limits)
    assert EngineArgs.from_namespace(parser.parse_args(args.to_arguments())) == args
    assert EngineArgs.from_namespace(parser.parse_args([])) == EngineArgs()


def test_every_limit_has_an_option_with_a_help_text() -> None:
    parser = argparse.ArgumentParser()
    EngineArgs.add_to(parser)
    for option in ("--context-length", "--max-num-seqs", "--max-queue-size", "--cache-memory"):
        assert option in parser.format_help()


def test_a_limit_may_be_a_string_from_the_environment_or_none() -> None:
    from_environment: dict[str, Any] = {"context_length": "256", "max_num_seqs": " 8\n", "max_queue_size": "0"}
    args = EngineArgs(**from_environment)
    assert args == EngineArgs(context_length=256, max_num_seqs=8, max_queue_size=0)
    assert args.to_arguments() == ["--context-length=256", "--max-num-seqs=8", "--max-queue-size=0"]
    assert EngineArgs(**dict.fromkeys(from_environment)) == EngineArgs()


def test_a_sampling_option_that_is_none_is_the_default_and_a_string_is_one_stop_string() -> None:
    nothing: Any = dict.fromkeys(("max_tokens", "temperature", "top_p", "seed", "stop"))
    assert SamplingParams(**nothing) == SamplingParams()
    assert SamplingParams(stop="User:").stop == ["User:"]
    with pytest.raises(InvalidRequest, match="A stop string has 257 characters"):
        SamplingParams(stop="a" * 257)


def test_a_port_may_be_a_string_from_the_environment_or_none() -> None:
    for check in (check_port, check_port_to_serve):
        assert [check(port) for port in (12777, "12777", " 12777\n", None)] == [12777, 12777, 12777, PORT]
    assert check_port_to_serve("0") == check_port_to_serve(0) == 0


@pytest.mark.parametrize("port", [-1, 65536, "65536", "", "http", "1.5", "9" * 5000, 1.5, True, [1]])
def test_what_is_not_a_port_of_a_service_is_refused(port: Any) -> None:
    for check, fix in ((check_port, "Give the port"), (check_port_to_serve, "Choose one from 1 to 65535, or 0")):
        with pytest.raises(InvalidRequest) as refused:
            check(port)
        assert str(refused.value).startswith(f"{port!r} is not a port. {fix}")
    with pytest.raises(InvalidRequest, match="^0 is not a port"):
        check_port(0)
