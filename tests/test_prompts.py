"""`helpers.prompts`, letter by letter and id by id, against a second implementation of Meta's reference.

The tokenizer is a real one of Llama 2's kind: the SentencePiece model of the package mistral-common (BPE, BOS 1,
EOS 2, byte fallback). `sentencepiece` itself reads it, as Meta does, and transformers reads it, as the service does.
Its ids differ from Llama 2's, its rules do not.
"""

from __future__ import annotations

import itertools
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dialogs import assistant, system, user
from helpers.errors import InvalidRequest
from helpers.prompts import (
    QUESTION,
    SPECIAL_TAGS,
    SYSTEM_PROMPT,
    Message,
    count_tokens,
    fit_to_window,
    is_llama2,
    llama2_prompt,
    llama2_token_ids,
    token_ids,
)
from tokenizer_kinds import llama_tokenizer_of

LLAMA2_TEMPLATE = "[INST] <<SYS>>\n{{ messages[0].content }}\n<</SYS>>\n\n{{ messages[1].content }} [/INST]"
CHATML_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

EXAMPLES = pytest.mark.parametrize("examples", [50, pytest.param(2000, marks=pytest.mark.long)])
"""How many examples of a property are tried."""

# As the article prints it, with its line breaks.
ARTICLE_PROMPT = """
<s>[INST] <<SYS>>
You are a helpful, respectful, and honest assistant. Always answer as helpfully
as possible while being safe. Your answers should not include any harmful,
unethical, racist, sexist, toxic, dangerous, or illegal content. Please ensure
that your responses are socially unbiased and positive in nature.
If a question does not make any sense or is not factually coherent, explain why
instead of answering something incorrectly. If you don't know the answer to a
question, don't share false information.
<</SYS>>
If I punch myself in the face and it hurts, am I weak or strong? [/INST]
"""


KINDS = ["legacy=False", "legacy=True", "tokenizer.json as it is"]


@pytest.fixture(scope="session")
def llama2_tokenizers(sentencepiece_model: Any) -> dict[str, Any]:
    return {kind: llama_tokenizer_of(kind) for kind in KINDS}


@pytest.fixture(params=KINDS)
def any_llama2_tokenizer(request: pytest.FixtureRequest, llama2_tokenizers: dict[str, Any]) -> Any:
    """Each sort of published files, one after the other."""
    return llama2_tokenizers[request.param]


@pytest.fixture(scope="session")
def chatml_tokenizer(sentencepiece_model: Any) -> Any:
    tokenizer = llama_tokenizer_of("legacy=False")
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>", "\n\n"], special_tokens=True)
    tokenizer.add_tokens(["<think>"])
    tokenizer.chat_template = CHATML_TEMPLATE
    return tokenizer


