"""From messages to the text and the token ids that a chat model was trained on.

For Llama-2-Chat, text and ids are exactly those of Meta's reference (``chat_completion`` in
``llama/generation.py`` of github.com/meta-llama/llama); any other model uses its own chat template.
This module loads no model and generates nothing: the caller passes a tokenizer.
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
    """The part of a Hugging Face tokenizer, fast or slow, that this module uses."""

    bos_token: Any
    eos_token: Any
    bos_token_id: Any
    eos_token_id: Any
    all_special_tokens: Any
    added_tokens_decoder: Any
    chat_template: Any

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...


SYSTEM_PROMPT = (
    "You are a helpful, respectful, and honest assistant. Always answer as helpfully as possible "
    "while being safe. Your answers should not include any harmful, unethical, racist, sexist, "
    "toxic, dangerous, or illegal content. Please ensure that your responses are socially unbiased "
    "and positive in nature.\n\n"
    "If a question does not make any sense or is not factually coherent, explain why instead of "
    "answering something incorrectly. If you don't know the answer to a question, don't share "
    "false information."
)
"""The article's."""
QUESTION = "If I punch myself in the face and it hurts, am I weak or strong?"
"""The article's."""

# Meta's names and values.
B_INST, E_INST = "[INST]", "[/INST]"
B_SYS, E_SYS = "<<SYS>>\n", "\n<</SYS>>\n\n"
SPECIAL_TAGS = (B_INST, E_INST, B_SYS.strip(), E_SYS.strip())

BOS, EOS = "<s>", "</s>"
"""How a text spells the BOS and EOS ids of Llama 2."""


def check_dialog(messages: object, *, special_tokens: Iterable[str] = ()) -> list[Message]:
    """Return the dialog as a new list of plain messages. Raise `InvalidRequest` if it is not a dialog.

    A dialog is an optional system message, then user and assistant messages in turn, and ends with a user message
    (Meta's rule). System and user messages must not contain any of the four tags (Meta's rule, here for every
    model) or of `special_tokens`. In an assistant message, a space after its first character turns such a tag
    into ordinary text. (Meta refuses it, so a conversation could not continue after the model once wrote a tag.) A
    user message must not be empty: Meta allows that, but models answer an empty message with something arbitrary.
    Keys of a message other than ``role`` and ``content`` are dropped.
    """
    forbidden = (*SPECIAL_TAGS, *special_tokens)
    checked = [_check_content(m, n, forbidden) for n, m in enumerate(check_history(messages), start=1)]
    if not checked:
        raise InvalidRequest("The dialog is empty. Send at least one user message.")
    if checked[-1]["role"] != "user":
        raise InvalidRequest(
            f"Message {len(checked)} ({checked[-1]['role']}) is the last one, so there is nothing to answer. "
            "End the dialog with a user message."
        )
    return checked


