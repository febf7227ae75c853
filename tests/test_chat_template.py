"""`helpers.chat_template`: what the templates of the common families write around the contents of messages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from helpers import chat_template
from helpers.errors import InvalidRequest
from helpers.messages import Message, Role
from tokenizer_kinds import llama_tokenizer_of

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ALTERNATION = "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('must alternate') }}{% endif %}"
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    f"{{% for m in messages %}}{ALTERNATION}{{% set role = 'model' if m.role == 'assistant' else m.role %}}"
    "{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
MISTRAL = (
    f"{{{{ bos_token }}}}{{% for m in messages %}}{ALTERNATION}"
    "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
DEEPSEEK_R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
    "{% elif m.role == 'assistant' %}{{ '<｜Assistant｜>' + m.content + '<｜end▁of▁sentence｜>' }}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"
)
GLM4 = (
    "[gMASK]<sop>{% for m in messages %}{{ '<|' + m.role + '|>\n' }}"
    "{% if m.role == 'assistant' %}<think></think>\n{% endif %}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
GPT_OSS = (
    "{% for m in messages %}{{ '<|start|>' + m.role + '<|message|>' + m.content }}"
    "{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
ALPACA = "### Instruction:\n{{ messages[0].content }}\n\n### Response:\n"
ONE_TURN = (
    "{% if messages | length > 1 %}{{ raise_exception('one turn') }}{% endif %}<user>{{ messages[0].content }}</user>"
)
PARTS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role }}{{ ':' if m.content[0].type == 'image' else ': ' }}"
    "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
"""Like SmolVLM's."""
ONLY_PARTS = "{% for m in messages %}{{ m.content[0]['text'] + '\n' }}{% endfor %}"
"""It fails for contents that are texts."""
PARTS_OF_USERS = (
    "{% for m in messages %}{{ m.content[0].text if m.role == 'user' else m.content }}<end_of_utterance>{% endfor %}"
)
BOTH = "{% for m in messages %}{{ m.content if m.content is string else m.content | map(attribute='text') | first }}\n"
BOTH += "{% endfor %}"

NewTokenizer = Callable[..., Any]


@pytest.fixture(scope="session")
def new_tokenizer() -> NewTokenizer:
    """Return a tokenizer of bytes with a chat template, special tokens and plain added tokens."""
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    def new(template: str | None, *special: str, plain: tuple[str, ...] = (), **named: str) -> Any:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        backend = Tokenizer(models.BPE({character: n for n, character in enumerate(alphabet)}, []))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([AddedToken(token, special=True) for token in (*special, *named.values())])
        backend.add_tokens([AddedToken(token, special=False) for token in plain])
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **named)
        tokenizer.chat_template = template
        return tokenizer

    return new


def message(role: Role, content: str) -> Message:
    return {"role": role, "content": content}


def controls(tokenizer: Any) -> set[str]:
    return set(tokenizer.convert_ids_to_tokens(sorted(chat_template.control_token_ids(tokenizer))))


def end_of_turn(tokenizer: Any) -> str | None:
    token_id = chat_template.end_of_turn_id(tokenizer)
    return None if token_id is None else tokenizer.convert_ids_to_tokens(token_id)


def test_smollm2_separates_speakers_with_chatml_and_writes_file_names_as_text(bundled: Any) -> None:
    tokenizer = bundled.tokenizer
    assert controls(tokenizer) == {"<|im_start|>", "<|im_end|>", "<|endoftext|>"}
    assert end_of_turn(tokenizer) == "<|im_end|>"
    assert chat_template.role_tags(tokenizer) == ()
    assert chat_template.takes_system(tokenizer)


@pytest.mark.parametrize("kind", ["legacy=False", "legacy=True", "tokenizer.json as it is"])
@pytest.mark.usefixtures("sentencepiece_model", "torch")
def test_llama_2_separates_speakers_with_tags_that_are_ordinary_text(kind: str) -> None:
    tokenizer = llama_tokenizer_of(kind)
    assert controls(tokenizer) == {"<unk>", "<s>", "</s>"}
    assert end_of_turn(tokenizer) == "</s>"
    assert set(chat_template.role_tags(tokenizer)) == {"[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"}
    assert chat_template.takes_system(tokenizer)


def test_chatml(new_tokenizer: NewTokenizer) -> None:
    tokenizer = new_tokenizer(CHATML, "<|im_start|>", "<|im_end|>", "<file_sep>", eos_token="<|endoftext|>")
    assert controls(tokenizer) == {"<|im_start|>", "<|im_end|>", "<|endoftext|>"}
    assert end_of_turn(tokenizer) == "<|im_end|>"
    assert chat_template.role_tags(tokenizer) == ()
    assert chat_template.takes_system(tokenizer)


def test_chatml_in_ordinary_text(new_tokenizer: NewTokenizer) -> None:
    tokenizer = new_tokenizer(CHATML, eos_token="</s>")
    assert controls(tokenizer) == {"</s>"}
    assert end_of_turn(tokenizer) is None
    assert chat_template.role_tags(tokenizer) == ("<|im_start|>", "<|im_end|>")


