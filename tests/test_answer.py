"""An answer, read from documents that the test writes: no service, no gRPC."""

from __future__ import annotations

import asyncio
import copy
import pickle
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any

import pytest

from helpers.answer import FINISH_REASONS, Answer
from helpers.errors import GenerationFailed, InvalidRequest, ServiceUnavailable
from scripted_service import failed, last, tokens


class FakeCall:
    """A stand-in for a `Call`: it has documents, which may end in an exception."""

    def __init__(self, documents: Iterable[Any]) -> None:
        self._documents = documents
        self.is_open = False
        self.is_cancelled = False

    def documents(self) -> Iterator[Any]:
        self.is_open = True
        try:
            yield from self._documents
        finally:
            self.is_open = False

    async def documents_async(self) -> AsyncIterator[Any]:
        for document in self.documents():
            yield document

    def cancel(self) -> None:
        self.is_cancelled = True


def answer_of(*documents: Any, **callbacks: Any) -> Answer:
    return Answer(FakeCall(documents), **callbacks)


def read_async(answer: Answer) -> list[str]:
    async def read() -> list[str]:
        return [piece async for piece in answer]

    return asyncio.run(read())


@pytest.mark.parametrize("read", [list, read_async])
def test_the_pieces_make_up_the_text_and_the_documents_carry_the_usage(read: Any) -> None:
    answer = answer_of(*tokens("Hello", "", " world"), last("stop", dropped_turns=2))
    assert read(answer) == ["Hello", " world"]
    assert answer.text == str(answer) == "Hello world"
    assert (answer.finish_reason, answer.error) == ("stop", None)
    assert (answer.prompt_tokens, answer.completion_tokens, answer.dropped_turns) == (5, 3, 2)
    assert answer.time_to_first_token is not None
    assert 0 < answer.time_to_first_token <= answer.seconds
    assert repr(answer) == "<Answer, stop: 'Hello world'>"


@pytest.mark.parametrize("read", [list, read_async])
def test_an_answer_without_the_last_document_is_a_failure(read: Any) -> None:
    answer = answer_of(*tokens("Hello", " world"))
    with pytest.raises(ServiceUnavailable, match="broke off after 2 tokens"):
        read(answer)
    assert (answer.text, answer.finish_reason) == ("Hello world", "error")
    assert str(answer.error).startswith("ServiceUnavailable: The answer broke off")


@pytest.mark.parametrize("read", [list, read_async])
def test_an_error_of_the_service_is_raised_as_its_class_and_the_text_before_it_stays(read: Any) -> None:
    answer = answer_of(*tokens("Hello"), failed(InvalidRequest("The prompt is empty. Write one.")))
    with pytest.raises(InvalidRequest, match="^The prompt is empty"):
        read(answer)
    assert (answer.text, answer.finish_reason) == ("Hello", "error")
    assert answer.error == "InvalidRequest: The prompt is empty. Write one."


def test_an_answer_is_read_once() -> None:
    answer = answer_of(*tokens("Hello"), last("stop"))
    list(answer)
    for read in (list, read_async):
        with pytest.raises(RuntimeError, match="has been read already"):
            read(answer)
    assert answer.text == "Hello"


def test_leaving_the_loop_cancels_the_request_and_keeps_the_text() -> None:
    call = FakeCall([*tokens("Hello", " world"), last("stop")])
    answer = Answer(call)  # type: ignore[arg-type]
    for _ in answer:
        assert call.is_open
        break
    assert not call.is_open
    assert (answer.text, answer.finish_reason) == ("Hello", "cancelled")


@pytest.mark.parametrize("read", [list, read_async])
def test_a_stopped_answer_never_grows_and_raises_nothing(read: Any) -> None:
    answer: Any = None

    def documents() -> Iterator[Any]:
        yield from tokens("Hello")
        answer.stop()
        yield from tokens(" world")
        raise ServiceUnavailable("The connection was closed.")  # as a cancelled call does

    call = FakeCall(documents())
    answer = Answer(call)  # type: ignore[arg-type]
    assert read(answer) == ["Hello"]
    assert call.is_cancelled
    assert (answer.text, answer.finish_reason, answer.error) == ("Hello", "cancelled", None)


@pytest.mark.parametrize("read", [list, read_async])
def test_a_stopped_answer_ends_even_if_the_documents_go_on(read: Any) -> None:
    answer: Any = None
    taken = []

    def documents() -> Iterator[Any]:
        for number in range(5):
            taken.append(number)
            yield from tokens(str(number))
            answer.stop()

    answer = Answer(FakeCall(documents()))  # type: ignore[arg-type]
    assert read(answer) == ["0"]
    assert taken == [0, 1]


def test_stopping_an_answer_that_has_ended_changes_nothing() -> None:
    answer = answer_of(*tokens("Hello"), last("length"))
    list(answer)
    answer.stop()
    assert answer.finish_reason == "length"


