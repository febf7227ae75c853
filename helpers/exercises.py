"""The notebooks' exercises: check an answer, and give a hint if it is wrong.

This module knows how to judge an answer, a short reason, and a hint, and never shows an answer. The questions are in
the notebooks, and the solutions are in ``notebooks/solutions/``.
"""

from __future__ import annotations

import copy
import itertools
import json
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
    """`is_right` judges an answer of any type; if it raises, the answer is wrong. `why` and `hint` are sentences."""

    is_right: Callable[[Any], bool]
    why: str
    hint: str


def check(number: str, answer: Any) -> None:
    """Print, in one line, whether `answer` is right for exercise `number` (``"1.1"``: notebook.number).

    ``...`` means no answer yet. If judging the answer raises, because it has another type or is a function that
    fails, the line names the exception. Raise `InvalidRequest` for an unknown number.
    """
    if number not in EXERCISES:
        raise InvalidRequest(f"There is no exercise {number!r}. Choose one of: {', '.join(EXERCISES)}.")
    exercise = EXERCISES[number]
    print(f"{number}: {_verdict(exercise, answer)}")


def _verdict(exercise: Exercise, answer: Any) -> str:
    if answer is ...:
        return "no answer yet. Replace the ... above."
    try:
        is_right, raised = exercise.is_right(answer), ""
    except Exception as error:
        is_right, raised = False, " ".join(f" It raised {type(error).__name__}: {str(error).rstrip('.')}.".split("\n"))
    return f"right. {exercise.why}" if is_right else f"not yet.{raised} Hint: {exercise.hint}"


def number_near(value: float, *, within: float = 0.0) -> Callable[[Any], bool]:
    """Return a judge of numbers: right from ``value - within`` to ``value + within``. Text is never right."""

    def is_right(answer: Any) -> bool:
        is_number = isinstance(answer, (int, float)) and not isinstance(answer, bool)
        return is_number and math.isclose(answer, value, rel_tol=1e-9, abs_tol=within)

    return is_right


def word(value: str) -> Callable[[Any], bool]:
    """Return a judge of words, which ignores case."""
    return lambda answer: isinstance(answer, str) and answer.strip().lower() == value


def _remembers(extend: Any) -> bool:
    """Judge exercise 2.2."""
    so_far = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
    given = copy.deepcopy(so_far)
    asked = [{"role": "assistant", "content": "Good day."}, {"role": "user", "content": "And you?"}]
    return bool(extend(given, "Good day.", "And you?") == [*so_far, *asked]) and given == so_far


def _detokenizes(pieces_of: Any) -> bool:
    """Judge exercise 3.3: every piece must be all that is certain, with characters of one to four bytes."""
    text = "Bon appétit, 日本 🦙!"
    raw = text.encode()
    for size in (1, 2, 3, len(raw)):
        tokens = [raw[begin : begin + size] for begin in range(0, len(raw), size)]
        certain = [raw[: end + size].decode(errors="ignore") for end in range(0, len(raw), size)]
        right = [now[len(before) :] for before, now in itertools.pairwise(["", *certain])]
        if list(pieces_of([*tokens])) != right:
            return False
    return list(pieces_of([])) == []


def _explains_itself(messages: Any) -> bool:
    """Judge exercise 4.1. Raise `InvalidRequest` if `messages` is not a dialog."""
    texts = [message["content"] for message in check_dialog(messages)]
    has_answer = len(texts) == 3 and bool(texts[1].strip())
    return has_answer and texts[-1].strip() == "And of Italy?" and "capital" in f"{texts[0]} {texts[1]}".lower()


def _fits_turns(dropped: Any) -> bool:
    """Judge exercise 4.2 with windows that hold all turns, exactly all turns, some of them, and none."""
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
    """Return turns with answers of every kind."""
    from .answer import Answer
    from .conversation import Turn  # takes seconds, and only two exercises need it

    return [
        Turn("Who?", Answer.ended("Ada.", "stop")),
        Turn("Why?", Answer.ended("", "cancelled")),
        Turn("Where?", Answer.ended("In Lon", "cancelled")),
        Turn("What?", Answer.ended("", "error")),
        Turn("How?", Answer.ended("By writ", "length")),
        Turn("When? 🦙", Answer.ended("In 18", "error")),
        Turn("Why?", Answer.ended("", "cancelled")),
    ]


def _sends_what_was_said(messages: Any) -> bool:
    """Judge exercise 4.3."""
    right = []
    for question, answer in _turns():
        if answer.text:
            right += [{"role": "user", "content": question}, {"role": "assistant", "content": answer.text}]
    return [*messages(_turns())] == right and [*messages([])] == []


