"""What the client sends, and what it refuses before anything is sent."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

import helpers
from helpers._jina import QuietDoc
from helpers.client import build_request
from helpers.errors import InvalidRequest, ServiceUnavailable
from helpers.messages import Message
from helpers.options import SamplingParams
from helpers.schemas import ChatDocument, SamplingDocument
from scripted_service import ScriptedService


def test_a_question_is_sent_as_a_dialog_with_the_default_sampling_params(scripted: ScriptedService) -> None:
    helpers.ask("Hello", port=scripted.port)
    (request,) = scripted.requests
    assert request.messages == [{"role": "user", "content": "Hello"}]
    assert request.sampling_params() == SamplingParams(stop=[])


def test_the_system_prompt_comes_first_and_the_options_travel(scripted: ScriptedService) -> None:
    dialog = [{"role": "user", "content": "Hello"}]
    sampling: dict[str, Any] = {
        "max_tokens": 3,
        "temperature": 0.5,
        "top_p": 0.75,
        "seed": 7,
        "stop": ["\n"],
        "logprobs": 2,
    }
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
    ({"logprobs": 21}, "^logprobs is 21"),
    ({"logprobs": True}, "^logprobs is True. Give a number"),
    ({"stop": 5}, "stop: Input should be a valid list"),
    ({"stop": [None]}, r"stop\.0: Input should be a valid string"),
    ({"stop": "a" * 257}, "^A stop string has 257 characters"),
    ({"system": 5}, r"^Message 1 \(system\) has a content of type int"),
    ({"system": "half a \ud83d pair"}, r"not valid Unicode: its character 8 is '\\ud83d'"),
    ({"stop": ["\ud83d"]}, "not valid Unicode"),
    ({"prompt": "Hello"}, "needs either messages or prompt="),
    ({"messages": None}, "needs either messages or prompt="),
    ({"messages": None, "prompt": "Hello", "system": "Be brief."}, "Leave system= out"),
    ({"messages": None, "prompt": 5}, "prompt: Input should be a valid string"),
    ({"messages": None, "prompt": "\ud83d"}, "not valid Unicode"),
    ({"messages": 5}, "^A dialog is a list of messages, not a int"),
    ({"messages": ["Hello"]}, "^Message 1 is not a dict"),
    ({"messages": [{"role": "user", "content": 5}]}, r"^Message 1 \(user\) has a content of type int"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "'image_url', and only text is supported"),
    ({"messages": [{"role": "robot", "content": "b"}]}, "unknown role 'robot'"),
    ({"max_tokens": True}, "^max_tokens is True. Give a number"),
    ({"temperature": False}, "^temperature is False. Give a number"),
    ({"stop": ["a"] * 17}, "^There are 17 stop strings. Give at most 16"),
    ({"stop": ["a" * 257]}, "^A stop string has 257 characters"),
    ({"port": 0}, "^0 is not a port"),
    ({"port": 65536}, "^65536 is not a port"),
    ({"port": "12345/chat"}, "^'12345/chat' is not a port"),
]


@pytest.mark.parametrize(("options", "says"), REFUSED, ids=lambda value: str(value)[:40].encode("ascii", "replace"))
def test_what_cannot_be_sent_is_refused_at_once(options: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        helpers.stream(**{"messages": "Hello", **options})


def test_an_option_that_does_not_exist_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="max_token"):
        helpers.stream("Hello", max_token=5)  # type: ignore[call-arg]


def test_the_dialog_as_a_whole_is_left_to_the_service() -> None:
    """The client checks each message. Only the service's `helpers.messages.check_dialog` checks their order."""
    assert build_request([]).messages == []  # type: ignore[union-attr]
    assert build_request([{"role": "assistant", "content": "[INST]"}])


OPENAIS = {
    "role": "user",
    "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}],
    "refusal": None,
    "tool_calls": None,
    "annotations": [],
    "timestamp": 1.7e9,
}


def test_a_message_as_openais_package_dumps_it_is_sent_as_a_plain_one() -> None:
    assert build_request([OPENAIS]).messages == [{"role": "user", "content": "Hello"}]  # type: ignore[union-attr,list-item]


class AnyMessages(SamplingDocument):
    """A request from a client that defines its own document classes."""

    messages: list[dict[str, Any]]


def test_the_service_reads_such_a_message_from_any_client() -> None:
    sent = AnyMessages(max_tokens=3, messages=[OPENAIS]).to_protobuf()
    assert ChatDocument.from_protobuf(sent).messages == [{"role": "user", "content": "Hello"}]


@pytest.mark.parametrize("empty", ["", " \n"])
def test_an_empty_system_prompt_is_none(empty: str) -> None:
    dialog: list[Message] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    assert build_request("Hello", system=empty).messages == dialog[1:]  # type: ignore[union-attr]
    assert build_request(dialog, system=empty).messages == dialog  # type: ignore[union-attr]
    assert build_request(prompt="Hello", system=empty).prompt == "Hello"  # type: ignore[union-attr]


@pytest.mark.parametrize("prompt", [{"messages": "Hello"}, {"prompt": "Hello"}], ids=str)
def test_an_option_that_is_none_is_the_default_and_a_string_is_one_stop_string(prompt: dict[str, str]) -> None:
    nothing: dict[str, Any] = dict.fromkeys(
        ("system", "max_tokens", "temperature", "top_p", "seed", "stop", "logprobs")
    )
    default = build_request(**prompt)
    assert build_request(**prompt, **nothing).sampling_params() == default.sampling_params()
    assert build_request(**prompt, stop="\n").stop == ["\n"]
    from_environment: dict[str, Any] = {"max_tokens": "3", "temperature": "0.5", "top_p": "0.75", "seed": "7"}
    sampling = build_request(**prompt, **from_environment).sampling_params()
    assert sampling == SamplingParams(max_tokens=3, temperature=0.5, top_p=0.75, seed=7, stop=[])


class AnyOptions(QuietDoc):
    """A request from a client that defines its own document classes."""

    messages: list[dict[str, Any]]
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stop: str | None = None


@pytest.mark.parametrize(("stop", "read"), [(None, []), ("\n", ["\n"])])
def test_the_service_reads_such_options_from_any_client(stop: str | None, read: list[str]) -> None:
    request = ChatDocument.from_protobuf(AnyOptions(messages=[OPENAIS], stop=stop).to_protobuf())
    assert request.sampling_params() == SamplingParams(stop=read)


@pytest.mark.parametrize("number", ["float32", "float64", "int64"])
def test_the_numbers_of_numpy_are_numbers(number: str) -> None:
    one = getattr(pytest.importorskip("numpy"), number)(1)
    request = build_request("Hello", max_tokens=one, temperature=one, top_p=one, seed=one)
    assert request.sampling_params() == SamplingParams(max_tokens=1, temperature=1, top_p=1, seed=1, stop=[])


def test_if_no_service_answers_the_error_says_how_to_start_one() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        for ask in (helpers.ask, lambda *question, **port: asyncio.run(helpers.aask(*question, **port))):
            with pytest.raises(ServiceUnavailable, match=f"127.0.0.1:{port} .*helpers serve --port {port}"):
                ask("Hello", port=port)