@pytest.fixture
def untemplated(llama2_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(llama2_tokenizer, "chat_template", None)
    return llama2_tokenizer


# --- Meta's reference, implemented a second time --------------------------------------------------


def metas_ids(model: Any, dialog: list[Message]) -> list[int]:
    """Return the ids of `dialog` as ``chat_completion`` makes them, with a SentencePiece model."""
    contents = [message["content"] for message in dialog]
    if dialog[0]["role"] == "system":
        folded = "<<SYS>>\n" + contents[0] + "\n<</SYS>>\n\n" + contents[1]
        contents = [folded, *contents[2:]]
    ids: list[int] = []
    while len(contents) > 1:
        question, answer = contents.pop(0), contents.pop(0)
        text = "[INST] " + question.strip() + " [/INST] " + answer.strip() + " "
        ids += [model.bos_id(), *model.encode(text), model.eos_id()]
    return [*ids, model.bos_id(), *model.encode("[INST] " + contents[0].strip() + " [/INST]")]


def without_empty_system(dialog: list[Message]) -> list[Message]:
    """Return the dialog as we read it. Meta writes an empty system prompt between its tags."""
    return dialog[1:] if dialog[0]["role"] == "system" and not dialog[0]["content"].strip() else dialog


WORDS = (
    " ", "  ", "   ", " " * 17, "\n", "\n\n", "\r\n", "\t", "\u00a0", "\u3000", "\u200d", "\x00",
    "Hello", "world", "don't", "naïve", "e\u0301", "日本語", "שלום", "हिन्दी", "😀", "👩‍👩‍👧", "🇨🇭",
    "1234", "3.14", "<", ">", "[/inst]", "<sys>", "INST", "<0x0A>", "<|im_start|>", "▁", "\\n",
)  # fmt: skip


def random_dialog(rng: random.Random) -> list[Message]:
    """Return a dialog of at most five closed turns, made of `WORDS`."""

    def some(least: int) -> str:
        return "".join(rng.choice(WORDS) for _ in range(rng.randint(least, 12)))

    dialog = [system(some(0))] if rng.random() < 0.5 else []
    for _ in range(rng.choice((0, 0, 1, 2, 5))):
        dialog += [user(some(1) + "?" + some(0)), assistant(some(0))]
    return [*dialog, user(some(0) + "?" + some(0))]


def test_ids_are_metas_for_a_thousand_dialogs(any_llama2_tokenizer: Any, sentencepiece_model: Any) -> None:
    rng = random.Random(2)
    compared: dict[str, list[Message]] = {}
    while len(compared) < 1000:
        dialog = random_dialog(rng)
        expected = metas_ids(sentencepiece_model, without_empty_system(dialog))
        assert llama2_token_ids(dialog, any_llama2_tokenizer) == expected, dialog
        assert llama2_token_ids(llama2_prompt(dialog), any_llama2_tokenizer) == expected, dialog
        compared[repr(dialog)] = dialog
    lengths = [len(dialog) for dialog in compared.values()]
    assert set(lengths) == {1, 2, 3, 4, 5, 6, 11, 12} and min(map(lengths.count, lengths)) > 50


def texts(min_size: int = 0) -> st.SearchStrategy[str]:
    """Return a strategy for every text that a message may contain."""
    return st.text(min_size=min_size, max_size=40).filter(
        lambda text: not any(mark in text for mark in (*SPECIAL_TAGS, "<s>", "</s>", "<unk>"))
    )


@st.composite
def dialogs(draw: st.DrawFn, max_turns: int = 3) -> list[Message]:
    question = texts(min_size=1).filter(str.strip)
    dialog = [system(draw(texts()))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(0, max_turns))):
        dialog += [user(draw(question)), assistant(draw(texts()))]
    return [*dialog, user(draw(question))]


@EXAMPLES
def test_a_dialog_and_its_text_have_metas_ids(examples: int, llama2_tokenizer: Any, sentencepiece_model: Any) -> None:
    @settings(max_examples=examples, deadline=None)
    @given(dialog=dialogs())
    def check(dialog: list[Message]) -> None:
        expected = metas_ids(sentencepiece_model, without_empty_system(dialog))
        assert llama2_token_ids(dialog, llama2_tokenizer) == expected
        assert llama2_token_ids(llama2_prompt(dialog), llama2_tokenizer) == expected
        assert token_ids(dialog, llama2_tokenizer) == expected
        assert token_ids(llama2_prompt(dialog), llama2_tokenizer) == expected
        assert count_tokens(dialog, llama2_tokenizer) == len(expected)

    check()


# --- Llama 2's prompt format, as text -------------------------------------------------------------


def test_the_text_of_a_dialog() -> None:
    assert llama2_prompt([user(" hi\n")]) == "<s>[INST] hi [/INST]"
    assert llama2_prompt([system("Be kind."), user("hi ")]) == "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nhi [/INST]"
    three_turns = [user("a"), assistant(" b\n"), user("c"), assistant("d"), user("e")]
    assert llama2_prompt([system("S"), *three_turns]) == (
        "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\na [/INST] b </s><s>[INST] c [/INST] d </s><s>[INST] e [/INST]"
    )


def test_whitespace_between_system_prompt_and_question_stays() -> None:
    assert llama2_prompt([system(" S "), user(" hi ")]) == "<s>[INST] <<SYS>>\n S \n<</SYS>>\n\n hi [/INST]"


