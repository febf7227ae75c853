"""``/v1/responses``, OpenAI's newer API: as OpenAI's client reads it, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.types.responses import Response

from running_gateway import RunningGateway, running_gateway
from scripted_service import ScriptedService

SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.fixture
def gateway(scripted: ScriptedService) -> Iterator[RunningGateway]:
    with running_gateway(scripted.port) as running:
        yield running


@pytest.fixture
def client(gateway: RunningGateway) -> Iterator[openai.OpenAI]:
    # strict: the client then raises if a reply is not what its types say
    with openai.OpenAI(base_url=gateway.url, api_key="none", max_retries=0, _strict_response_validation=True) as client:
        yield client


def test_a_question_is_answered(client: openai.OpenAI) -> None:
    response = client.responses.create(
        model="scripted", input="Hello", max_output_tokens=3, metadata={"a": "b"}, instructions="Be brief."
    )
    assert response.output_text == "1:0 1:1 1:2 "
    assert (response.status, response.instructions, response.metadata) == ("incomplete", "Be brief.", {"a": "b"})
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.usage is not None
    assert (response.usage.input_tokens, response.usage.output_tokens, response.usage.total_tokens) == (5, 3, 8)


def test_a_reply_can_be_sent_back_as_input(client: openai.OpenAI, scripted: ScriptedService) -> None:
    dialog: list[Any] = [{"role": "user", "content": [{"type": "input_text", "text": "One"}]}]
    first = client.responses.create(model="scripted", input=dialog, max_output_tokens=1)
    dialog += [*(item.model_dump() for item in first.output), {"role": "user", "content": "Two"}]
    client.responses.create(model="scripted", input=dialog, max_output_tokens=1)
    assert scripted.requests[1].messages == [
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "1:0 "},
        {"role": "user", "content": "Two"},
    ]


def test_instructions_come_before_the_system_message(client: openai.OpenAI, scripted: ScriptedService) -> None:
    dialog: list[Any] = [SYSTEM, {"role": "user", "content": "Hello"}]
    client.responses.create(model="scripted", input=dialog, instructions="Be kind.")
    assert scripted.requests[0].messages[0] == {"role": "system", "content": "Be kind.\n\nBe brief."}


def test_the_events_of_a_stream_are_numbered_and_complete(client: openai.OpenAI) -> None:
    events = list(client.responses.create(model="scripted", input="Hello", max_output_tokens=2, stream=True))
    assert [event.type for event in events] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))


def test_the_clients_stream_helper_collects_the_response(client: openai.OpenAI, scripted: ScriptedService) -> None:
    from scripted_service import last, tokens

    def script(_: Any) -> Iterator[Any]:
        yield from tokens("Hello ", "you")
        yield last("stop")

    scripted.script = script
    with client.responses.stream(model="scripted", input="Hello") as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        response: Response = stream.get_final_response()
    assert response.output_text == "".join(deltas) == "Hello you"
    assert response.status == "completed"


def test_a_failure_in_the_middle_of_a_stream_is_two_events(client: openai.OpenAI, scripted: ScriptedService) -> None:
    scripted.script = scripted.fail
    *_, error, failed = client.responses.create(model="scripted", input="Hello", stream=True)
    assert error.type == "error" and "refused" in error.message
    assert failed.type == "response.failed" and failed.response.status == "failed"
    assert failed.response.error is not None and "refused" in failed.response.error.message


def test_a_failure_before_the_first_token_has_a_status(client: openai.OpenAI, scripted: ScriptedService) -> None:
    scripted.script = scripted.refuse
    with pytest.raises(openai.BadRequestError, match="refused"):
        client.responses.create(model="scripted", input="Hello", stream=True)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tools": [{"type": "web_search"}]}, "'tools' is not supported"),
        ({"previous_response_id": "resp_1"}, "'previous_response_id' is not supported"),
        ({"store": True}, "'store' is not supported"),
        ({"include": ["reasoning.encrypted_content"]}, "'include' is not supported"),
        ({"top_logprobs": 2}, "top_logprobs is 2, but log-probabilities are off. Set include to"),
        ({"top_logprobs": 21}, "top_logprobs is wrong"),
        ({"truncation": "disabled"}, "'truncation' is not supported"),
        ({"text": {"format": {"type": "json_object"}}}, "'text' is not supported"),
        ({"background": True}, "'background' is not supported"),
        ({"input": [{"type": "function_call_output", "call_id": "1", "output": "2"}]}, "'function_call_output'"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "'input_image'"),
        ({"input": 3}, "list of messages"),
        ({"instructions": 3}, "instructions is wrong"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    client: openai.OpenAI, scripted: ScriptedService, fields: dict[str, Any], words: str
) -> None:
    arguments: dict[str, Any] = {"model": "scripted", "input": "Hello", **fields}
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(**arguments)
    assert words in str(refused.value)
