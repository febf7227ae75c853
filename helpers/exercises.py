"""The notebooks' exercises: whether an answer is right, and a hint where it is not.

Knows what is right, in few words why, and what to think of next; never says an answer. The questions stand in
the notebooks, and worked answers in ``notebooks/solutions/``.
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import InvalidRequest
from .prompts import check_dialog


@dataclass(frozen=True)
class Exercise:
    """`is_right` judges an answer of any type; where it raises, the answer is not right. `why` and `hint` are
    whole sentences, `why` without "because"."""

    is_right: Callable[[Any], bool]
    why: str
    hint: str


def check(number: str, answer: Any) -> None:
    """Print, in one line, whether `answer` is right for exercise `number` (``"1.1"``: notebook.number).

    ``...`` is no answer yet. Where judging the answer raises, because it is of another type or a function that
    fails, the line names the exception. Raises `InvalidRequest` for an unknown number.
    """
    if number not in EXERCISES:
        raise InvalidRequest(f"There is no exercise {number!r}. Ask for one of: {', '.join(EXERCISES)}.")
    exercise = EXERCISES[number]
    print(f"{number}: {_verdict(exercise, answer)}")


def _verdict(exercise: Exercise, answer: Any) -> str:
    if answer is ...:
        return "no answer yet. Replace the ... above."
    try:
        right, trouble = exercise.is_right(answer), ""
    except Exception as error:
        right, trouble = False, " ".join(f" It raised {type(error).__name__}: {str(error).rstrip('.')}.".split("\n"))
    return f"right. {exercise.why}" if right else f"not yet.{trouble} Hint: {exercise.hint}"


def number_near(value: float, *, within: float = 0.0) -> Callable[[Any], bool]:
    """Judges a number: right from ``value - within`` to ``value + within``. Text is never right."""

    def is_right(answer: Any) -> bool:
        is_number = isinstance(answer, (int, float)) and not isinstance(answer, bool)
        return is_number and math.isclose(answer, value, rel_tol=1e-9, abs_tol=within)

    return is_right


def word(value: str) -> Callable[[Any], bool]:
    """Judges a word, whatever its case."""
    return lambda answer: isinstance(answer, str) and answer.strip().lower() == value


def _remembers(extend: Any) -> bool:
    """Judges exercise 2.2."""
    so_far = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
    given = copy.deepcopy(so_far)
    asked = [{"role": "assistant", "content": "Good day."}, {"role": "user", "content": "And you?"}]
    return bool(extend(given, "Good day.", "And you?") == [*so_far, *asked]) and given == so_far


def _reads_streams(text_of: Any) -> bool:
    """Judges exercise 3.3: by a whole stream, one that failed, and two that broke off."""
    from .schemas import ModelOutputDocument  # takes seconds, where nobody else needs it

    pieces = [ModelOutputDocument(token_id=n, generated_text=text) for n, text in enumerate(("A", " b"))]
    end = ModelOutputDocument(token_id=-1, generated_text="c", finish_reason="length")
    failed = ModelOutputDocument(token_id=-1, generated_text="", finish_reason="error", error="GenerationFailed: no memory")
    for broken in ([*pieces, failed], pieces, []):
        try:
            text_of(broken)
        except RuntimeError:
            continue
        return False
    return bool(text_of([*pieces, end]) == "A bc")


def _is_no_riddle(messages: Any) -> bool:
    """Judges exercise 4.1. Raises `InvalidRequest` for what is no dialog."""
    texts = [message["content"] for message in check_dialog(messages)]
    has_words = len(texts) == 3 and bool(texts[1].strip())
    return has_words and texts[-1].strip() == "And of Italy?" and "capital" in f"{texts[0]} {texts[1]}".lower()


def _fits_turns(dropped: Any) -> bool:
    """Judges exercise 4.2: with room for all, for all to a token, for some of uneven ones, and for none."""
    cases = {
        ((), 100): 0,
        ((30, 30, 30), 100): 0,
        ((30, 40, 30), 100): 0,
        ((30, 41, 30), 100): 1,
        ((10, 90, 10, 10), 100): 2,
        ((10, 20, 101), 100): 3,
    }
    for (lengths, room), right in cases.items():
        given = [*lengths]
        if dropped(given, room + 412, 412) != right or given != [*lengths]:
            return False
    return True


def _turns() -> list[Any]:
    """Turns with answers of every kind."""
    from .client import Answer, Turn  # takes seconds, where nobody else needs it

    turns = []
    for question, text, reason in (
        ("Who?", "Ada.", "stop"),
        ("Why?", "", "cancelled"),
        ("Where?", "In Lon", "cancelled"),
        ("What?", "", "error"),
        ("How?", "By writ", "length"),
        ("When? 🦙", "In 18", "error"),
        ("Why?", "", "cancelled"),
    ):
        answer = Answer()
        answer.text, answer.finish_reason = text, reason
        turns.append(Turn(question, answer))
    return turns


def _sends_what_was_said(messages: Any) -> bool:
    """Judges exercise 4.3."""
    right = []
    for question, answer in _turns():
        if answer.text:
            right += [{"role": "user", "content": question}, {"role": "assistant", "content": answer.text}]
    return [*messages(_turns())] == right and [*messages([])] == []


def _finds_unanswered(questions: Any) -> bool:
    """Judges exercise 4.4: by files with a system prompt and without one."""
    from .client import Conversation

    right = [question for question, answer in _turns() if answer.finish_reason in ("cancelled", "error")]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "talk.json"
        for system in (None, "Be kind."):
            talk = Conversation(system)
            talk.turns = _turns()
            talk.save(path)
            if list(questions(path)) != right:
                return False
    return True


EXERCISES: dict[str, Exercise] = {
    # --- 01 Access ---
    "1.1": Exercise(
        number_near(26.0, within=0.1),
        "At 2 bytes each, a billion parameters are 2 GB.",
        "Each parameter takes as many bytes as access.PRECISIONS says; 1e9 bytes are 1 GB.",
    ),
    "1.2": Exercise(
        word("int8"),
        "It is the most exact one that leaves room for keys and values too.",
        "Ask access.fits, with free=24e9, for each of access.PRECISIONS, the most exact first.",
    ),
    "1.3": Exercise(
        number_near(2 * 40 * 5120 * 2),
        "So a full context of 4,096 tokens takes 3.4 GB.",
        "Of each token, each layer keeps a key and a value; how many numbers is that, and how many bytes each?",
    ),
    "1.4": Exercise(
        word("b"),
        "A token that the Hub has forgotten opens nothing, whoever holds a copy.",
        "Somebody may have copied it already. What makes that copy useless too?",
    ),
    # --- 02 Prompting ---
    "2.1": Exercise(
        number_near(5),
        "Each turn begins with one, and the system prompt is part of the first turn.",
        "A turn is a question with its answer, or the last question alone. What does each turn begin with?",
    ),
    "2.2": Exercise(
        _remembers,
        "All that was said goes along, in order.",
        "Make a new list: the messages, then the answer as the assistant's, then the question as the user's.",
    ),
    "2.3": Exercise(
        number_near((4096 - 256 - 150 - 20) // 300),
        "What is left after everything that must stay is divided among whole turns.",
        "Take from the window what always stays and what is kept free; only whole turns fit into the rest.",
    ),
    "2.4": Exercise(
        word("b"),
        "It holds a tag of the schema; the others are words, even where they mean harm.",
        "Look for one of prompts.SPECIAL_TAGS.",
    ),
    # --- 03 Streaming ---
    "3.1": Exercise(
        number_near(sum(100 + made for made in range(50))),
        "Each call reads the prompt and all that was made before: that sum grows with the square of the length.",
        "The first call reads 100 tokens, the second 101. What does the fiftieth read? Add them all up.",
    ),
    "3.2": Exercise(
        number_near(100 + 49),
        "Every token is read once, and the last one by nobody.",
        "What was read once is not read again. How many tokens are in the prompt, and how many come after it?",
    ),
    "3.3": Exercise(
        _reads_streams,
        "Only the last document can tell a whole answer from one that broke off.",
        "Look at the last document: is there one, has it a finish_reason, and which?",
    ),
    "3.4": Exercise(
        number_near(0.5 + 40 * 0.1, within=0.001),
        "The time to the first token counts once, the inter-token latency for each token after it.",
        "The first token is there after 0.5 s. How many are still to come, and how long does each take?",
    ),
    # --- 04 Conversation ---
    "4.1": Exercise(
        _is_no_riddle,
        "What is asked for stands in the turn before, so that turn has to be sent too.",
        "What would have to be said before, so that you would understand the question? And who speaks in between? "
        "(Three messages do, the last one word for word; the checker looks for the word capital.)",
    ),
    "4.2": Exercise(
        _fits_turns,
        "The oldest go first and whole, and no more of them than it takes.",
        "Take turns away at the old end, one by one. When do those that are left fit beside what is kept free? Of 30, 40 "
        "and 30 tokens, with 412 kept free of 512, none has to go; of 30, 41 and 30, one. The list stays as it is.",
    ),
    "4.3": Exercise(
        _sends_what_was_said,
        "What was read of an answer is part of the dialog, and a question without any answer would break it.",
        "An answer may be whole, a part, or empty. After which of the three can the next question not be asked? "
        "(A message is a dict of role and content, and the content is text.)",
    ),
    "4.4": Exercise(
        _finds_unanswered,
        "How an answer ended stands beside the messages, not in them.",
        "The file has as many answers as it has messages of the user. What does the finish_reason of each say? "
        "(One that max_tokens cut off, length, was neither stopped, cancelled, nor has it failed, error.)",
    ),
}