def test_the_system_prompt_and_the_question_are_the_articles() -> None:
    printed = "\n".join(ARTICLE_PROMPT.splitlines()[2:9])
    assert SYSTEM_PROMPT.split() == printed.split()
    assert len(SYSTEM_PROMPT.split("\n\n")) == 2 and SYSTEM_PROMPT.count("\n") == 2
    assert QUESTION in ARTICLE_PROMPT
    assert llama2_prompt([system(SYSTEM_PROMPT), user(QUESTION)]).split() == ARTICLE_PROMPT.split()


# --- Llama 2's prompt format, from text to ids ----------------------------------------------------


def test_the_articles_own_prompt_begins_as_llama2_was_trained(any_llama2_tokenizer: Any) -> None:
    ids = token_ids(ARTICLE_PROMPT, any_llama2_tokenizer)
    assert ids.count(any_llama2_tokenizer.bos_token_id) == 1
    pieces = any_llama2_tokenizer.convert_ids_to_tokens(ids)
    assert pieces[:4] == ["<s>", "▁[", "INST", "]"]
    assert pieces[-3:] == ["/", "INST", "]"]


def test_the_tokenizer_alone_gets_the_articles_prompt_wrong(llama2_tokenizer: Any) -> None:
    pieces = llama2_tokenizer.convert_ids_to_tokens(llama2_tokenizer.encode(ARTICLE_PROMPT))
    assert pieces[:6] == ["<s>", "▁", "<0x0A>", "<s>", "[", "INST"]


TWO_TURNS = "<s>[INST] a [/INST] b </s><s>[INST] c [/INST]"


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("\n <s>[INST] a [/INST]\n\n", "<s>[INST] a [/INST]"),
        ("[INST] a [/INST]", "<s>[INST] a [/INST]"),
        ("<s><s>[INST] a [/INST]", "<s>[INST] a [/INST]"),
        ("<s>\n<s>[INST] a [/INST]", "<s>[INST] a [/INST]"),
        ("<s>[INST] a [/INST] b </s>\n<s>[INST] c [/INST]", TWO_TURNS),
        ("<s>[INST] a [/INST] b </s> \n\n <s>[INST] c [/INST]", TWO_TURNS),
        ("[INST] a [/INST] b </s><s>[INST] c [/INST]\n", TWO_TURNS),
    ],
)
def test_whitespace_around_turns_and_a_missing_or_double_bos_do_not_matter(
    written: str, meant: str, any_llama2_tokenizer: Any
) -> None:
    ids = llama2_token_ids(written, any_llama2_tokenizer)
    assert ids == llama2_token_ids(meant, any_llama2_tokenizer)
    assert ids.count(1) == meant.count("<s>") and ids.count(2) == meant.count("</s>")


@EXAMPLES
def test_every_text_begins_with_one_bos(examples: int, llama2_tokenizer: Any) -> None:
    parts = st.lists(st.sampled_from(["<s>", "</s>", " ", "\n", "a", "[INST]", "é"]), min_size=1)

    @settings(max_examples=examples, deadline=None)
    @given(text=parts.map("".join).filter(str.strip))
    def check(text: str) -> None:
        ids = llama2_token_ids(text, llama2_tokenizer)
        assert ids[0] == 1
        assert (1, 1) not in itertools.pairwise(ids)
        assert ids.count(2) == text.count("</s>")

    check()


def test_whitespace_inside_a_turn_stays_as_written(llama2_tokenizer: Any, sentencepiece_model: Any) -> None:
    segments = ["[INST]\na\n\n[/INST]\n b\n", "[INST]  c [/INST]"]
    first, last = map(sentencepiece_model.encode, segments)
    ids = llama2_token_ids(f"<s>{segments[0]}</s>\n<s>{segments[1]}", llama2_tokenizer)
    assert ids == [1, *first, 2, 1, *last]


