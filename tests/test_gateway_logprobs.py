"""Log-probabilities in the shapes of OpenAI's three APIs, as OpenAI's strict client reads them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from helpers.logprobs import Logprob, to_fields
from helpers.schemas import ModelOutputDocument
from running_gateway import running_gateway
from scripted_service import ScriptedService, last

QUESTION: Any = [{"role": "user", "content": "Hello"}]
LLAMA = "🦙".encode()


@pytest.fixture
def client(scripted: ScriptedService) -> Iterator[openai.OpenAI]:
    """A client of a service that says "One 🦙": three tokens, of which two are parts of one character."""

    def script(request: Any) -> Iterator[ModelOutputDocument]:
        for piece, offset, token in (("One", 0, b"One"), ("", 3, b" " + LLAMA[:2]), (" 🦙", 3, LLAMA[2:])):
            impossible = Logprob(8, b"two", float("-inf"))
            ranked = [Logprob(7, token, -0.25), Logprob(7, token, -0.25), impossible][: 1 + (request.logprobs or 0)]
            fields = {} if request.logprobs is None else to_fields(ranked, offset)
            yield ModelOutputDocument(token_id=7, generated_text=piece, prompt_tokens=5, cached_tokens=4, **fields)
        yield ModelOutputDocument(token_id=9, generated_text="", **(to_fields(ranked, 5) if fields else {}))
        yield last("stop").model_copy(update={"cached_tokens": 4})  # a stop string has cut off the token before

    scripted.script = script
    with (
        running_gateway(scripted.port) as gateway,
        openai.OpenAI(base_url=gateway.url, api_key="none", max_retries=0, _strict_response_validation=True) as client,
    ):
        yield client


TOKENS = [
    {"token": "One", "bytes": list(b"One"), "logprob": -0.25},
    {"token": r" \xf0\x9f", "bytes": [32, 0xF0, 0x9F], "logprob": -0.25},
    {"token": r"\xa6\x99", "bytes": [0xA6, 0x99], "logprob": -0.25},
]
IMPOSSIBLE = {"token": "two", "bytes": list(b"two"), "logprob": -9999.0}
WITH_TOP = [{**token, "top_logprobs": [token, IMPOSSIBLE]} for token in TOKENS]


@pytest.mark.parametrize(("fields", "tops"), [({}, 0), ({"top_logprobs": 1}, 1), ({"top_logprobs": 2}, 2)], ids=str)
def test_a_chat_has_them_if_asked(client: openai.OpenAI, fields: dict[str, Any], tops: int) -> None:
    create: Any = client.chat.completions.create
    (choice,) = create(model="scripted", messages=QUESTION, logprobs=True, **fields).choices
    expected = [{**token, "top_logprobs": token["top_logprobs"][:tops]} for token in WITH_TOP]
    assert choice.logprobs.model_dump() == {"content": expected, "refusal": None}
    (choice,) = create(model="scripted", messages=QUESTION, logprobs=False).choices
    assert choice.logprobs is None


def test_a_streamed_chat_has_them_beside_their_text(client: openai.OpenAI) -> None:
    chunks = client.chat.completions.create(
        model="scripted", messages=QUESTION, logprobs=True, top_logprobs=2, stream=True, n=2
    )
    read: dict[int, list[Any]] = {0: [], 1: []}
    for chunk in chunks:
        (choice,) = chunk.choices
        content = choice.logprobs and choice.logprobs.model_dump()["content"]
        read[choice.index].append((choice.delta.content, content))
    assert read[0] == read[1] == [("", None), ("One", WITH_TOP[:1]), (" 🦙", WITH_TOP[1:]), (None, None)]


def test_a_continuation_has_them_in_lists(client: openai.OpenAI) -> None:
    (choice,) = client.completions.create(model="scripted", prompt="Hello", logprobs=2).choices
    texts = [token["token"] for token in TOKENS]
    assert choice.logprobs is not None
    assert choice.logprobs.model_dump() == {
        "tokens": texts,
        "token_logprobs": [-0.25] * 3,
        "top_logprobs": [{text: -0.25, "two": -9999.0} for text in texts],
        "text_offset": [0, 3, 3],
    }
    # OpenAI's type of a chunk is that of a whole answer, which must have a finish_reason
    lenient = client.copy(_extra_kwargs={"_strict_response_validation": False})
    chunks = lenient.completions.create(model="scripted", prompt="Hello", logprobs=0, stream=True)
    read = [
        (chunk.choices[0].text, chunk.choices[0].logprobs and chunk.choices[0].logprobs.model_dump())
        for chunk in chunks
    ]
    both = {"tokens": texts[1:], "token_logprobs": [-0.25] * 2, "text_offset": [3, 3]}
    assert read[1:] == [(" 🦙", both | {"top_logprobs": [{text: -0.25} for text in texts[1:]]}), ("", None)]
    (choice,) = client.completions.create(model="scripted", prompt="Hello").choices
    assert choice.logprobs is None


def test_a_response_has_them_if_they_are_included(client: openai.OpenAI) -> None:
    create: Any = client.responses.create
    asked: dict[str, Any] = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    response = create(model="scripted", input="Hello", **asked)
    assert response.top_logprobs == 2
    assert [token.model_dump() for token in response.output[0].content[0].logprobs] == WITH_TOP
    assert response.usage.input_tokens_details.cached_tokens == 4
    events = list(create(model="scripted", input="Hello", stream=True, **asked))
    first, second = (event.logprobs for event in events if event.type == "response.output_text.delta")
    assert [token.token for token in first + second] == [token["token"] for token in TOKENS]
    (done,) = (event for event in events if event.type == "response.output_text.done")
    assert [token.logprob for token in done.logprobs] == [-0.25] * 3
    assert events[-1].response.output[0].content[0].logprobs == response.output[0].content[0].logprobs
    assert create(model="scripted", input="Hello").output[0].content[0].logprobs == []


@pytest.mark.parametrize("logprobs", [-1, 6, True])
def test_a_continuation_has_five_alternatives_at_most(client: openai.OpenAI, logprobs: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="logprobs is wrong"):
        client.completions.create(model="scripted", prompt="Hello", logprobs=logprobs)
