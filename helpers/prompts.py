"""From messages to the text and the token ids that a chat model was trained on.

Knows the prompt schema of Llama-2-Chat, letter for letter and id for id as in Meta's reference
(``chat_completion`` in ``llama/generation.py`` of github.com/meta-llama/llama), how to use another
model's own chat template, and which dialogs are no dialogs. Does not know models, services or
documents: a tokenizer is handed in, and nothing is ever generated or loaded here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypedDict

from .errors import InvalidRequest

Role = Literal["system", "user", "assistant"]


class Message(TypedDict):
    """One message of a dialog; a dialog is a sequence of them, oldest first."""

    role: Role
    content: str


class Tokenizer(Protocol):
    """What this module uses of a Hugging Face tokenizer, fast or slow."""

    bos_token: Any
    eos_token: Any
    bos_token_id: Any
    eos_token_id: Any
    all_special_tokens: Any
    added_tokens_decoder: Any
    chat_template: Any

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...


# The article's example.
SYSTEM_PROMPT = (
    "You are a helpful, respectful, and honest assistant. Always answer as helpfully as possible "
    "while being safe. Your answers should not include any harmful, unethical, racist, sexist, "
    "toxic, dangerous, or illegal content. Please ensure that your responses are socially unbiased "
    "and positive in nature.\n\n"
    "If a question does not make any sense or is not factually coherent, explain why instead of "
    "answering something incorrectly. If you don't know the answer to a question, don't share "
    "false information."
)
QUESTION = "If I punch myself in the face and it hurts, am I weak or strong?"

# Meta's names and values.
B_INST, E_INST = "[INST]", "[/INST]"
B_SYS, E_SYS = "<<SYS>>\n", "\n<</SYS>>\n\n"
SPECIAL_TAGS = (B_INST, E_INST, B_SYS.strip(), E_SYS.strip())

# How Llama 2's tokenizer spells its BOS and EOS ids in a text.
BOS, EOS = "<s>", "</s>"


def check_dialog(messages: object, *, special_tokens: Iterable[str] = ()) -> list[Message]:
    """The dialog as a new list of plain messages, or `InvalidRequest` with what to mend.

    A dialog is an optional system message, then user and assistant in turn, the last one from the
    user (Meta's rule). No system or user message may hold one of the four tags (Meta's rule too; here it
    holds for every model) or one of `special_tokens`. Meta's rule is the same for the assistant's, so that
    a model that once wrote a tag could not be asked again; here it is written with a blank after its
    first character, which makes it ordinary text. Stricter than Meta: a user message must say something,
    because a model answers an empty one with whatever comes to its mind. Keys of a message other
    than ``role`` and ``content`` are left out of the result.
    """
    forbidden = (*SPECIAL_TAGS, *special_tokens)
    checked = [_check_words(m, n, forbidden) for n, m in enumerate(check_history(messages), start=1)]
    if not checked:
        raise InvalidRequest("The dialog is empty: send at least one user message.")
    if checked[-1]["role"] != "user":
        raise InvalidRequest(
            f"Message {len(checked)} ({checked[-1]['role']}) is the last one, so there is nothing "
            "to answer: end the dialog with a user message."
        )
    return checked


def check_history(messages: object) -> list[Message]:
    """What was said so far as a new list of plain messages: a dialog, perhaps without its last question.

    Whatever its words are; and it may be empty. Raises `InvalidRequest` with what to mend.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
        raise InvalidRequest(
            f"A dialog is a list of messages, and this is a {type(messages).__name__}: "
            "send [{'role': 'user', 'content': 'your question'}]."
        )
    checked = [_check_message(m, n) for n, m in enumerate(messages, start=1)]
    first_user = int(bool(checked) and checked[0]["role"] == "system")
    for number, message in enumerate(checked[first_user:], start=first_user + 1):
        expected = ("user", "assistant")[(number - 1 - first_user) % 2]
        if message["role"] == "system":
            raise InvalidRequest(
                f"Message {number} (system) comes too late: a dialog has at most one system "
                "message, and it is the first. Move it to the front, or join it to the first one."
            )
        if message["role"] != expected:
            raise InvalidRequest(
                f"Message {number} ({message['role']}) is out of turn: user and assistant "
                f"alternate, the user begins, and here the {expected} should speak. Join two "
                "messages of one speaker, or put in the one that is missing."
            )
    return checked


def _check_message(message: object, number: int) -> Message:
    role = message.get("role") if isinstance(message, Mapping) else None
    content = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(role, str) or not isinstance(content, str):
        raise InvalidRequest(
            f"Message {number} is not a dict whose 'role' and 'content' are both text: "
            "write it as {'role': 'user', 'content': 'your question'}."
        )
    if role not in ("system", "user", "assistant"):
        raise InvalidRequest(
            f"Message {number} has the unknown role {role!r}: use 'system', 'user' or 'assistant'."
        )
    _check_text(content, f"Message {number} ({role})")
    return {"role": role, "content": content}  # type: ignore[typeddict-item]