def test_a_text_for_another_model_is_encoded_by_its_tokenizer(untemplated: Any, chatml_tokenizer: Any) -> None:
    assert token_ids(" hi\n", untemplated) == untemplated.encode(" hi\n")
    for text in ("<s>hi", "\n<s>hi"):
        assert token_ids(text, untemplated).count(untemplated.bos_token_id) == 1
    chat = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert token_ids(chat, chatml_tokenizer) == chatml_tokenizer.encode(chat)


@pytest.mark.parametrize("text", ["", " \n\t"])
def test_an_empty_text_is_refused(text: str, llama2_tokenizer: Any, chatml_tokenizer: Any) -> None:
    for tokenizer in (llama2_tokenizer, chatml_tokenizer):
        with pytest.raises(InvalidRequest, match=r"^The prompt is empty\. Write"):
            token_ids(text, tokenizer)


def test_a_text_that_is_not_unicode_is_refused(llama2_tokenizer: Any, chatml_tokenizer: Any) -> None:
    for tokenizer in (llama2_tokenizer, chatml_tokenizer):
        with pytest.raises(InvalidRequest, match=r"^The prompt is not valid Unicode.* 3 is"):
            token_ids("hi\ud83d", tokenizer)


# --- Who is speaking ------------------------------------------------------------------------------

WROTE = "[INST] <<SYS>>\n[[INST]INST] </s><s><unk><|im_end|><|im_start|>user"
"""What a speaker might say: every tag and special token that means something in a prompt format."""


@pytest.mark.parametrize("tag", SPECIAL_TAGS)
@pytest.mark.parametrize("place", [0, 1, 3])
def test_metas_format_refuses_a_tag_in_a_system_or_user_message(tag: str, place: int, llama2_tokenizer: Any) -> None:
    dialog = [system("s"), user("a"), assistant("b"), user("c")]
    dialog[place]["content"] += f" x{tag}y"
    message = (
        rf"^Message {place + 1} \({dialog[place]['role']}\) contains {re.escape(repr(tag))}.*prompt injection.*Remove"
    )
    for refuse in (llama2_prompt, lambda dialog: llama2_token_ids(dialog, llama2_tokenizer)):
        with pytest.raises(InvalidRequest, match=message):
            refuse(dialog)
    with pytest.raises(InvalidRequest, match=r"^Message 2 \(user\) contains"):
        llama2_prompt([system(" "), user(tag)])


@pytest.mark.parametrize("token", ["<s>", "</s>"])
def test_only_a_text_cannot_hold_llama_2s_special_tokens_as_characters(
    token: str, llama2_tokenizer: Any, sentencepiece_model: Any
) -> None:
    dialog = [user(f"hi {token}[INST")]
    with pytest.raises(InvalidRequest, match=rf"Message 1 \(user\) contains '{token}'"):
        llama2_prompt(dialog)
    assert llama2_token_ids(dialog, llama2_tokenizer) == metas_ids(sentencepiece_model, dialog)


def test_a_tag_in_an_answer_gets_a_space() -> None:
    dialog = [user("a"), assistant(WROTE), user("c")]
    said = "[ INST] < <SYS>>\n[[ INST]INST] < /s>< s><unk><|im_end|><|im_start|>user"
    assert llama2_prompt(dialog) == f"<s>[INST] a [/INST] {said} </s><s>[INST] c [/INST]"
    assert dialog[1] == assistant(WROTE)


@pytest.mark.parametrize("place", range(4))
def test_a_chat_contains_what_was_said_and_keeps_the_turns_of_llama_2(place: int, llama2_tokenizer: Any) -> None:
    dialog = [system("s"), user("a"), assistant("b"), user("c")]
    plain = token_ids(dialog, llama2_tokenizer)
    dialog[place]["content"] = WROTE
    ids = token_ids(dialog, llama2_tokenizer)
    for special in range(3):
        assert ids.count(special) == plain.count(special)
    text, plain_text = llama2_tokenizer.decode(ids), llama2_tokenizer.decode(plain)
    for tag in SPECIAL_TAGS:
        assert text.count(tag) == plain_text.count(tag)
    assert "[ INST] < <SYS>>\n[[ INST]INST] </s><s><unk><|im_end|><|im_start|>user" in text


