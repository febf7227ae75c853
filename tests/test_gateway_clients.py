"""OpenAI's own client, unchanged, talks to the gateway in front of a real service with the tiny model."""

from __future__ import annotations

import asyncio
import json
import random
import socket
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from eventually import generation_stops, until
from running_gateway import RunningGateway, running_gateway
from scripted_service import ScriptedService
from wire import ENDLESS

KEY = "a-key-of-some-length"
QUESTION: Any = [{"role": "user", "content": "Tell me everything."}]
PARTS: Any = [
    {"role": "user", "content": [{"type": "text", "text": "Tell me "}, {"type": "text", "text": "everything."}]}
]


@pytest.fixture(scope="module")
def gateway(tiny_service: Any) -> Iterator[RunningGateway]:
    with running_gateway(tiny_service.port, keys=[f"ada {KEY}"]) as running:
        yield running


@pytest.fixture(scope="module")
def client(gateway: RunningGateway) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=gateway.url, api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def model(client: openai.OpenAI) -> str:
    (model,) = client.models.list()
    assert "/" not in model.id  # no path of this machine
    assert client.models.retrieve(model.id) == model
    return model.id


def test_a_chat_is_what_the_service_answers(client: openai.OpenAI, model: str, tiny_service: Any) -> None:
    expected = tiny_service.ask(QUESTION, max_tokens=30)
    for messages in (QUESTION, PARTS):
        reply = client.chat.completions.create(model=model, messages=messages, max_tokens=30)
        assert reply.choices[0].message.content == expected.text
        assert reply.choices[0].finish_reason == expected.finish_reason
        assert reply.usage is not None
        assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (expected.prompt_tokens, 30)