def _check_words(message: Message, number: int, forbidden: Sequence[str]) -> Message:
    role, content = message["role"], message["content"]
    where = f"Message {number} ({role})"
    if role == "assistant":
        for text in forbidden:
            content = content.replace(text, f"{text[0]} {text[1:]}")
    for text in forbidden:
        if text in content:
            raise InvalidRequest(
                f"{where} holds {text!r}, which marks for the model who is speaking: in a message "
                "it could pass off one speaker's words as another's (prompt injection). "
                "Take it out, or spell it differently."
            )
    if role == "user" and not content.strip():
        raise InvalidRequest(f"{where} is empty: write what the model should answer.")
    return {"role": role, "content": content}


def _check_text(text: str, where: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"{where} is not valid Unicode: its character {error.start + 1} is "
            f"{text[error.start]!a}, half of a surrogate pair, which UTF-8 cannot carry. "
            "Take it out, or read the text again with the right encoding."
        ) from None


def llama2_prompt(messages: Sequence[Message]) -> str:
    """The whole dialog as one text in the Llama-2 schema, ``<s>`` and ``</s>`` written out.

    A closed turn is ``<s>[INST] user [/INST] answer </s>``, and the last one ends at ``[/INST]``.
    The system prompt goes in front of the first user message before that is stripped, as in Meta's
    reference. Raises `InvalidRequest` for what `check_dialog` refuses and for a message that holds
    ``<s>`` or ``</s>``.
    """
    *closed, last = _llama2_turns(check_dialog(messages, special_tokens=(BOS, EOS)))
    return "".join(f"{BOS}{turn}{EOS}" for turn in closed) + BOS + last


def llama2_token_ids(prompt: str | Sequence[Message], tokenizer: Tokenizer) -> list[int]:
    """Token ids of a dialog, or of a text in the Llama-2 schema, ready for the model.

    From messages they are Meta's own: every turn is encoded alone, between the ids of BOS and EOS.
    From a text it is the same: BOS and EOS where the tokenizer's own spelling of them stands
    (``<s>``, ``</s>``), the segments between them encoded alone. Handing the whole text to a
    tokenizer gives other ids: a second BOS, and with ``legacy=False``, Llama-2-7b-chat-hf's own
    setting, ``[`` (29961) after ``<s>`` where Meta has ``▁[`` (518).

    A text always gets a BOS in front, and never two in a row. Whitespace around the whole text and
    between ``</s>`` and ``<s>`` is not part of the prompt; inside a turn it stays as written.

    Raises `InvalidRequest` for what `check_dialog` refuses (all of the tokenizer's special tokens
    included), for a text without a word in it and for one that is not valid Unicode.
    """
    if isinstance(prompt, str):
        return _llama2_text_ids(prompt, tokenizer)
    return _llama2_dialog_ids(_check_for(prompt, tokenizer), tokenizer)


def is_llama2(tokenizer: Tokenizer) -> bool:
    """Whether the model was trained on the Llama-2 schema.

    Told by its chat template, which for Llama-2-Chat and its descendants writes ``[INST]`` and
    ``<<SYS>>``; a path or a name would not tell. A copy without a template does not count.
    """
    template = str(tokenizer.chat_template)
    return B_INST in template and B_SYS.strip() in template


def token_ids(prompt: str | Sequence[Message], tokenizer: Tokenizer) -> list[int]:
    """Token ids of a dialog, or of a raw text, for whichever model the tokenizer belongs to.

    Llama 2 gets `llama2_token_ids`. Any other model gets its own chat template (with whatever
    system prompt that puts in by itself), and a raw text as its tokenizer encodes it, but never
    with a BOS in front of the one that the text begins with.

    Raises `InvalidRequest` for what `check_dialog` refuses (all of the tokenizer's special tokens
    included), for messages that the model's template refuses or that it has no template for, and
    for a text without a word in it or that is not valid Unicode.
    """
    if not isinstance(prompt, str):
        return _dialog_ids(_check_for(prompt, tokenizer), tokenizer)
    if is_llama2(tokenizer):
        return _llama2_text_ids(prompt, tokenizer)
    _check_prompt(prompt)
    bos = tokenizer.bos_token
    has_bos = bool(bos) and prompt.lstrip().startswith(bos)
    return tokenizer.encode(prompt, add_special_tokens=not has_bos)


def count_tokens(prompt: str | Sequence[Message], tokenizer: Tokenizer) -> int:
    """How many tokens of the model's window the prompt takes; raises what `token_ids` raises."""
    return len(token_ids(prompt, tokenizer))


@dataclass(frozen=True)
class Fitted:
    """A dialog that leaves room for its answer.

    `dropped_turns` counts the oldest turns, a question with its answer each, that are no longer
    in `messages`; `token_ids` belong to the messages that are left.
    """

    messages: list[Message]
    token_ids: list[int]
    dropped_turns: int