def _finds_unanswered(questions: Any) -> bool:
    """Judge exercise 4.4 with files that have a system prompt or none."""
    from .conversation import Conversation

    right = [question for question, answer in _turns() if answer.finish_reason in ("cancelled", "error")]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "talk.json"
        for system in (None, "Be kind."):
            conversation = Conversation(system)
            conversation.turns = _turns()
            conversation.save(path)
            if list(questions(path)) != right:
                return False
    return True


def _reads_new_tokens(read: Any) -> bool:
    """Judge exercise 4.5 with prompts that continue, repeat, resemble and differ from earlier ones."""
    cases: tuple[tuple[list[list[int]], list[int]], ...] = (
        ([], []),
        ([[1, 2, 3]], [3]),
        ([[1, 2, 3], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6]], [3, 2, 1]),
        ([[1, 2, 3], [7, 2, 3], [1, 2, 3, 4]], [3, 3, 1]),
        ([[1, 2, 9, 9], [1, 2, 3, 4], [1, 2, 3, 9, 4], [1, 2]], [4, 2, 2, 0]),
    )
    return all([*read(copy.deepcopy(prompts))] == right for prompts, right in cases)


def _reads_streams(read: Any) -> bool:
    """Judge exercise 5.1 with streams of every end, and with comments, empty lines and chunks without text."""

    def chunk(**delta: str) -> str:
        return f"data: {json.dumps({'choices': [{'index': 0, 'delta': delta, 'finish_reason': None}]})}"

    begun = [chunk(role="assistant", content=""), "", ": ping", "", chunk(content="data: 7"), "", chunk(content="€ ")]
    failed = f"data: {json.dumps({'error': {'message': 'It went away.', 'code': 'service_unavailable'}})}"
    cases: tuple[tuple[list[str], tuple[str, str]], ...] = (
        ([], ("", "broken")),
        (["data: [DONE]", ""], ("", "complete")),
        (begun, ("data: 7€ ", "broken")),
        ([*begun, "", chunk(), "", "data: [DONE]", ""], ("data: 7€ ", "complete")),
        ([*begun, "", failed, ""], ("data: 7€ ", "error")),
        ([failed, ""], ("", "error")),
        ([chunk(content="[DONE]"), ""], ("[DONE]", "broken")),
        ([chunk(content='an "error"'), "", "data: [DONE]", ""], ('an "error"', "complete")),
    )
    return all(tuple(read([*lines])) == right for lines, right in cases)


def _finds_percentiles(bound: Any) -> bool:
    """Judge exercise 5.2 with shares between the buckets, at their edges, and with empty buckets."""
    even = {0.1: 12, 0.5: 18, 1.0: 20}
    late = {0.1: 0, 0.5: 0, 1.0: 5, 2.5: 5, 5.0: 50, math.inf: 100}
    cases: tuple[tuple[dict[float, int], float, float], ...] = (
        *(
            (even, share, right)
            for share, right in ((0.5, 0.1), (0.6, 0.1), (0.75, 0.5), (0.9, 0.5), (0.95, 1), (1, 1))
        ),
        *((late, share, right) for share, right in ((0.05, 1), (0.25, 5), (0.5, 5), (0.75, math.inf))),
    )
    return all(bound({**buckets}, share) == right for buckets, share, right in cases)


