"""The endpoints in this process, without a server: one document per token, and every failure in the last one."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="the executor needs the packages that run a model")

from helpers import prompts
from helpers.errors import InvalidRequest, ModelUnavailable
from helpers.executor import ChatRequest, PromptRequest, TokenStreamingExecutor
from helpers.schemas import ModelOutputDocument, PromptDocument, SamplingDocument
from helpers.sequence import TokenStream
from wire import ENDLESS

DIALOG = [{"role": "user", "content": "What is a token?"}]


@contextmanager
def executors(folder: Path) -> Iterator[Callable[..., TokenStreamingExecutor]]:
    """Start executors with the model in `folder`, or another, and the given `EngineArgs`. Close them at the end."""
    started, switch_interval = [], sys.getswitchinterval()

    def start(model: str = str(folder), **limits: int) -> TokenStreamingExecutor:
        started.append(TokenStreamingExecutor(model=model, precision="fp32", engine_args=limits))
        return started[-1]

    try:
        yield start
    finally:
        for executor in started:
            executor.close()
        sys.setswitchinterval(switch_interval)
        logging.disable(logging.NOTSET)


@pytest.fixture
def start(tiny_folder: Path) -> Iterator[Callable[..., TokenStreamingExecutor]]:
    with executors(tiny_folder) as start:
        yield start


@pytest.fixture(scope="module")
def executor(tiny_folder: Path) -> Iterator[TokenStreamingExecutor]:
    """An executor that several tests share."""
    with executors(tiny_folder) as start:
        yield start()


def prompt(text: str = "[INST] Hello [/INST]", max_tokens: int = 10, **options: Any) -> PromptRequest:
    return PromptRequest(prompt=text, max_tokens=max_tokens, **options)


def dialog(*messages: dict[str, str], max_tokens: int = 10) -> ChatRequest:
    return ChatRequest(messages=[*DIALOG, *messages], max_tokens=max_tokens)


def received(endpoint: AsyncIterator[Any]) -> list[Any]:
    """Return all documents of a stream."""

    async def read() -> list[Any]:
        return [document async for document in endpoint]

    return asyncio.run(read())


def text_of(documents: list[Any]) -> str:
    """Return the text of a stream."""
    return "".join(document.generated_text for document in documents)


@pytest.fixture
def say(executor: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], None]:
    """Let the model of `executor` answer with the given tokens."""

    def say(tokens: list[str]) -> None:
        def submit(prompt_ids: list[int], params: Any) -> TokenStream:
            stream = TokenStream()
            for token_id in executor.chat_model.tokenizer.convert_tokens_to_ids(tokens):
                stream.logprobs.append([(token_id, -0.5)])
                stream.put(token_id)
            stream.end("length")
            return stream

        monkeypatch.setattr(executor.engine, "submit", submit)

    return say


def test_each_token_is_a_document_and_the_last_one_carries_the_usage(executor: Any, tiny: Any) -> None:
    *tokens, last = received(executor.task(prompt()))
    assert len(tokens) == 10
    ids = [document.token_id for document in tokens]
    text = text_of([*tokens, last])
    prompt_ids = prompts.token_ids("[INST] Hello [/INST]", tiny.tokenizer)
    assert tiny.tokenizer.decode(prompt_ids) + text == tiny.tokenizer.decode(prompt_ids + ids)
    prompt_tokens = len(prompt_ids)
    assert (last.token_id, last.finish_reason, last.completion_tokens) == (-1, "length", 10)
    assert (last.prompt_tokens, last.dropped_turns, last.error) == (prompt_tokens, 0, None)
    assert [document.prompt_tokens for document in tokens] == [prompt_tokens, *[None] * 9]
    assert {document.finish_reason for document in tokens} == {None}


def test_a_stop_string_ends_the_answer(executor: Any) -> None:
    text = text_of(received(executor.task(prompt())))
    stop = text[5:8]
    *_, last = stopped = received(executor.task(prompt(stop=[stop])))
    assert text_of(stopped) == text[: text.index(stop)]
    assert last.finish_reason == "stop"
    assert last.completion_tokens == len(stopped) - 1 < 10


def test_a_token_tells_its_log_probability_and_the_most_likely_ones(executor: Any, tiny: Any) -> None:
    plain = received(executor.task(prompt()))
    *tokens, last = received(executor.task(prompt(logprobs=2)))
    assert [document.token_id for document in tokens] == [document.token_id for document in plain[:-1]]
    text, offset = text_of([*tokens, last]), 0
    for document in tokens:
        assert document.logprob_ids[:2] == [document.token_id] * 2  # greedy
        assert document.logprobs[0] == document.logprobs[1] > document.logprobs[2]
        spelling = bytes.fromhex(document.logprob_tokens[0]).decode()
        assert document.text_offset == offset
        assert text[offset:].startswith(spelling)
        offset += len(spelling)
    assert offset == len(text)
    assert all(document.logprobs is document.text_offset is None for document in (last, *plain))


def test_the_first_and_the_last_document_tell_what_the_prompt_cost(start: Any) -> None:
    from helpers.prefill import BLOCK

    executor = start()
    request = prompt("one two three " * 20)
    for cached in (0, BLOCK):
        first, *others, last = received(executor.task(request))
        assert first.cached_tokens == last.cached_tokens == last.prompt_tokens // BLOCK * cached
        assert first.queue_seconds == last.queue_seconds > 0
        assert {(document.cached_tokens, document.queue_seconds) for document in others} == {(None, None)}


def test_a_stop_string_may_be_a_token_that_is_not_shown(executor: Any, say: Any) -> None:
    say(["▁By", "e", ".", "<s>", "user"])
    assert text_of(received(executor.chat(dialog()))) == "Bye.user"
    request = ChatRequest(messages=DIALOG, max_tokens=10, stop=["<s>user"])
    *_, last = stopped = received(executor.chat(request))
    assert (text_of(stopped), last.finish_reason, last.completion_tokens) == ("Bye.", "stop", 5)
    request = ChatRequest(messages=DIALOG, max_tokens=10, stop=["<s>"])
    *_, last = stopped = received(executor.chat(request))
    assert (text_of(stopped), last.finish_reason, last.completion_tokens) == ("Bye.", "stop", 4)


def test_a_continuation_begins_with_the_space_of_its_first_word_and_an_answer_does_not(executor: Any, say: Any) -> None:
    say(["▁there", "▁was"])
    assert text_of(received(executor.task(prompt("Once upon a time")))) == " there was"
    assert text_of(received(executor.chat(dialog()))) == "there was"
    say(["▁▁", "▁there"])
    assert text_of(received(executor.chat(dialog()))) == "there"


def test_an_emoji_arrives_before_the_next_one_is_complete(executor: Any, say: Any) -> None:
    say([f"<0x{byte:02X}>" for byte in "🦙🎉".encode()[:-1]])
    documents = received(executor.chat(dialog()))
    assert [document.generated_text for document in documents] == ["", "", "", "🦙", "", "", "", "�"]


def test_a_part_of_a_character_has_log_probabilities_too(executor: Any, say: Any) -> None:
    say([f"<0x{byte:02X}>" for byte in "🦙".encode()] + ["▁a"])
    *documents, _ = received(executor.chat(ChatRequest(messages=DIALOG, max_tokens=10, logprobs=0)))
    assert [document.logprob_tokens for document in documents] == [["f0"], ["9f"], ["a6"], ["99"], [b" a".hex()]]
    assert [document.text_offset for document in documents] == [0, 0, 0, 0, 1]
    assert [document.logprobs for document in documents] == [[-0.5]] * 5


def test_a_dialog_is_answered_and_counted_in_the_models_own_format(executor: Any, tiny: Any) -> None:
    (counted,) = received(executor.count(dialog()))
    *_, last = received(executor.chat(dialog()))
    assert counted.prompt_tokens == last.prompt_tokens == prompts.count_tokens(DIALOG, tiny.tokenizer)
    assert (counted.context_length, counted.error) == (512, None)


def test_a_dialog_that_exceeds_the_context_loses_its_oldest_turns(executor: Any) -> None:
    turns = [
        message
        for _ in range(20)
        for message in ({"role": "assistant", "content": "word " * 20}, {"role": "user", "content": "And then?"})
    ]
    first, *_, last = received(executor.chat(dialog(*turns)))
    assert first.dropped_turns == last.dropped_turns > 5
    assert last.finish_reason == "length"


def test_info_describes_the_model_and_its_load(executor: Any) -> None:
    (before,) = received(executor.info(prompt()))
    received(executor.task(prompt()))
    (after,) = received(executor.info(prompt()))
    assert (after.precision, after.device, after.context_length) == ("fp32", "cpu", 512)
    assert (after.steps - before.steps, after.running, after.waiting) == (10, 0, 0)


def test_a_client_that_disconnects_cancels_its_answer(start: Any, endless_folder: Path) -> None:
    executor = start(str(endless_folder))

    async def disconnect() -> None:
        async with aclosing(executor.task(prompt(max_tokens=ENDLESS))) as documents:
            async for _ in documents:
                break
        before = executor.engine.steps
        while executor.engine.running:
            await asyncio.sleep(0)
        assert executor.engine.steps <= before + 1

    asyncio.run(disconnect())


def test_a_service_that_stops_says_so_to_its_clients(start: Any, endless_folder: Path) -> None:
    executor = start(str(endless_folder))

    async def read() -> list[Any]:
        documents = []
        async for document in executor.task(prompt(max_tokens=ENDLESS)):
            if not documents:
                executor.engine.close()
            documents.append(document)
        return documents

    *_, last = asyncio.run(read())
    assert last.finish_reason == "error"
    assert last.error.startswith("ServiceUnavailable: The service was stopped before the answer was complete.")


def test_a_failing_model_ends_the_stream_with_an_error(executor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor.chat_model.model, "logits", lambda *_: 1 / 0)
    (last,) = received(executor.task(prompt()))
    assert last.finish_reason == "error"
    assert last.error.startswith("GenerationFailed: The model failed after 0 tokens (ZeroDivisionError")


# --- Refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("document", "error"),
    [
        (prompt(max_tokens=0), "max_tokens is 0. Ask for at least 1 token."),
        (prompt(temperature=3.0), "temperature is 3.0. "),
        (prompt(logprobs=21), "logprobs is 21. "),
        (prompt(max_tokens=512), "more than the 512 tokens of the context window"),
        (prompt("x" * 10**6), "1,000,000 characters, far more than the 512 tokens of the context window can hold"),
        (dialog({"role": "user", "content": "x" * 10**6}), "1,000,000 characters, far more than"),
        (dialog({"role": "assistant", "content": "I end the dialog."}), "assistant"),
    ],
    ids=["max_tokens", "temperature", "logprobs", "context window", "long prompt", "long question", "no question"],
)
def test_a_request_that_cannot_be_answered_is_refused(executor: Any, document: Any, error: str) -> None:
    endpoint, steps = executor.chat if isinstance(document, ChatRequest) else executor.task, executor.engine.steps
    (last,) = received(endpoint(document))
    assert last.finish_reason == "error"
    assert last.error.startswith("InvalidRequest: ")
    assert error in last.error
    assert executor.engine.steps == steps


def test_a_document_with_other_fields_is_refused(executor: Any) -> None:
    other = ModelOutputDocument(token_id=1, generated_text="")
    for endpoint, document in ((executor.task, PromptRequest), (executor.chat, ChatRequest)):
        (last,) = received(endpoint(document.from_protobuf(other.to_protobuf())))
        assert last.error.startswith("InvalidRequest: The request cannot be read: max_tokens: Field required")
    (counted,) = received(executor.count(ChatRequest.from_protobuf(other.to_protobuf())))
    assert counted.error.startswith("InvalidRequest: The request cannot be read")


def test_what_is_not_text_is_refused_by_its_name(executor: Any) -> None:
    class AnyMessages(SamplingDocument):
        messages: list[dict[str, Any]]

    image = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
    sent = AnyMessages(max_tokens=3, messages=[image]).to_protobuf()
    (last,) = received(executor.chat(ChatRequest.from_protobuf(sent)))
    assert last.error.startswith("InvalidRequest: Part 1 of Message 1 (user) is of type 'image_url', and only text")


def test_a_question_about_tags_and_special_tokens_is_answered_and_counted(executor: Any, tiny: Any) -> None:
    asked = ChatRequest(messages=[{"role": "user", "content": "What do [INST] and <s> mean?"}], max_tokens=3)
    *_, last = received(executor.chat(asked))
    (counted,) = received(executor.count(asked))
    assert (last.error, last.prompt_tokens) == (None, counted.prompt_tokens)


def test_any_other_endpoint_is_refused(executor: Any) -> None:
    (last,) = received(executor.unknown(prompt()))
    assert last.error == "InvalidRequest: This service has no such endpoint. Use /stream, /chat, /count or /info."


def test_a_full_queue_refuses_before_any_tokenizing(
    start: Any, endless_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = start(str(endless_folder), max_num_seqs=1, max_queue_size=0)
    executor.engine.submit([1] * 10, prompt(max_tokens=ENDLESS).sampling_params())
    monkeypatch.setattr("helpers.prompts.token_ids", lambda *_: pytest.fail("tokenized"))
    monkeypatch.setattr("helpers.prompts.fit_to_window", lambda *_, **__: pytest.fail("tokenized"))
    monkeypatch.setattr("helpers.prompts.count_tokens", lambda *_: pytest.fail("tokenized"))
    for endpoint, document in (
        (executor.task, prompt()),
        (executor.chat, dialog()),
        (executor.count, dialog()),
    ):
        (last,) = received(endpoint(document))
        assert last.error.startswith("QueueFull: The queue is full: ")


def test_an_endpoint_of_a_subclass_may_take_the_articles_own_document(executor: Any) -> None:
    documents = received(executor.task(PromptDocument(prompt="Hello", max_tokens=5)))
    assert documents[-1].finish_reason == "length"


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"max_num_seqs": 0}, InvalidRequest, "InvalidRequest: max_num_seqs is 0. Choose at least 1."),
        ({"model": "/no/such/folder"}, ModelUnavailable, "ModelUnavailable: "),
    ],
)
def test_what_cannot_start_prints_the_reason(
    start: Any, capsys: pytest.CaptureFixture[str], options: dict[str, Any], error: type, sentence: str
) -> None:
    with pytest.raises(error):
        start(**options)
    assert capsys.readouterr().err.splitlines()[-1].startswith(sentence)