def test_the_request_is_freed_when_the_answer_has_ended() -> None:
    """Each request contains the whole dialog, so a conversation of n turns would keep n of them."""
    import gc
    import weakref

    call = FakeCall([last("stop")])
    freed = weakref.ref(call)
    answer = Answer(call)  # type: ignore[arg-type]
    del call
    list(answer)
    gc.collect()
    assert freed() is None
    assert answer.finish_reason == "stop"


@pytest.mark.parametrize(
    ("documents", "finish_reason"),
    [([last("stop")], "stop"), ([], "error"), ([*tokens("Hello", "again"), last("stop")], "cancelled")],
    ids=["complete", "broken off", "left"],
)
def test_on_end_is_called_with_the_final_finish_reason(documents: list[Any], finish_reason: str) -> None:
    ends = []
    answer = answer_of(*documents, on_end=lambda answer: ends.append(answer.finish_reason))
    try:
        for _ in answer:
            break
    except ServiceUnavailable:
        pass
    assert ends == [finish_reason]


def test_on_start_can_refuse_before_anything_is_sent() -> None:
    def refuse(_: Answer) -> None:
        raise RuntimeError("Not now.")

    ends: list[Answer] = []
    call = FakeCall([last("stop")])
    answer = Answer(call, on_start=refuse, on_end=ends.append)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="Not now"):
        list(answer)
    assert ends == []
    assert answer.finish_reason is None


@pytest.mark.parametrize(
    ("finish_reason", "words"),
    [
        ("stop", ""),
        ("length", ", cut off at max_tokens"),
        ("cancelled", ", stopped"),
        ("error", ", failed"),
    ],
)
def test_the_summary_tells_the_length_the_speed_and_an_early_end(finish_reason: str, words: str) -> None:
    answer = Answer.ended("Hello", finish_reason)
    answer.completion_tokens, answer.time_to_first_token, answer.seconds = 11, 0.5, 2.5
    assert answer.tokens_per_second == 5
    assert answer.summary == f"11 tokens, first after 0.50 s, 5.0 tokens/s{words}"


@pytest.mark.parametrize(("dropped_turns", "words"), [(1, "turn"), (3, "3 turns")])
def test_the_summary_tells_which_turns_the_model_did_not_see(dropped_turns: int, words: str) -> None:
    answer = Answer.ended("Hello")
    answer.dropped_turns = dropped_turns
    assert answer.summary == f"without the oldest {words}, which did not fit the context window"


def test_there_is_no_speed_before_the_second_token() -> None:
    answer = answer_of(*tokens("Hello"), last("stop"))
    assert answer.tokens_per_second is None
    list(answer)
    assert answer.tokens_per_second is None
    assert answer.summary.startswith("1 tokens, first after 0.")


def test_an_answer_from_a_file_has_ended_and_asks_nothing() -> None:
    answer = Answer.ended("Hello", "error", "ServiceUnavailable: gone")
    assert (answer.text, answer.finish_reason, answer.error) == ("Hello", "error", "ServiceUnavailable: gone")
    with pytest.raises(RuntimeError):
        list(answer)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda answer: pickle.loads(pickle.dumps(answer))])
def test_an_answer_that_has_ended_can_be_copied_and_pickled(copied: Any) -> None:
    answer = answer_of(*tokens("Hello", " world"), last("length", dropped_turns=1), on_end=lambda _: None)
    list(answer)
    other = copied(answer)
    assert other is not answer
    assert (str(other), repr(other), other.summary) == (str(answer), repr(answer), answer.summary)
    assert (other.prompt_tokens, other.error) == (5, None)
    other.stop()
    with pytest.raises(RuntimeError, match="has been read already"):
        list(other)
    assert copied(other).finish_reason == "length"


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_an_answer_that_has_not_ended_cannot_be_copied(copied: Any) -> None:
    answer = answer_of(*tokens("Hello", " world"), last("stop"))
    with pytest.raises(TypeError, match="has not ended cannot be copied. Read it"):
        copied(answer)
    for _ in answer:
        with pytest.raises(TypeError, match="has not ended cannot be copied. Read it"):
            copied(answer)
        answer.stop()
        copied(answer)
    assert answer.finish_reason == "cancelled"


def test_every_finish_reason_of_the_wire_has_words() -> None:
    assert set(FINISH_REASONS) == {"stop", "length", "cancelled", "error"}


def test_a_failure_of_the_transport_is_the_answers_error() -> None:
    def documents() -> Iterator[Any]:
        yield from tokens("Hello")
        raise GenerationFailed("out of memory")

    answer = Answer(FakeCall(documents()))  # type: ignore[arg-type]
    with pytest.raises(GenerationFailed):
        list(answer)
    assert (answer.text, answer.error) == ("Hello", "GenerationFailed: out of memory")