EXERCISES: dict[str, Exercise] = {
    # --- 01 Access ---
    "1.1": Exercise(
        number_near(26.0, within=0.1),
        "At 2 bytes each, a billion parameters are 2 GB.",
        "memory.PRECISIONS has the bytes of one parameter; 1e9 bytes are 1 GB.",
    ),
    "1.2": Exercise(
        word("nf4"),
        "The four caches take more than the weights.",
        "Add the weights (memory.PRECISIONS), four caches of 2.1 GB and 0.5 GB, for the most exact precision first.",
    ),
    "1.3": Exercise(
        number_near(2 * 40 * 5120 * 2),
        "So a full context of 4,096 tokens takes 3.4 GB.",
        "Each layer keeps a key and a value for each token. How many numbers is that, and how many bytes each?",
    ),
    "1.4": Exercise(
        word("b"),
        "A revoked token opens nothing, no matter who has a copy.",
        "Somebody may have copied it already. What makes that copy useless too?",
    ),
    "1.5": Exercise(
        number_near(64**0.25, within=0.01),
        "The model was as unsure as if it chose among 2.8 equally likely tokens.",
        "Turn each into 1 / probability. The geometric mean of four numbers is the fourth root of their product.",
    ),
    # --- 02 Prompting ---
    "2.1": Exercise(
        number_near(5),
        "Each turn begins with one, and the system prompt is part of the first turn.",
        "A turn is a question with its answer, or the last question alone. What does each turn begin with?",
    ),
    "2.2": Exercise(
        _remembers,
        "The next request holds the whole dialog, in order.",
        "Make a new list: the messages, then the answer as the assistant's, then the question as the user's.",
    ),
    "2.3": Exercise(
        number_near((4096 - 256 - 150 - 20) // 300),
        "Whole turns share what is left after everything that must stay.",
        "Subtract from the window what always stays and what is kept free. How many whole turns fit into the rest?",
    ),
    "2.4": Exercise(
        word("b"),
        "It holds a tag of the prompt format; the others are plain words, even if they mean harm.",
        "Look for one of prompts.SPECIAL_TAGS.",
    ),
    "2.5": Exercise(
        number_near(math.exp(2) / (math.exp(2) + math.exp(1) + math.exp(0)), within=0.005),
        "Softmax divides e to the logit by the sum over all tokens, so that the probabilities add up to 1.",
        "Raise e to each of the three logits. What share of their sum does the first one have?",
    ),
    # --- 03 Streaming ---
    "3.1": Exercise(
        number_near(sum(100 + made for made in range(50))),
        "Each call reads the prompt and all earlier tokens, so the sum grows with the square of the length.",
        "The first call reads 100 tokens, the second 101. What does the fiftieth read? Add them all up.",
    ),
    "3.2": Exercise(
        number_near(100 + 49),
        "Every token is read once, except the last one, which is never read.",
        "No token is read twice. How many tokens are in the prompt, and how many come after it?",
    ),
    "3.3": Exercise(
        _detokenizes,
        "Each piece is what the bytes so far add to the text, and never a part of a character.",
        "Keep the bytes that are not text yet. Can they be decoded together with the next token's, or is the last "
        "character incomplete? A token may also end one character and begin another. codecs has a decoder for this.",
    ),
    "3.4": Exercise(
        number_near(0.5 + 40 * 0.1, within=0.001),
        "The time to the first token counts once, the inter-token latency for each token after it.",
        "The first token comes after 0.5 s. How many follow, and how long does each take?",
    ),
    "3.5": Exercise(
        number_near(50 * (4 * 0.020 - 0.026), within=0.001),
        "A batch makes 50 steps, and interleaving 200, each of them only a little shorter.",
        "How many steps does each way make until the last client has its last token? And how long is a step?",
    ),
    # --- 04 Conversation ---
    "4.1": Exercise(
        _explains_itself,
        "The earlier turn says what is asked for, so it must be sent too.",
        "What must come first, so that you would understand the question? And who speaks in between? "
        "(Three messages are enough, the last one word for word; the checker looks for the word capital.)",
    ),
    "4.2": Exercise(
        _fits_turns,
        "The oldest turns go first, whole, and no more of them than necessary.",
        "Drop turns from the old end, one by one. When do the remaining ones fit beside what is kept free? Of 30, 40 "
        "and 30 tokens, with 412 of 512 kept free, none must go; of 30, 41 and 30, one. Do not change the list.",
    ),
    "4.3": Exercise(
        _sends_what_was_said,
        "A partial answer is part of the dialog, and a question without any answer would break it.",
        "An answer may be complete, partial or empty. Which of the three cannot be followed by a question? "
        "(A message is a dict of role and content, and the content is text.)",
    ),
    "4.4": Exercise(
        _finds_unanswered,
        "The file says beside the messages, not in them, how an answer ended.",
        "The file has one entry in answers for each message of the user. What does its finish_reason say? "
        "(cancelled means stopped, error means failed; length, cut off by max_tokens, is neither.)",
    ),
    "4.5": Exercise(
        _reads_new_tokens,
        "One changed token makes everything after it new, even if the rest is the same.",
        "For each prompt, count how far it equals each earlier one from the start, and take the longest. "
        "The prompt may also agree with one that is not the latest. The first prompt shares nothing.",
    ),
    # --- 05 Service ---
    "5.1": Exercise(
        _reads_streams,
        "Only [DONE] says that nothing is missing; a stream that just stops is a failure.",
        "Look only at lines that begin with `data: `. What follows is [DONE], or JSON that has either choices or an "
        "error. The delta of a chunk may have no content, and an answer may contain the text [DONE].",
    ),
    "5.2": Exercise(
        _finds_percentiles,
        "A histogram tells the bucket of a percentile, and not its place in the bucket.",
        "The last bucket says how many values there are. How many of them must lie at or below the bound? Which is "
        "the first bucket that holds so many? (The counts are cumulative already.)",
    ),
    "5.3": Exercise(
        number_near(2 / (0.3 * 2000 * 3600) * 1e6, within=0.01),
        "You pay for every hour, so an idle GPU makes the tokens of the busy hours expensive.",
        "How many tokens does it make in an average hour? Divide the price of an hour by them.",
    ),
}