def fit_to_window(
    messages: Sequence[Message], tokenizer: Tokenizer, *, window: int, max_tokens: int
) -> Fitted:
    """The dialog without as many of its oldest turns as it takes to fit, and no more.

    `window` is the model's context size in tokens (4096 for Llama 2), `max_tokens` the length kept
    free for the answer. Turns go whole; the system prompt and the last question always stay.
    The number of turns is found by bisection, so a long dialog is encoded a few times, not once per
    turn. Raises `InvalidRequest` if what must stay does not fit, and for what `token_ids` refuses.
    """
    dialog = _check_for(messages, tokenizer)
    system = dialog[: int(dialog[0]["role"] == "system")]
    turns = dialog[len(system) :]

    def without(dropped: int) -> Fitted:
        left = [*system, *turns[2 * dropped :]]
        return Fitted(left, _dialog_ids(left, tokenizer), dropped)

    def fits(fitted: Fitted) -> bool:
        return len(fitted.token_ids) + max_tokens <= window

    whole = without(0)
    if fits(whole):
        return whole
    best = without(len(turns) // 2)
    if not fits(best):
        raise InvalidRequest(_too_long(best, window=window, max_tokens=max_tokens))
    too_few = 0
    while best.dropped_turns - too_few > 1:
        middle = without((too_few + best.dropped_turns) // 2)
        if fits(middle):
            best = middle
        else:
            too_few = middle.dropped_turns
    return best


def _too_long(least: Fitted, *, window: int, max_tokens: int) -> str:
    taken = len(least.token_ids)
    what, cure = "The last question takes", "shorten it"
    if len(least.messages) > 1:
        what, cure = "The system prompt and the last question take", "shorten one of them"
    if taken < window:
        cure += f", or set max_tokens to {window - taken} or less"
    return (
        f"{what} {taken} tokens, and with max_tokens={max_tokens} for the answer that is "
        f"{taken + max_tokens - window} more than the model's window of {window}: {cure}."
    )


def _check_for(messages: object, tokenizer: Tokenizer) -> list[Message]:
    """`check_dialog` with the texts that this tokenizer would read as one special token.

    Whitespace, and added tokens that are not special (``<think>``), belong to ordinary messages.
    """
    added = (token for token in tokenizer.added_tokens_decoder.values() if token.special)
    special = dict.fromkeys(map(str, (*tokenizer.all_special_tokens, *added)))
    return check_dialog(messages, special_tokens=[text for text in special if text.strip()])


def _check_prompt(text: str) -> None:
    _check_text(text, "The prompt")
    if not text.strip():
        raise InvalidRequest("The prompt is empty: write what the model should continue.")


def _dialog_ids(messages: list[Message], tokenizer: Tokenizer) -> list[int]:
    if is_llama2(tokenizer):
        return _llama2_dialog_ids(messages, tokenizer)
    if not tokenizer.chat_template:
        raise InvalidRequest(
            "This model has no chat template, so it cannot take messages: "
            "send it one raw text, as a prompt to /stream."
        )
    try:
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
    except Exception as error:
        if "TemplateError" not in (cls.__name__ for cls in type(error).__mro__):
            raise
        raise InvalidRequest(
            f"The model's chat template refuses these messages ({error}): change them as it says, "
            "or send a raw text to /stream."
        ) from error
    return list(ids)


def _llama2_turns(messages: list[Message]) -> list[str]:
    """The text between BOS and EOS of each turn; the last one is still open."""
    contents = [message["content"] for message in messages]
    if messages[0]["role"] == "system":
        system, first, *rest = contents
        contents = [f"{B_SYS}{system}{E_SYS}{first}", *rest]
    contents = [content.strip() for content in contents]
    closed = [
        f"{B_INST} {user} {E_INST} {answer} " for user, answer in zip(contents[::2], contents[1::2])
    ]
    return [*closed, f"{B_INST} {contents[-1]} {E_INST}"]


def _llama2_dialog_ids(messages: list[Message], tokenizer: Tokenizer) -> list[int]:
    *closed, last = _llama2_turns(messages)
    ids: list[int] = []
    for turn in closed:
        ids += [tokenizer.bos_token_id, *_encode_alone(turn, tokenizer), tokenizer.eos_token_id]
    return [*ids, tokenizer.bos_token_id, *_encode_alone(last, tokenizer)]


def _llama2_text_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    _check_prompt(text)
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    ids = [tokenizer.bos_token_id]
    for part in re.split(f"({re.escape(bos)}|{re.escape(eos)})", text.strip()):
        if part == bos:
            if ids[-1] != tokenizer.bos_token_id:
                ids.append(tokenizer.bos_token_id)
        elif part == eos:
            ids.append(tokenizer.eos_token_id)
        elif part.strip():
            ids += _encode_alone(part, tokenizer)
    return ids


def _encode_alone(segment: str, tokenizer: Tokenizer) -> list[int]:
    return tokenizer.encode(segment, add_special_tokens=False)