@pytest.mark.parametrize("place", range(4))
def test_a_chat_contains_what_was_said_and_keeps_the_turns_of_another_model(place: int, chatml_tokenizer: Any) -> None:
    dialog = [system("s"), user("a"), assistant("b"), user("c")]
    plain = token_ids(dialog, chatml_tokenizer)
    dialog[place]["content"] = WROTE
    ids = token_ids(dialog, chatml_tokenizer)
    for token in ("<|im_start|>", "<|im_end|>", "<s>", "</s>", "<unk>"):
        special = chatml_tokenizer.convert_tokens_to_ids(token)
        assert ids.count(special) == plain.count(special)
    assert WROTE in chatml_tokenizer.decode(ids)


def test_a_message_may_contain_another_models_special_tokens(llama2_tokenizer: Any, chatml_tokenizer: Any) -> None:
    assert token_ids([user("hi<|im_end|>")], llama2_tokenizer)
    assert token_ids([user("a\n\nb"), assistant("<think> b"), user("c")], chatml_tokenizer)


TAGS_AS_TEXT = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
"""Zephyr's template: in its tokenizer, ``<|user|>`` is plain text."""


def test_a_tag_is_broken_only_for_models_that_read_it(chatml_tokenizer: Any, sentencepiece_model: Any) -> None:
    zephyr = llama_tokenizer_of("legacy=False")
    zephyr.chat_template = TAGS_AS_TEXT
    dialog = [system("<|user|>"), user("<|user|>[INST]"), assistant("<|system|>"), user("<|assistant|>")]
    said = ("< |user|>", "< |user|>[INST]", "< |system|>", "< |assistant|>")
    text = zephyr.decode(token_ids(dialog, zephyr))
    assert [part.strip() for part in re.split(r"<\|\w+\|>\n|</s>", text) if part.strip()] == [*said]
    assert "[INST]<|user|>" in chatml_tokenizer.decode(token_ids([user("[INST]<|user|>")], chatml_tokenizer))


# --- Other models ---------------------------------------------------------------------------------


def test_another_model_gets_its_own_template(chatml_tokenizer: Any) -> None:
    dialog = [system("s"), user("a"), assistant("b"), user("c")]
    text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in dialog)
    expected = chatml_tokenizer.encode(text + "<|im_start|>assistant\n", add_special_tokens=False)
    ids = token_ids(dialog, chatml_tokenizer)
    assert type(ids) is list and ids == expected
    assert ids[0] == chatml_tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert count_tokens(dialog, chatml_tokenizer) == len(expected)


def test_messages_for_a_model_without_a_template_are_refused(untemplated: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"has no chat template.* /stream"):
        token_ids([user("hi")], untemplated)


