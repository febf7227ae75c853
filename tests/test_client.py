"""What the client sends, and what it refuses before anything is sent."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from typing import Any

import pytest

import helpers
from helpers.client import build_request
from helpers.errors import InvalidRequest, ServiceUnavailable
from helpers.options import SamplingParams
from scripted_service import ScriptedService


@pytest.fixture
def scripted() -> Iterator[ScriptedService]:
    with ScriptedService() as service:
        yield service


def test_a_question_is_sent_as_a_dialog_with_the_default_sampling_params(scripted: ScriptedService) -> None:
    helpers.ask("Hello", port=scripted.port)
    (request,) = scripted.requests
    assert request.messages == [{"role": "user", "content": "Hello"}]
    assert request.sampling_params() == SamplingParams(stop=[])


def test_the_system_prompt_comes_first_and_the_options_travel(scripted: ScriptedService) -> None:
    dialog = [{"role": "user", "content": "Hello"}]
    sampling: dict[str, Any] = {"max_tokens": 3, "temperature": 0.5, "top_p": 0.75, "seed": 7, "stop": ["\n"]}
    helpers.ask(dialog, system="Be brief.", port=scripted.port, **sampling)
    (request,) = scripted.requests
    assert request.messages == [{"role": "system", "content": "Be brief."}, *dialog]
    assert request.sampling_params() == SamplingParams(**sampling)


def test_a_raw_prompt_goes_to_the_endpoint_of_the_article(scripted: ScriptedService) -> None:
    helpers.ask(prompt="[INST] Hello [/INST]", max_tokens=3, port=scripted.port)
    (request,) = scripted.requests
    assert request.prompt == "[INST] Hello [/INST]"


def test_nothing_is_sent_before_the_answer_is_read(scripted: ScriptedService) -> None:
    answer = helpers.stream("Hello", max_tokens=3, port=scripted.port)
    assert scripted.requests == []
    assert list(answer) == ["1:0 ", "1:1 ", "1:2 "]


def test_aask_returns_the_same_answer_with_an_event_loop(scripted: ScriptedService) -> None:
    answer = asyncio.run(helpers.aask("Hello", max_tokens=3, port=scripted.port))
    assert (answer.text, answer.finish_reason) == ("1:0 1:1 1:2 ", "length")


def test_info_names_the_model(scripted: ScriptedService) -> None:
    assert helpers.info(port=scripted.port).model == "scripted"


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": 0}, "^max_tokens is 0. Ask for at least 1 token.$"),
    ({"max_tokens": 10**12}, "^max_tokens is 1000000000000. Ask for at most"),
    ({"max_tokens": "many"}, "max_tokens: Input should be a valid integer"),
    ({"max_tokens": 1.5}, "max_tokens: Input should be a valid integer"),
    ({"temperature": float("nan")}, "^temperature is nan"),
    ({"temperature": 2.5}, "^temperature is 2.5"),
    ({"top_p": 0}, "^top_p is 0.0"),
    ({"seed": -1}, "^seed is -1"),
    ({"seed": 2**40}, "^seed is 1099511627776"),
    ({"stop": "one string"}, "stop: Input should be a valid list"),
    ({"system": 5}, "messages.0.content: Input should be a valid string"),
    ({"system": "half a \ud83d pair"}, r"not valid Unicode: '\\ud83d' at character 8"),
    ({"stop": ["\ud83d"]}, "not valid Unicode"),
    ({"prompt": "Hello"}, "needs either messages or prompt="),
    ({"messages": None}, "needs either messages or prompt="),
    ({"messages": None, "prompt": "Hello", "system": "Be brief."}, "Leave system= out"),
    ({"messages": None, "prompt": 5}, "prompt: Input should be a valid string"),
    ({"messages": 5}, "messages: Input should be a valid list"),
    ({"messages": ["Hello"]}, "messages.0: Input should be a valid dictionary"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content: Input should be a valid string"),
    ({"port": 0}, "^0 is not a port"),
    ({"port": 65536}, "^65536 is not a port"),
    ({"port": "12345"}, "^12345 is not a port"),
]


@pytest.mark.parametrize(("options", "says"), REFUSED, ids=lambda value: str(value)[:40].encode("ascii", "replace"))
def test_what_cannot_be_sent_is_refused_at_once(options: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        helpers.stream(**{"messages": "Hello", **options})


def test_an_option_that_does_not_exist_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="max_token"):
        helpers.stream("Hello", max_token=5)  # type: ignore[call-arg]


def test_the_dialog_is_left_to_the_service() -> None:
    """Only the service has the tokenizer, so only its `helpers.prompts.check_dialog` judges a dialog."""
    assert build_request([]).messages == []  # type: ignore[union-attr]
    assert build_request([{"role": "robot", "content": "[INST]"}])  # type: ignore[typeddict-item,list-item]


def test_if_no_service_answers_the_error_says_how_to_start_one() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        for ask in (helpers.ask, lambda *question, **port: asyncio.run(helpers.aask(*question, **port))):
            with pytest.raises(ServiceUnavailable, match=f"127.0.0.1:{port} .*helpers serve --port {port}"):
                ask("Hello", port=port)
