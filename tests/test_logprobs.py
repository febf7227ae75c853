"""Log-probabilities as a client reads them: exact bytes, and only those of the tokens that are in the text."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

import helpers
from helpers.logprobs import Logprob, TokenLogprobs, from_fields, to_fields
from helpers.schemas import ModelOutputDocument
from scripted_service import ScriptedService, last

LOGPROB = st.builds(Logprob, st.integers(0, 2**31 - 1), st.binary(max_size=8), st.floats(max_value=0))


def document(piece: str, offset: int, token: bytes) -> ModelOutputDocument:
    """Return the document of a token with one alternative."""
    ranked = [Logprob(7, token, -0.5), Logprob(8, b" other", -1.5)]
    return ModelOutputDocument(token_id=7, generated_text=piece, **to_fields(ranked, offset))


def answer_of(scripted: ScriptedService, *documents: ModelOutputDocument) -> helpers.Answer:
    scripted.script = lambda _: iter(documents)
    return helpers.stream("Hello", logprobs=1, port=scripted.port)


@given(ranked=st.lists(LOGPROB, min_size=1, max_size=21), offset=st.integers(0, 2**31 - 1))
def test_what_the_service_writes_the_client_reads(ranked: list[Logprob], offset: int) -> None:
    fields = to_fields(ranked, offset)
    token, *top = ranked
    expected = TokenLogprobs(token.token_id, token.utf8, token.logprob, tuple(top), offset)
    assert from_fields(ModelOutputDocument(token_id=token.token_id, generated_text="", **fields)) == expected


def test_a_token_without_log_probabilities_has_none() -> None:
    assert from_fields(ModelOutputDocument(token_id=1, generated_text="a")) is None


def test_bytes_that_are_no_character_are_spelled_out() -> None:
    assert [Logprob(1, token, 0.0).text for token in ("🦙".encode(), b"\xf0\x9f", b"a\xff")] == [
        "🦙",
        r"\xf0\x9f",
        r"a\xff",
    ]


def test_each_token_of_the_text_has_its_log_probabilities(scripted: ScriptedService) -> None:
    answer = answer_of(scripted, document("One", 0, b" One"), document(" two", 3, b" two"), last("stop"))
    lengths = [(piece, len(answer.logprobs)) for piece in answer]
    assert lengths == [("One", 1), (" two", 2)]
    first, second = answer.logprobs
    assert (first.text, first.logprob, first.text_offset) == (" One", -0.5, 0)
    assert second.top == (Logprob(8, b" other", -1.5),)
    assert pickle.loads(pickle.dumps(answer)).logprobs == answer.logprobs


def test_the_parts_of_a_character_come_with_it(scripted: ScriptedService) -> None:
    documents = [document("", 0, b"\xf0\x9f"), document("", 0, b"\xa6"), document("🦙", 0, b"\x99")]
    answer = answer_of(scripted, *documents, last("stop"))
    assert [(piece, len(answer.logprobs)) for piece in answer] == [("🦙", 3)]
    assert b"".join(token.utf8 for token in answer.logprobs).decode() == answer.text


def test_a_token_that_is_held_back_waits_for_its_text(scripted: ScriptedService) -> None:
    """The text of the second token may begin a stop string, and so may the third one's when the second is certain."""
    documents = [document("a", 0, b"a"), document("", 1, b"-"), document("-", 2, b"-"), document("-b", 3, b"b")]
    answer = answer_of(scripted, *documents, last("length"))
    assert [(piece, len(answer.logprobs)) for piece in answer] == [("a", 1), ("-", 2), ("-b", 4)]


def test_a_token_that_a_stop_string_cuts_off_has_none(scripted: ScriptedService) -> None:
    def script(_: Any) -> Iterator[ModelOutputDocument]:
        yield document("One", 0, b"One")
        yield document(" two", 3, b" two-")  # the first of its characters is in the text
        yield document("", 8, b"-")
        yield last("stop")

    scripted.script = script
    answer = helpers.ask("Hello", logprobs=1, port=scripted.port)
    assert answer.text == "One two"
    assert [token.text for token in answer.logprobs] == ["One", " two-"]