def test_a_stream_is_the_same_text(client: openai.OpenAI, model: str, tiny_service: Any) -> None:
    expected = tiny_service.ask(QUESTION, max_tokens=30)
    chunks = list(
        client.chat.completions.create(
            model=model, messages=QUESTION, max_tokens=30, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == expected.text
    usage = chunks[-1].usage
    assert usage is not None and usage.completion_tokens == 30


@pytest.mark.parametrize("questions", [12, pytest.param(200, marks=pytest.mark.long)])
def test_a_stream_never_differs_from_the_answer_at_once(client: openai.OpenAI, model: str, questions: int) -> None:
    """Half of the questions have a stop text from the middle of their answer. The tiny model writes emoji too."""
    chosen, texts = random.Random(questions), []
    for number in range(questions):
        content = f"{number}: {''.join(chosen.choices('añ 🦙👩‍🚀ل', k=12))}?"
        asked: Any = {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": 24}
        if number % 2:
            whole = client.chat.completions.create(**asked).choices[0].message.content or ""
            asked["stop"] = whole[len(whole) // 2 :][:3]
        (choice,) = client.chat.completions.create(**asked).choices
        chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**asked, stream=True)]
        assert "".join(chunk.delta.content or "" for chunk in chunks) == choice.message.content
        assert chunks[-1].finish_reason == choice.finish_reason == ("stop" if number % 2 else "length")
        texts.append(choice.message.content)
    assert not "".join(texts).isascii()


def test_the_clients_stream_helper_collects_the_answer(client: openai.OpenAI, model: str, tiny_service: Any) -> None:
    stop = tiny_service.ask(QUESTION, max_tokens=30).text[-4:]  # the helper raises if max_tokens ends the answer
    with client.chat.completions.stream(model=model, messages=QUESTION, max_tokens=30, stop=stop) as stream:
        pieces = [event.delta for event in stream if event.type == "content.delta"]
        completion = stream.get_final_completion()
    expected = tiny_service.ask(QUESTION, max_tokens=30, stop=stop).text
    assert completion.choices[0].message.content == "".join(pieces) == expected


def test_the_async_client_reads_many_streams_at_once(gateway: RunningGateway, model: str, tiny_service: Any) -> None:
    questions = [f"Question {n}?" for n in range(8)]

    async def read(client: openai.AsyncOpenAI, question: str) -> str:
        stream = await client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": question}], max_tokens=20, stream=True
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def read_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=gateway.url, api_key=KEY, max_retries=0) as client:
            return await asyncio.gather(*(read(client, question) for question in questions))

    assert asyncio.run(read_all()) == [tiny_service.ask(question, max_tokens=20).text for question in questions]


def test_a_raw_prompt_is_what_the_service_answers(client: openai.OpenAI, model: str, tiny_service: Any) -> None:
    prompts = ["One two three", "Four five six"]
    expected = [tiny_service.ask(prompt=prompt, max_tokens=10).text for prompt in prompts]
    reply = client.completions.create(model=model, prompt=prompts, max_tokens=10)
    assert [choice.text for choice in reply.choices] == expected
    stream = client.completions.create(model=model, prompt=prompts[0], max_tokens=10, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == expected[0]


def test_a_stop_text_ends_the_answer(client: openai.OpenAI, model: str) -> None:
    whole = client.chat.completions.create(model=model, messages=QUESTION, max_tokens=30).choices[0].message.content
    assert whole is not None
    stop = whole[len(whole) // 2 :][:4]
    reply = client.chat.completions.create(model=model, messages=QUESTION, max_tokens=30, stop=[stop])
    assert reply.choices[0].message.content == whole[: whole.index(stop)]
    assert reply.choices[0].finish_reason == "stop"


def test_seeds_make_choices_different_and_repeatable(client: openai.OpenAI, model: str) -> None:
    def texts() -> list[str | None]:
        reply = client.chat.completions.create(
            model=model, messages=QUESTION, max_tokens=10, n=3, seed=1, temperature=1.5
        )
        return [choice.message.content for choice in reply.choices]

    first = texts()
    assert len(set(first)) == 3
    assert texts() == first


def test_log_probabilities_are_those_of_the_service(client: openai.OpenAI, model: str, tiny_service: Any) -> None:
    options: dict[str, Any] = {"max_tokens": 12, "temperature": 0.8, "seed": 5}
    expected = tiny_service.ask(QUESTION, logprobs=2, **options)
    create: Any = client.chat.completions.create
    asked = {"model": model, "messages": QUESTION, "logprobs": True, "top_logprobs": 2, "n": 2, **options}
    reply = create(**asked)
    assert reply.choices[0].message.content == expected.text  # and so do plain requests of the same seed
    assert expected.text == tiny_service.ask(QUESTION, **options).text
    streamed: dict[int, list[Any]] = {0: [], 1: []}
    for chunk in create(stream=True, **asked):
        (choice,) = chunk.choices
        streamed[choice.index] += choice.logprobs.content if choice.logprobs else []
    for choice in reply.choices:
        assert [token.token for token in choice.logprobs.content] == [one.token for one in streamed[choice.index]]
    values = [token.logprob for token in reply.choices[0].logprobs.content]
    assert values == pytest.approx([token.logprob for token in expected.logprobs], abs=1e-4)
    alternatives = [[top.bytes for top in token.top_logprobs] for token in reply.choices[0].logprobs.content]
    assert alternatives == [[list(top.utf8) for top in token.top] for token in expected.logprobs]


def test_the_usage_tells_which_tokens_came_from_the_cache(client: openai.OpenAI, model: str) -> None:
    dialog: Any = [{"role": "user", "content": "Tell me a long story of " + "one " * 40}]
    create: Any = client.chat.completions.create
    first = create(model=model, messages=dialog, max_tokens=5, n=2)
    dialog.append({"role": "assistant", "content": first.choices[0].message.content})
    dialog.append({"role": "user", "content": "And then?"})
    second = create(model=model, messages=dialog, max_tokens=5, n=2)
    cached = [reply.usage.prompt_tokens_details.cached_tokens for reply in (first, second)]
    assert cached[0] < 32  # of its two answers, one reads the prompt; an earlier test may have begun as this one does
    assert first.usage.prompt_tokens // 32 * 32 <= cached[1] < second.usage.prompt_tokens
    response = client.responses.create(model=model, input=dialog, max_output_tokens=5)
    assert response.usage is not None
    assert response.usage.input_tokens_details.cached_tokens == (second.usage.prompt_tokens - 1) // 32 * 32


def test_choices_share_the_prompt(client: openai.OpenAI, model: str, tiny_service: Any) -> None:
    """Four choices of a long prompt must not take four times the steps that read it."""

    def steps_for(n: int, prompt: str) -> int:
        before = tiny_service.info().steps
        client.completions.create(model=model, prompt=prompt, max_tokens=1, n=n)
        return int(tiny_service.info().steps - before)

    alone = steps_for(1, "first " * 220)
    together = steps_for(4, "second " * 220)
    assert alone >= 2  # the prompt takes several steps
    assert together <= alone + 3


# ---- Errors, as the client raises them


def test_errors_are_raised_as_the_clients_own(client: openai.OpenAI, gateway: RunningGateway, model: str) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-5", messages=QUESTION)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model=model, messages=QUESTION, logit_bias={"1": 1})
    assert (wrong.value.param, wrong.value.code) == ("logit_bias", "unsupported_parameter")
    assert wrong.value.request_id is not None
    with pytest.raises(openai.BadRequestError, match="context window"):
        client.chat.completions.create(model=model, messages=QUESTION, max_tokens=100_000)
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=gateway.url, api_key="wrong", max_retries=0).models.list()


def test_an_error_in_the_middle_of_a_stream_is_raised() -> None:
    with ScriptedService() as scripted, running_gateway(scripted.port) as gateway:
        scripted.script = scripted.fail
        client = openai.OpenAI(base_url=gateway.url, api_key="none", max_retries=0)
        texts = []
        with pytest.raises(openai.APIError, match="The question is refused"):
            for chunk in client.chat.completions.create(model="scripted", messages=QUESTION, stream=True):
                texts.append(chunk.choices[0].delta.content)
        assert "".join(text or "" for text in texts) == "Half an "


def test_a_service_that_goes_away_in_the_middle_of_a_stream_is_an_error() -> None:
    with ScriptedService() as scripted, running_gateway(scripted.port) as gateway:
        scripted.script = scripted.half
        client = openai.OpenAI(base_url=gateway.url, api_key="none", max_retries=0)
        stream = iter(client.chat.completions.create(model="scripted", messages=QUESTION, stream=True))
        next(stream)
        scripted.stop()
        with pytest.raises(openai.APIError, match="went away"):
            list(stream)


# ---- The stream as bytes


class EventParser:
    """A reader of server-sent events, written from the WHATWG specification. `feed` takes any piece of the bytes."""

    def __init__(self) -> None:
        self._unread, self._data = b"", []  # type: tuple[bytes, list[str]]
        self.events: list[str] = []

    def feed(self, piece: bytes) -> None:
        *lines, self._unread = (self._unread + piece).split(b"\n")
        for line in lines:
            if not line and self._data:
                self.events.append("\n".join(self._data))
                self._data = []
            elif line.startswith(b"data:"):
                self._data.append(line[5:].decode().removeprefix(" "))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_a_stream_that_arrives_in_pieces_has_the_same_text(
    client: openai.OpenAI, model: str, tiny_service: Any, size: int
) -> None:
    body = {"model": model, "messages": QUESTION, "max_tokens": 40, "stream": True}
    parser = EventParser()
    with client.chat.completions.with_streaming_response.create(**body) as response:
        for piece in response.iter_bytes(size):
            parser.feed(piece)
    *chunks, done = parser.events
    assert done == "[DONE]"
    text = "".join(json.loads(chunk)["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == tiny_service.ask(QUESTION, max_tokens=40).text


# ---- Clients that leave


@pytest.fixture(scope="module")
def endless_gateway(endless_service: Any) -> Iterator[RunningGateway]:
    with running_gateway(endless_service.port, keys=[f"ada {KEY}"]) as running:
        yield running


@pytest.fixture(scope="module")
def endless_model(endless_gateway: RunningGateway) -> str:
    with openai.OpenAI(base_url=endless_gateway.url, api_key=KEY) as client:
        (model,) = client.models.list()
    return model.id


def test_if_a_client_leaves_generation_stops(
    endless_gateway: RunningGateway, endless_model: str, endless_service: Any
) -> None:
    """Clients leave at random moments."""
    records = len(endless_gateway.records)
    moments = random.Random(0)
    for number in range(12):
        fields = {"model": endless_model, "messages": QUESTION, "max_tokens": ENDLESS, "stream": number % 2 == 0}
        body = json.dumps(fields).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {KEY}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        address = "127.0.0.1", endless_gateway.port
        with generation_stops(endless_service), socket.create_connection(address) as connection:
            connection.sendall(head.encode() + body)
            wanted = endless_service.info().steps + moments.randrange(1, 20)
            until(lambda: endless_service.info().steps >= wanted, "the answer is being generated")  # noqa: B023
    endless_gateway.wait_for_records(records + 12)
    assert [record.status for record in endless_gateway.records[records:]] == [499] * 12


def test_many_clients_that_leave_at_once_leave_nothing_behind(
    endless_gateway: RunningGateway, endless_model: str, endless_service: Any
) -> None:
    async def leave(client: openai.AsyncOpenAI, number: int) -> None:
        async with await client.chat.completions.create(
            model=endless_model, messages=QUESTION, max_tokens=ENDLESS, stream=True, n=2
        ) as stream:
            async for _ in stream:
                if not (number := number - 1):
                    break

    async def leave_all() -> None:
        async with openai.AsyncOpenAI(base_url=endless_gateway.url, api_key=KEY, max_retries=0) as client:
            await asyncio.gather(*(leave(client, number) for number in range(1, 13)))

    with generation_stops(endless_service):
        asyncio.run(leave_all())
    assert endless_service.ask(QUESTION, max_tokens=5).completion_tokens == 5


def test_a_client_that_closes_the_connection_after_the_last_event_has_not_left(
    client: openai.OpenAI, gateway: RunningGateway, model: str
) -> None:
    before = len(gateway.records)
    for _ in range(10):
        list(client.chat.completions.create(model=model, messages=QUESTION, max_tokens=2, stream=True))
    gateway.wait_for_records(before + 10)
    assert [record.status for record in gateway.records[before:]] == [200] * 10