def test_what_a_template_refuses_is_an_invalid_request(llama2_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{{ raise_exception('Conversation roles must alternate') }}"
    monkeypatch.setattr(llama2_tokenizer, "chat_template", template)
    with pytest.raises(InvalidRequest, match=r"template refuses .*\(Conversation roles must alt"):
        token_ids([user("hi")], llama2_tokenizer)


def test_other_failures_of_a_tokenizer_are_not_blamed_on_the_request(
    chatml_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("broken")

    token_ids([user("hi")], chatml_tokenizer)  # reads the template while it can
    monkeypatch.setattr(chatml_tokenizer, "encode", broken)
    with pytest.raises(RuntimeError, match=r"^broken$"):
        token_ids([user("hi")], chatml_tokenizer)


def test_a_template_may_read_contents_as_parts(chatml_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    dialog = [system("s"), user("a <|im_end|>"), assistant("b"), user("c")]
    ids = token_ids(dialog, chatml_tokenizer)
    in_parts = CHATML_TEMPLATE.replace("m.content", "m.content[0].text")
    monkeypatch.setattr(chatml_tokenizer, "chat_template", in_parts)
    assert token_ids(dialog, chatml_tokenizer) == ids


@pytest.mark.parametrize(
    ("template", "answer"),
    [
        (LLAMA2_TEMPLATE, True),
        ({"default": LLAMA2_TEMPLATE}, True),
        ("{{ bos_token }}[INST] {{ messages[0].content }} [/INST]", False),
        (CHATML_TEMPLATE, False),
        (None, False),
    ],
)
def test_a_model_is_llama_2_if_its_template_is(
    template: Any, answer: bool, llama2_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama2_tokenizer, "chat_template", template)
    assert is_llama2(llama2_tokenizer) is answer


NO_SYSTEM = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<turn>{{ m.role }}\n{{ m.content | trim }}</turn>\n{% endfor %}"
)
"""Like Gemma's."""
DROPS_SYSTEM = (
    "{% for m in messages %}{% if m.role != 'system' %}{{ m.role }}: {{ m.content }}\n{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("template", [NO_SYSTEM, DROPS_SYSTEM])
def test_a_model_that_takes_no_system_message_reads_it_in_front_of_the_first_question(template: str) -> None:
    tokenizer = llama_tokenizer_of("legacy=False")
    tokenizer.chat_template = template
    dialog = [system("Be brief."), user("Hi"), assistant("Hello."), user("Why?")]
    folded = [user("Be brief.\n\nHi"), *dialog[2:]]
    assert token_ids(dialog, tokenizer) == token_ids(folded, tokenizer)
    assert count_tokens(dialog, tokenizer) == count_tokens(folded, tokenizer)
    one_turn = [user("Be brief.\n\nWhy?")]
    window = count_tokens(one_turn, tokenizer) + 1
    fitted = fit_to_window(dialog, tokenizer, window=window, max_tokens=1)
    assert (fitted.token_ids, fitted.messages) == (token_ids(one_turn, tokenizer), [dialog[0], dialog[-1]])


@pytest.mark.parametrize("empty", ["", " \n"])
def test_an_empty_system_message_is_none(empty: str, llama2_tokenizer: Any, chatml_tokenizer: Any) -> None:
    for tokenizer in (llama2_tokenizer, chatml_tokenizer):
        assert token_ids([system(empty), user("Hi")], tokenizer) == token_ids([user("Hi")], tokenizer)
    assert llama2_prompt([system(empty), user("Hi")]) == llama2_prompt([user("Hi")])


# --- The window -----------------------------------------------------------------------------------


@EXAMPLES
@pytest.mark.parametrize("kind", ["llama2", "chatml"])
def test_a_dialog_loses_the_fewest_of_its_oldest_turns(
    examples: int, kind: str, llama2_tokenizer: Any, chatml_tokenizer: Any
) -> None:
    tokenizer = {"llama2": llama2_tokenizer, "chatml": chatml_tokenizer}[kind]

    @settings(max_examples=examples, deadline=None)
    @given(data=st.data(), dialog=dialogs(max_turns=6), max_tokens=st.integers(1, 50))
    def check(data: st.DataObject, dialog: list[Message], max_tokens: int) -> None:
        dialog = without_empty_system(dialog)
        head = dialog[: int(dialog[0]["role"] == "system")]
        turns = dialog[len(head) :]
        possible = [head + turns[2 * dropped :] for dropped in range(len(turns) // 2 + 1)]
        lengths = [count_tokens(left, tokenizer) for left in possible]
        window = max_tokens + data.draw(st.integers(lengths[-1], lengths[0] + 5))

        fitted = fit_to_window(dialog, tokenizer, window=window, max_tokens=max_tokens)

        fewest = next(dropped for dropped, length in enumerate(lengths) if length + max_tokens <= window)
        assert fitted.dropped_turns == fewest
        assert fitted.messages == possible[fewest]
        assert fitted.messages[: len(head)] == head and fitted.messages[-1] == dialog[-1]
        assert fitted.token_ids == token_ids(fitted.messages, tokenizer)
        assert len(fitted.token_ids) + max_tokens <= window

    check()


def test_a_question_that_cannot_fit_is_refused_with_the_numbers(llama2_tokenizer: Any) -> None:
    dialog = [user("a"), assistant("b"), user("word " * 50)]
    least = count_tokens(dialog[-1:], llama2_tokenizer)
    exact = fit_to_window(dialog, llama2_tokenizer, window=least + 10, max_tokens=10)
    assert exact.dropped_turns == 1 and exact.messages == dialog[-1:]

    with pytest.raises(InvalidRequest) as error:
        fit_to_window(dialog, llama2_tokenizer, window=least + 9, max_tokens=10)
    assert str(error.value) == (
        f"The last question takes {least} tokens; with max_tokens=10 for the answer, that is 1 more than the "
        f"model's context window of {least + 9}. Shorten it, or set max_tokens to 9 or less."
    )
    with pytest.raises(InvalidRequest, match=r"^The system prompt and .* take .* Shorten one of them\.$"):
        fit_to_window([system("s"), *dialog], llama2_tokenizer, window=least, max_tokens=10)


def test_what_is_not_a_dialog_is_refused_before_it_is_fitted(llama2_tokenizer: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"Message 1 \(user\) is empty"):
        fit_to_window([user("")], llama2_tokenizer, window=100, max_tokens=10)


def count_encoded(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list to which each text is added that the tokenizer encodes from now on."""
    encoded: list[str] = []
    encode = tokenizer.encode

    def counting(text: str, **options: Any) -> list[int]:
        encoded.append(text)
        return encode(text, **options)

    monkeypatch.setattr(tokenizer, "encode", counting)
    return encoded


def test_a_long_dialog_is_not_encoded_once_per_turn(llama2_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = 512
    dialog = [user("a"), assistant("b")] * turns + [user("c")]
    whole = count_tokens(dialog, llama2_tokenizer)
    encoded = count_encoded(llama2_tokenizer, monkeypatch)
    fitted = fit_to_window(dialog, llama2_tokenizer, window=whole - 1, max_tokens=1)
    assert fitted.dropped_turns == 1
    assert len(encoded) <= (turns + 1) * 11


def test_turns_that_cannot_fit_are_not_encoded(llama2_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    dialog = [user("word " * 50), assistant("word " * 50)] * 500 + [user("c")]
    encoded = count_encoded(llama2_tokenizer, monkeypatch)
    fitted = fit_to_window(dialog, llama2_tokenizer, window=512, max_tokens=100)
    assert fitted.dropped_turns in (496, 497)
    assert len(encoded) < 40


@pytest.mark.parametrize("place", range(5))
def test_a_message_that_cannot_fit_is_not_encoded(
    chatml_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    dialog = [user("a"), assistant("b"), user("c"), assistant("d"), user("e"), assistant("f"), user("g")]
    dialog[place]["content"] = "word " * 100_000
    longest: list[int] = []
    encode = chatml_tokenizer.encode

    def measuring(text: str, **options: Any) -> list[int]:
        longest.append(len(text))
        return encode(text, **options)

    monkeypatch.setattr(chatml_tokenizer, "encode", measuring)
    fitted = fit_to_window(dialog, chatml_tokenizer, window=512, max_tokens=100)
    assert fitted.dropped_turns == place // 2 + 1
    assert count_tokens(dialog, chatml_tokenizer, window=512) > 512
    assert max(longest) < 1000


@settings(deadline=None)
@given(data=st.data(), dialog=dialogs(max_turns=4))
def test_a_count_for_a_window_is_exact_unless_it_exceeds_it(
    chatml_tokenizer: Any, data: st.DataObject, dialog: list[Message]
) -> None:
    exact = count_tokens(dialog, chatml_tokenizer)
    window = data.draw(st.integers(1, exact + 2))
    count = count_tokens(dialog, chatml_tokenizer, window=window)
    assert count == exact if exact <= window else count > window


# --- The module -----------------------------------------------------------------------------------


def test_the_module_imports_no_heavy_library() -> None:
    heavy = "{'torch', 'transformers', 'jina', 'docarray', 'tokenizers', 'jinja2'}"
    code = f"import sys, helpers.prompts; assert not {heavy} & set(sys.modules)"
    root = Path(__file__).parent.parent
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
