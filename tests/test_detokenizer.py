"""The text of a stream is the tokenizer's own decoding, piece by piece, whatever the ids."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.detokenizer import Detokenizer

TEXTS = [
    "Hello, world!",
    "  two spaces, a\ttab and\n\na blank line  ",
    "naïve café, Ελληνικά, हिन्दी, 日本語, 中文字符, עברית",
    "👩‍👩‍👧‍👦 family, 🏳️‍🌈 flag, 👍🏽 thumb, e\u0301 combining, 𝔘𝔫𝔦",
    "<0x41> is no byte, and ▁ is no space, and � is a character",
]


@pytest.fixture(scope="session")
def byte_level_tokenizer() -> Any:
    """Byte-level BPE, GPT-2's kind, trained here on a little text, with a plain and a special token added."""
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(TEXTS * 3, trainer)
    backend.add_special_tokens([AddedToken("<|im_end|>", special=True)])
    backend.add_tokens([AddedToken("two  words 日", special=False)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.fixture(scope="session", params=["sentencepiece", "byte level", "embedded model"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    if request.param == "sentencepiece":
        return request.getfixturevalue("llama2_tokenizer")
    if request.param == "byte level":
        return request.getfixturevalue("byte_level_tokenizer")
    return request.getfixturevalue("embedded").tokenizer


def whole(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def pieces(tokenizer: Any, ids: list[int], **options: Any) -> list[str]:
    text = Detokenizer(tokenizer, **options)
    return [*map(text.push, ids), text.finish()]


def random_ids(tokenizer: Any) -> st.SearchStrategy[list[int]]:
    """Ids of any kind, with bytes and specials, which meet rarely in a large vocabulary, often among them."""
    size = len(tokenizer)
    odd = [i for i in range(size) if (t := tokenizer.convert_ids_to_tokens(i)).startswith("<") or len(t) == 1]
    one = st.integers(0, size - 1) | st.sampled_from(odd)
    encoded = st.text().map(lambda text: tokenizer.encode(text, add_special_tokens=False))
    return st.lists(st.lists(one, max_size=8) | encoded, max_size=4).map(lambda parts: sum(parts, []))


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_joined_pieces_are_the_decoding_of_the_whole(tokenizer: Any, data: st.DataObject) -> None:
    ids = data.draw(random_ids(tokenizer))
    assert "".join(pieces(tokenizer, ids)) == whole(tokenizer, ids)


@pytest.mark.parametrize("text", TEXTS)
def test_every_text_comes_back_and_no_piece_breaks_a_character(tokenizer: Any, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    parts = pieces(tokenizer, ids)
    assert "".join(parts) == whole(tokenizer, ids)
    assert "".join(parts).count("�") == text.count("�")


def test_text_comes_with_its_token_and_not_later(tokenizer: Any) -> None:
    ids = tokenizer.encode("The cat sat on the mat", add_special_tokens=False)
    text, so_far = Detokenizer(tokenizer), ""
    for n, token_id in enumerate(ids, start=1):
        so_far += text.push(token_id)
        assert so_far == whole(tokenizer, ids[:n])


def test_an_emoji_comes_whole_as_soon_as_its_last_byte_is_there(byte_level_tokenizer: Any) -> None:
    ids = [i for byte in "🦙".encode() for i in byte_level_tokenizer.convert_tokens_to_ids(_character(byte))]
    assert len(ids) == 4
    assert pieces(byte_level_tokenizer, ids) == ["", "", "", "🦙", ""]


def _character(byte: int) -> list[str]:
    from helpers.detokenizer import _gpt2_bytes

    return [character for character, value in _gpt2_bytes().items() if value == byte]


def test_a_cut_off_character_becomes_a_replacement_character_at_the_end(tokenizer: Any) -> None:
    if tokenizer.convert_tokens_to_ids("<0xF0>") not in (None, tokenizer.unk_token_id):
        ids = [tokenizer.convert_tokens_to_ids("<0xF0>")]
    else:
        ids = tokenizer.convert_tokens_to_ids(_character(0xF0))
    assert pieces(tokenizer, ids) == ["", "�"]


@settings(max_examples=300, deadline=None)
@given(
    text=st.text(alphabet="ab ", max_size=30),
    stop=st.lists(st.text(alphabet="ab ", min_size=1, max_size=4), max_size=3),
)
def test_a_stop_string_ends_the_text_before_its_first_letter(
    byte_level_tokenizer: Any, text: str, stop: list[str]
) -> None:
    ids = byte_level_tokenizer.encode(text, add_special_tokens=False)
    detokenizer = Detokenizer(byte_level_tokenizer, stop=stop)
    so_far = ""
    for token_id in ids:
        so_far += detokenizer.push(token_id)
        assert not any(s in so_far for s in stop)
    so_far += detokenizer.finish()
    # letter by letter: the stop string that is complete first, and of several the longest
    first = min(((at + len(s), at) for s in stop if (at := text.find(s)) >= 0), default=None)
    assert so_far == (text if first is None else text[: first[1]])
    assert detokenizer.stopped == any(s in text for s in stop)


def test_a_tokenizer_of_another_family_is_decoded_by_itself() -> None:
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = {"[UNK]": 0, "stream": 1, "##ing": 2, "text": 3}
    backend = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    assert "".join(pieces(tokenizer, [1, 2, 3])) == whole(tokenizer, [1, 2, 3]) == "streaming text"


def test_work_per_token_does_not_grow(byte_level_tokenizer: Any) -> None:
    """The state that a token is added to stays small, however many tokens came before."""
    text = Detokenizer(byte_level_tokenizer, stop=["never"])
    for token_id in byte_level_tokenizer.encode("a long answer, ") * 1000:
        text.push(token_id)
        assert len(text._held) < len("never")
        assert len(text._text._utf8.getstate()[0]) < 4