def check_history(messages: object) -> list[Message]:
    """Return the messages so far as a new list of plain messages; it may be empty and end with any role.

    Their contents are not checked. Raise `InvalidRequest` if a message is malformed or the roles do not alternate.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
        raise InvalidRequest(
            f"A dialog is a list of messages, not a {type(messages).__name__}. "
            "Send [{'role': 'user', 'content': 'your question'}]."
        )
    checked = [_check_message(m, n) for n, m in enumerate(messages, start=1)]
    first_user = int(bool(checked) and checked[0]["role"] == "system")
    for number, message in enumerate(checked[first_user:], start=first_user + 1):
        expected = ("user", "assistant")[(number - 1 - first_user) % 2]
        if message["role"] == "system":
            raise InvalidRequest(
                f"Message {number} (system) is not the first message of the dialog. "
                "Send one system message at most, and send it first."
            )
        if message["role"] != expected:
            raise InvalidRequest(
                f"Message {number} ({message['role']}) is out of turn: user and assistant alternate, the user "
                f"begins, and this message should be the {expected}'s. Join two messages of one role, or add the "
                "missing one."
            )
    return checked


def _check_message(message: object, number: int) -> Message:
    role = message.get("role") if isinstance(message, Mapping) else None
    content = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(role, str) or not isinstance(content, str):
        raise InvalidRequest(
            f"Message {number} is not a dict whose 'role' and 'content' are both text. "
            "Write it as {'role': 'user', 'content': 'your question'}."
        )
    if role not in ("system", "user", "assistant"):
        raise InvalidRequest(f"Message {number} has the unknown role {role!r}. Use 'system', 'user' or 'assistant'.")
    _check_unicode(content, f"Message {number} ({role})")
    return {"role": role, "content": content}  # type: ignore[typeddict-item]


def _check_content(message: Message, number: int, forbidden: Sequence[str]) -> Message:
    role, content = message["role"], message["content"]
    place = f"Message {number} ({role})"
    if role == "assistant":
        for text in forbidden:
            content = content.replace(text, f"{text[0]} {text[1:]}")
    for text in forbidden:
        if text in content:
            raise InvalidRequest(
                f"{place} contains {text!r}, which tells the model who is speaking, so it could pass off one "
                "speaker's words as another's (prompt injection). Remove it, or spell it differently."
            )
    if role == "user" and not content.strip():
        raise InvalidRequest(f"{place} is empty. Write what the model should answer.")
    return {"role": role, "content": content}


def _check_unicode(text: str, place: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"{place} is not valid Unicode: its character {error.start + 1} is {text[error.start]!a}, half of a "
            "surrogate pair. Remove it, or decode the text with the right encoding."
        ) from None


def llama2_prompt(messages: Sequence[Message]) -> str:
    """Return the whole dialog as one text in Llama 2's prompt format, with ``<s>`` and ``</s>`` written out.

    A closed turn is ``<s>[INST] user [/INST] answer </s>``; the last turn ends at ``[/INST]``. As in Meta's
    reference, the system prompt is put in front of the first user message before that message is stripped.
    Raise `InvalidRequest` if `check_dialog` refuses the messages, or if one contains ``<s>`` or ``</s>``.
    """
    *closed, last = _llama2_turns(check_dialog(messages, special_tokens=(BOS, EOS)))
    return "".join(f"{BOS}{turn}{EOS}" for turn in closed) + BOS + last


def llama2_token_ids(prompt: str | Sequence[Message], tokenizer: Tokenizer) -> list[int]:
    """Return the token ids of a dialog, or of a text in Llama 2's prompt format.

    For messages, the ids are Meta's: every turn is encoded alone, between the ids of BOS and EOS. A text is split
    at the tokenizer's spelling of BOS and EOS (``<s>``, ``</s>``), and the segments are encoded alone too. If a
    tokenizer encodes the whole text, the ids differ: they have a second BOS, and with ``legacy=False``, the setting
    of Llama-2-7b-chat-hf, ``[`` (29961) after ``<s>`` instead of Meta's ``▁[`` (518).

    The ids of a text always begin with one BOS and never contain two in a row. Whitespace around the text and
    between ``</s>`` and ``<s>`` is dropped; inside a turn it stays.

    Raise `InvalidRequest` if `check_dialog` refuses the messages (with all special tokens of the tokenizer), or if
    the text is empty or not valid Unicode.
    """
    if isinstance(prompt, str):
        return _llama2_text_ids(prompt, tokenizer)
    return _llama2_dialog_ids(_check_for(prompt, tokenizer), tokenizer)


def is_llama2(tokenizer: Tokenizer) -> bool:
    """Return whether the model was trained on Llama 2's prompt format.

    The chat template decides, because a path or a name says nothing: for Llama-2-Chat and its descendants it
    writes ``[INST]`` and ``<<SYS>>``. A copy without a template does not count as Llama 2.
    """
    template = str(tokenizer.chat_template)
    return B_INST in template and B_SYS.strip() in template


def token_ids(prompt: str | Sequence[Message], tokenizer: Tokenizer) -> list[int]:
    """Return the token ids of a dialog, or of a raw text, for the model that the tokenizer belongs to.

    Llama 2 gets `llama2_token_ids`. For any other model, its own chat template formats a dialog (and may add
    a system prompt), and its tokenizer encodes a raw text, without a second BOS if the text begins with one.

    Raise `InvalidRequest` if `check_dialog` refuses the messages (with all special tokens of the tokenizer), if the
    template refuses them or the model has none, or if the text is empty or not valid Unicode.
    """
    if not isinstance(prompt, str):
        return _dialog_ids(_check_for(prompt, tokenizer), tokenizer)
    if is_llama2(tokenizer):
        return _llama2_text_ids(prompt, tokenizer)
    _check_text(prompt)
    bos = tokenizer.bos_token
    has_bos = bool(bos) and prompt.lstrip().startswith(bos)
    return tokenizer.encode(prompt, add_special_tokens=not has_bos)


def count_tokens(prompt: str | Sequence[Message], tokenizer: Tokenizer) -> int:
    """Return how many tokens of the context window the prompt takes. Raise what `token_ids` raises."""
    return len(token_ids(prompt, tokenizer))


@dataclass(frozen=True)
class FittedDialog:
    """A dialog that leaves enough of the context window for its answer.

    - ``token_ids``: the ids of `messages`.
    - ``dropped_turns``: how many of the oldest turns, each a question with its answer, were left out of `messages`.
    """

    messages: list[Message]
    token_ids: list[int]
    dropped_turns: int


def fit_to_window(messages: Sequence[Message], tokenizer: Tokenizer, *, window: int, max_tokens: int) -> FittedDialog:
    """Drop the fewest of the oldest turns that let the dialog and its answer fit into the context window.

    `window` is the context length in tokens (4096 for Llama 2); `max_tokens` of it are reserved for the answer. The
    system prompt and the last question always stay. The number of turns is found by bisection, so a long dialog is
    encoded a few times, not once per turn.

    Raise `InvalidRequest` if the system prompt and the last question alone do not fit, or if `token_ids` refuses
    the dialog.
    """
    dialog = _check_for(messages, tokenizer)
    system = dialog[: int(dialog[0]["role"] == "system")]
    turns = dialog[len(system) :]

    def without(dropped: int) -> FittedDialog:
        left = [*system, *turns[2 * dropped :]]
        return FittedDialog(left, _dialog_ids(left, tokenizer), dropped)

    def fits(fitted: FittedDialog) -> bool:
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


def _too_long(least: FittedDialog, *, window: int, max_tokens: int) -> str:
    taken = len(least.token_ids)
    what, fix = "The last question takes", "Shorten it"
    if len(least.messages) > 1:
        what, fix = "The system prompt and the last question take", "Shorten one of them"
    if taken < window:
        fix += f", or set max_tokens to {window - taken} or less"
    return (
        f"{what} {taken} tokens; with max_tokens={max_tokens} for the answer, that is "
        f"{taken + max_tokens - window} more than the model's context window of {window}. {fix}."
    )


def _check_for(messages: object, tokenizer: Tokenizer) -> list[Message]:
    """Return the checked dialog. Refuse texts that this tokenizer reads as one special token.

    Whitespace, and added tokens that are not special (``<think>``), may appear in messages.
    """
    added = (token for token in tokenizer.added_tokens_decoder.values() if token.special)
    special = dict.fromkeys(map(str, (*tokenizer.all_special_tokens, *added)))
    return check_dialog(messages, special_tokens=[text for text in special if text.strip()])


def _check_text(text: str) -> None:
    _check_unicode(text, "The prompt")
    if not text.strip():
        raise InvalidRequest("The prompt is empty. Write what the model should continue.")


def _dialog_ids(messages: list[Message], tokenizer: Tokenizer) -> list[int]:
    if is_llama2(tokenizer):
        return _llama2_dialog_ids(messages, tokenizer)
    if not tokenizer.chat_template:
        raise InvalidRequest(
            "This model has no chat template, so it cannot read messages. Send one raw text to /stream instead."
        )
    try:
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    except Exception as error:
        if "TemplateError" not in (cls.__name__ for cls in type(error).__mro__):  # jinja2 is not imported here
            raise
        raise InvalidRequest(
            f"The model's chat template refuses these messages ({error}). Change them, or send a raw text to /stream."
        ) from error
    return list(ids)


def _llama2_turns(messages: list[Message]) -> list[str]:
    """Return the text between BOS and EOS of each turn; the last turn has no answer yet."""
    contents = [message["content"] for message in messages]
    if messages[0]["role"] == "system":
        system, first, *rest = contents
        contents = [f"{B_SYS}{system}{E_SYS}{first}", *rest]
    contents = [content.strip() for content in contents]
    closed = zip(contents[::2], contents[1::2], strict=False)
    return [
        *(f"{B_INST} {user} {E_INST} {answer} " for user, answer in closed),
        f"{B_INST} {contents[-1]} {E_INST}",
    ]


def _llama2_dialog_ids(messages: list[Message], tokenizer: Tokenizer) -> list[int]:
    *closed, last = _llama2_turns(messages)
    ids: list[int] = []
    for turn in closed:
        ids += [tokenizer.bos_token_id, *_encode_alone(turn, tokenizer), tokenizer.eos_token_id]
    return [*ids, tokenizer.bos_token_id, *_encode_alone(last, tokenizer)]


def _llama2_text_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    _check_text(text)
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