def test_the_templates_own_system_prompt_is_text(new_tokenizer: NewTokenizer) -> None:
    template = (
        "<|im_start|>system\n{% if messages[0].role == 'system' %}{{ messages[0].content }}"
        "{% else %}Think in <think> and </think>, answer in <answer>.{% endif %}<|im_end|>\n"
        "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    )
    tokenizer = new_tokenizer(template, "<|im_start|>", "<|im_end|>", plain=("<think>", "</think>"), eos_token="<eos>")
    assert controls(tokenizer) == {"<|im_start|>", "<|im_end|>", "<eos>"}
    assert chat_template.role_tags(tokenizer) == ()


def test_gemma_refuses_a_system_message(new_tokenizer: NewTokenizer) -> None:
    tokenizer = new_tokenizer(GEMMA, "<start_of_turn>", "<end_of_turn>", "<mask>", bos_token="<bos>", eos_token="<eos>")
    assert controls(tokenizer) == {"<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"}
    assert end_of_turn(tokenizer) == "<end_of_turn>"
    assert not chat_template.takes_system(tokenizer)


def test_mistral_refuses_a_system_message_because_roles_must_alternate(new_tokenizer: NewTokenizer) -> None:
    tokenizer = new_tokenizer(MISTRAL, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    assert controls(tokenizer) == {"<s>", "</s>", "<unk>"}
    assert end_of_turn(tokenizer) == "</s>"
    assert chat_template.role_tags(tokenizer) == ("[INST]", "[/INST]")
    assert not chat_template.takes_system(tokenizer)


def test_mistral_with_tags_in_its_vocabulary(new_tokenizer: NewTokenizer) -> None:
    tokenizer = new_tokenizer(MISTRAL, "[INST]", "[/INST]", "[TOOL_CALLS]", bos_token="<s>", eos_token="</s>")
    assert controls(tokenizer) == {"<s>", "</s>", "[INST]", "[/INST]"}
    assert chat_template.role_tags(tokenizer) == ()


def test_zephyr_separates_speakers_with_tags_that_are_ordinary_text(new_tokenizer: NewTokenizer) -> None:
    tokenizer = new_tokenizer(ZEPHYR, bos_token="<s>", eos_token="</s>")
    assert controls(tokenizer) == {"<s>", "</s>"}
    assert end_of_turn(tokenizer) == "</s>"
    assert chat_template.role_tags(tokenizer) == ("<|system|>", "<|user|>", "<|assistant|>")
    assert chat_template.takes_system(tokenizer)


def test_llama_3(new_tokenizer: NewTokenizer) -> None:
    roles = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|reserved_special_token_0|>")
    tokenizer = new_tokenizer(LLAMA3, *roles, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>")
    assert controls(tokenizer) == {*roles, "<|begin_of_text|>", "<|end_of_text|>"}
    assert end_of_turn(tokenizer) == "<|eot_id|>"


def test_tokens_that_are_not_special_separate_speakers_too_but_thoughts_do_not(new_tokenizer: NewTokenizer) -> None:
    plain = ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", "user", "\n\n")
    tokenizer = new_tokenizer(
        DEEPSEEK_R1, plain=plain, bos_token="<｜begin▁of▁sentence｜>", eos_token="<｜end▁of▁sentence｜>"
    )
    assert controls(tokenizer) == {*plain[:2], "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"}
    assert end_of_turn(tokenizer) == "<｜end▁of▁sentence｜>"
    assert chat_template.takes_system(tokenizer)


def test_the_next_speakers_token_ends_a_turn_without_an_end_token(new_tokenizer: NewTokenizer) -> None:
    roles = ("<|system|>", "<|user|>", "<|assistant|>")
    tokenizer = new_tokenizer(GLM4, "[gMASK]", "<sop>", *roles, plain=("<think>", "</think>"))
    assert controls(tokenizer) == {"[gMASK]", "<sop>", *roles}
    assert end_of_turn(tokenizer) == "<|user|>"


def test_the_end_of_the_last_answer_counts_if_it_differs_from_earlier_ones(new_tokenizer: NewTokenizer) -> None:
    tokenizer = new_tokenizer(GPT_OSS, "<|start|>", "<|message|>", "<|end|>", "<|return|>")
    assert end_of_turn(tokenizer) == "<|return|>"
    assert controls(tokenizer) == {"<|start|>", "<|message|>", "<|end|>", "<|return|>"}


def test_a_word_in_the_vocabulary_is_text_though_the_template_writes_it(new_tokenizer: NewTokenizer) -> None:
    tokenizer = new_tokenizer(CHATML, "<|im_start|>", "<|im_end|>", plain=("user", "assistant", "\n"))
    assert controls(tokenizer) == {"<|im_start|>", "<|im_end|>"}


def test_words_are_not_tags(new_tokenizer: NewTokenizer) -> None:
    tokenizer = new_tokenizer(ALPACA, eos_token="</s>")
    assert controls(tokenizer) == {"</s>"}
    assert chat_template.role_tags(tokenizer) == ()
    assert end_of_turn(tokenizer) is None
    assert not chat_template.takes_system(tokenizer)


def test_a_template_for_one_turn_only(new_tokenizer: NewTokenizer) -> None:
    tokenizer = new_tokenizer(ONE_TURN)
    assert chat_template.role_tags(tokenizer) == ("<user>", "</user>")


@pytest.mark.parametrize("template", [None, "{{ nothing.at.all }}", "{% broken"])
def test_without_a_template_that_renders_only_the_named_tokens_are_known(
    new_tokenizer: NewTokenizer, template: str | None
) -> None:
    tokenizer = new_tokenizer(template, "<filename>", bos_token="<s>", eos_token="</s>", pad_token="[PAD]")
    assert controls(tokenizer) == {"<s>", "</s>", "[PAD]"}
    assert end_of_turn(tokenizer) is None
    assert chat_template.role_tags(tokenizer) == ()
    assert not chat_template.takes_system(tokenizer)


def test_a_tokenizer_that_has_changed_is_read_again(new_tokenizer: NewTokenizer) -> None:
    tokenizer = new_tokenizer(ZEPHYR, eos_token="</s>")
    assert chat_template.takes_system(tokenizer)
    tokenizer.chat_template = GEMMA
    assert not chat_template.takes_system(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert controls(tokenizer) == {"</s>", "[PAD]"}


@pytest.mark.parametrize("template", [PARTS, ONLY_PARTS, PARTS_OF_USERS, BOTH])
def test_a_template_that_reads_only_parts_gets_parts(new_tokenizer: NewTokenizer, template: str) -> None:
    tokenizer = new_tokenizer(template, "<|im_start|>", "<end_of_utterance>")
    assert chat_template.takes_system(tokenizer)
    dialog = [message("system", "S"), message("user", "Hi {{ 1 }}"), message("assistant", "A"), message("user", "Why?")]
    text = chat_template.render(dialog, tokenizer)
    assert [part for part in ("S", "Hi {{ 1 }}", "A", "Why?") if part not in text] == []
    assert chat_template.render(dialog[-1:], tokenizer) != chat_template.render([message("user", "Who?")], tokenizer)


def test_a_template_that_reads_parts_is_known_like_any_other(new_tokenizer: NewTokenizer) -> None:
    tokenizer = new_tokenizer(PARTS, "<|im_start|>", "<end_of_utterance>", "<image>", eos_token="</s>")
    assert controls(tokenizer) == {"<|im_start|>", "<end_of_utterance>", "</s>"}
    assert end_of_turn(tokenizer) == "<end_of_utterance>"


@pytest.mark.parametrize("template", ["{{ bos_token }}Assistant:", "{% for m in messages %}{{ m.text }}{% endfor %}"])
def test_a_template_that_does_not_write_the_question_is_refused(new_tokenizer: NewTokenizer, template: str) -> None:
    with pytest.raises(InvalidRequest, match=r"^The model's chat template does not write the question\. Send a raw"):
        chat_template.render([message("user", "Hi")], new_tokenizer(template, bos_token="<s>"))


def test_a_template_that_writes_only_the_first_question_takes_no_other_dialog(new_tokenizer: NewTokenizer) -> None:
    tokenizer = new_tokenizer(ALPACA)
    dialog = [message("user", "Hi"), message("assistant", "Hello."), message("user", "Why?")]
    assert "Hi" in chat_template.render(dialog[:1], tokenizer)
    with pytest.raises(InvalidRequest, match=r"writes only some messages of a dialog\. Ask each question in a new"):
        chat_template.render(dialog, tokenizer)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('Roles must alternate') }}", "Roles must alternate"),
        ("{{ messages[0].content + 1 }}", "TypeError: can only concatenate str"),
        ("{{ 1 / 0 }}{{ messages[0].content }}", "ZeroDivisionError: division by zero"),
        ("{{ nothing.at.all }}", "'nothing' is undefined"),
        ("{% broken", "Encountered unknown tag 'broken'"),
        ("{% include 'other' %}", "TypeError: no loader for this environment specified"),
    ],
)
def test_every_failure_of_a_template_is_reported_as_such(
    new_tokenizer: NewTokenizer, template: str, reason: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        chat_template.render([message("user", "Hi")], new_tokenizer(template))
    assert str(refused.value).startswith(f"The model's chat template refuses these messages ({reason}")
    assert str(refused.value).endswith("). Change them, or send a raw text to /stream.")


@pytest.mark.parametrize("failure", [ImportError("jinja2 is not installed"), MemoryError()], ids=repr)
def test_other_failures_are_not_blamed_on_the_template(
    new_tokenizer: NewTokenizer, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise failure

    tokenizer = new_tokenizer(CHATML)
    monkeypatch.setattr(tokenizer, "apply_chat_template", fail)
    with pytest.raises(type(failure)):
        chat_template.render([message("user", "Hi")], tokenizer)
