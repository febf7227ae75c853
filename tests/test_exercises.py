"""The exercises: right and wrong answers, hints that do not tell, and their cells in the notebooks."""

from __future__ import annotations

import codecs
import itertools
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from helpers import exercises
from helpers.errors import InvalidRequest

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"

# --- Answers to the exercises that ask for a function -----------------------------------------------


def remembers(messages: list[dict[str, str]], answer: str, question: str) -> list[dict[str, str]]:
    said = {"role": "assistant", "content": answer}
    return [*messages, said, {"role": "user", "content": question}]


def forgets_the_answer(messages: list[dict[str, str]], answer: str, question: str) -> list[dict[str, str]]:
    return [*messages, {"role": "user", "content": question}]


def changes_its_input(messages: list[dict[str, str]], answer: str, question: str) -> list[dict[str, str]]:
    messages += remembers([], answer, question)
    return messages


def pieces_of(tokens: list[bytes]) -> list[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    return [decoder.decode(token) for token in tokens]


def decodes_each_alone(tokens: list[bytes]) -> list[str]:
    return [token.decode(errors="replace") for token in tokens]


def drops_incomplete_characters(tokens: list[bytes]) -> list[str]:
    return [token.decode(errors="ignore") for token in tokens]


def waits_for_whole_tokens(tokens: list[bytes]) -> list[str]:
    """Hold a complete character back because the next one has begun in the same token."""
    held, pieces = b"", []
    for token in tokens:
        held += token
        try:
            pieces.append(held.decode())
            held = b""
        except UnicodeDecodeError:
            pieces.append("")
    return pieces


def dialog(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]


def turns_dropped(lengths: list[int], window: int, kept_free: int) -> int:
    return next(n for n in range(len(lengths) + 1) if sum(lengths[n:]) <= window - kept_free)


def drops_one_too_many(lengths: list[int], window: int, kept_free: int) -> int:
    return turns_dropped(lengths, window - 1, kept_free)


def counts_the_turns_that_stay(lengths: list[int], window: int, kept_free: int) -> int:
    return len(lengths) - turns_dropped(lengths, window, kept_free)


def forgets_the_answers_room(lengths: list[int], window: int, kept_free: int) -> int:
    return turns_dropped(lengths, window, 0)


def drops_the_longest(lengths: list[int], window: int, kept_free: int) -> int:
    left = sorted(lengths)
    while sum(left) > window - kept_free:
        left.pop()
    return len(lengths) - len(left)


def messages_of(turns: list[Any]) -> list[dict[str, str]]:
    return dialog(*(text for question, answer in turns if answer.text for text in (question, answer.text)))


def sends_empty_answers(turns: list[Any]) -> list[dict[str, str]]:
    return dialog(*(text for question, answer in turns for text in (question, answer.text)))


def sends_complete_answers_only(turns: list[Any]) -> list[dict[str, str]]:
    return messages_of([turn for turn in turns if turn.answer.finish_reason in ("stop", "length")])


def questions_that_ended(*ends: str) -> Any:
    def questions(path: Path) -> list[str]:
        saved = json.loads(path.read_text(encoding="utf-8"))
        asked = [message["content"] for message in saved["messages"] if message["role"] == "user"]
        return [
            question
            for question, answer in zip(asked, saved["answers"], strict=True)
            if answer["finish_reason"] in ends
        ]

    return questions


def takes_every_second_message(path: Path) -> list[str]:
    """Forget that the first message may be a system prompt."""
    saved = json.loads(path.read_text(encoding="utf-8"))
    ends = [answer["finish_reason"] in ("cancelled", "error") for answer in saved["answers"]]
    return [message["content"] for message, wanted in zip(saved["messages"][::2], ends, strict=False) if wanted]


def finds_empty_answers_only(path: Path) -> list[str]:
    messages = json.loads(path.read_text(encoding="utf-8"))["messages"]
    return [asked["content"] for asked, said in itertools.pairwise(messages) if not said["content"]]


def tokens_to_read(prompts: list[list[int]], *, earlier: int | None = None) -> list[int]:
    """Count the tokens after the longest prefix that one of the `earlier` prompts, by default all, has too."""
    counts = []
    for n, prompt in enumerate(prompts):
        others = prompts[0 if earlier is None else max(0, n - earlier) : n]
        shared = max((len(os.path.commonprefix([prompt, other])) for other in others), default=0)
        counts.append(len(prompt) - shared)
    return counts


def compares_with_the_latest_only(prompts: list[list[int]]) -> list[int]:
    return tokens_to_read(prompts, earlier=1)


def counts_tokens_that_occur_anywhere(prompts: list[list[int]]) -> list[int]:
    seen: set[int] = set()
    counts = []
    for prompt in prompts:
        counts.append(len([token for token in prompt if token not in seen]))
        seen |= {*prompt}
    return counts


def reads_stream(lines: list[str], *, end: str = "broken", prefix: str = "data: ") -> tuple[str, str]:
    """Return the text of a stream and how it ended: `end` if it just stops."""
    text = ""
    for line in lines:
        if line == "data: [DONE]":
            return text, "complete"
        if line.startswith(prefix) and line.strip():
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                return text, "error"
            text += chunk["choices"][0]["delta"].get("content", "")
    return text, end


def believes_a_stream_that_stops(lines: list[str]) -> tuple[str, str]:
    return reads_stream(lines, end="complete")


def searches_for_words(lines: list[str]) -> tuple[str, str]:
    """Take an answer with the text [DONE] or the word error for the end."""
    whole = "".join(lines)
    how = "complete" if "[DONE]" in whole else "error" if "error" in whole else "broken"
    return reads_stream(lines)[0], how


def percentile(buckets: dict[float, float], share: float) -> float:
    wanted = share * max(buckets.values())
    return next(bound for bound, count in buckets.items() if count >= wanted)


def skips_a_bucket_at_its_edge(buckets: dict[float, float], share: float) -> float:
    wanted = share * max(buckets.values())
    return next((bound for bound, count in buckets.items() if count > wanted), max(buckets))


def sums_cumulative_counts(buckets: dict[float, float], share: float) -> float:
    sums = dict(zip(buckets, itertools.accumulate(buckets.values()), strict=True))
    return percentile(sums, share)


RIGHT: dict[str, list[Any]] = {
    "1.1": [13_015_864_320 * 2 / 1e9, 26],
    "1.2": ["nf4", " NF4 "],
    "1.3": [819_200],
    "1.4": ["b", "B"],
    "1.5": [2.83, (2 * 4 * 2 * 4) ** 0.25],
    "2.1": [5],
    "2.2": [remembers],
    "2.3": [12],
    "2.4": ["b"],
    "2.5": [0.665, 0.67],
    "3.1": [6225, 50 * 100 + 50 * 49 / 2],
    "3.2": [149],
    "3.3": [pieces_of],
    "3.4": [4.5, 0.5 + 40 * 0.1],
    "3.5": [2.7, 4.0 - 1.3],
    "4.1": [
        dialog("What is the capital of France?", "Paris.", "And of Italy?"),
        dialog("Tell me something of France.", "Its Capital is Paris.", " And of Italy? "),
    ],
    "4.2": [turns_dropped],
    "4.3": [messages_of],
    "4.4": [questions_that_ended("cancelled", "error")],
    "4.5": [tokens_to_read],
    "5.1": [reads_stream],
    "5.2": [percentile],
    "5.3": [0.926, 2 / (600 * 3600) * 1e6],
}
WRONG: dict[str, list[Any]] = {
    "1.1": [13.0, 52.1, 26e9, "26 GB", None, True],
    "1.2": ["bf16", "int8", "fp32", "nf 4", 4],
    "1.3": [819_200 / 2, 819_199, 524_288, "819200"],
    "1.4": ["a", "c", "delete the cell", 2],
    "1.5": [3, 0.354, 0.375, 8 / 3, "2.83"],
    "2.1": [1, 6, 9, "5"],
    "2.2": [forgets_the_answer, changes_its_input, None],
    "2.3": [11, 13, 12.2, "12"],
    "2.4": ["a", "c", 1],
    "2.5": [2 / 3 + 0.01, 0.5, 66.5, "0.665"],
    "3.1": [5000, 149, 6224, "6225"],
    "3.2": [150, 100, 6225],
    "3.3": [decodes_each_alone, drops_incomplete_characters, waits_for_whole_tokens, lambda tokens: 1 / 0],
    "3.4": [4.0, 4.6, "4.5 s"],
    "3.5": [4.0, 1.3, 0.7, 2700, "2.7"],
    "4.1": [
        dialog("And of Italy?"),
        dialog("What is the capital of France?", "", "And of Italy?"),
        dialog("What do people eat in France?", "Cheese.", "And of Italy?"),
        dialog("Hello", "Hi.", "What is the capital of France?", "Paris.", "And of Italy?"),
        dialog("What is the capital of France?", "Paris.", "And of Spain?"),
        [*dialog("What is the capital of France?"), *dialog("And of Italy?")],
        [{"role": "system", "content": "It is about a capital."}, *dialog("And of Italy?")],
        "What is the capital of Italy?",
    ],
    "4.2": [drops_one_too_many, counts_the_turns_that_stay, forgets_the_answers_room, drops_the_longest, 2],
    "4.3": [sends_empty_answers, sends_complete_answers_only, lambda turns: [turn.question for turn in turns], None],
    "4.4": [
        questions_that_ended("cancelled"),
        questions_that_ended("error"),
        questions_that_ended("cancelled", "error", "length"),
        takes_every_second_message,
        finds_empty_answers_only,
        "talk.json",
    ],
    "4.5": [compares_with_the_latest_only, counts_tokens_that_occur_anywhere, lambda prompts: [*map(len, prompts)]],
    "5.1": [believes_a_stream_that_stops, searches_for_words, lambda lines: reads_stream(lines, prefix=""), "complete"],
    "5.2": [skips_a_bucket_at_its_edge, sums_cumulative_counts, lambda buckets, share: share * max(buckets), 0.5],
    "5.3": [0.28, 3.09, 0.926e-6, "0.93"],
}


def verdict(number: str, answer: Any, capsys: pytest.CaptureFixture[str]) -> str:
    """Return the line that is printed about an answer."""
    exercises.check(number, answer)
    (line,) = capsys.readouterr().out.splitlines()
    return line


def cases(answers: dict[str, list[Any]]) -> list[tuple[str, Any]]:
    return [(number, answer) for number, several in answers.items() for answer in several]


def test_each_exercise_has_right_and_wrong_answers_here() -> None:
    assert list(RIGHT) == list(WRONG) == list(exercises.EXERCISES)


@pytest.mark.parametrize(("number", "answer"), cases(RIGHT))
def test_a_right_answer_gets_a_reason(number: str, answer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert re.fullmatch(rf"{number}: right\. \w.+\.", verdict(number, answer, capsys))


@pytest.mark.parametrize(("number", "answer"), cases(WRONG))
def test_a_wrong_answer_gets_a_hint(number: str, answer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    hint = re.escape(exercises.EXERCISES[number].hint)
    assert re.fullmatch(rf"{number}: not yet\.( It raised \w+: .+\.)? Hint: {hint}", verdict(number, answer, capsys))


@pytest.mark.parametrize("number", exercises.EXERCISES)
def test_an_open_exercise_says_so(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert verdict(number, ..., capsys) == f"{number}: no answer yet. Replace the ... above."


@pytest.mark.parametrize(("number", "answer"), [case for case in cases(RIGHT) if not callable(case[1])])
def test_a_hint_does_not_contain_the_answer(number: str, answer: Any) -> None:
    hint = exercises.EXERCISES[number].hint
    assert not re.search(rf"\b{re.escape(str(answer).strip())}\b", hint, re.IGNORECASE)


def test_an_answer_that_raises_is_wrong_and_the_line_names_the_exception(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asks_for_a_function = exercises.Exercise(lambda answer: answer(2) == 4, "It is.", "Try it with 2.")
    monkeypatch.setitem(exercises.EXERCISES, "9.9", asks_for_a_function)
    line = verdict("9.9", lambda n: n["a\nb"], capsys)
    assert re.fullmatch(r"9\.9: not yet\. It raised TypeError: .+\. Hint: Try it with 2\.", line)
    assert verdict("9.9", lambda n: n * 2, capsys) == "9.9: right. It is."


def test_an_unknown_exercise_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"no exercise '7\.7'.*1\.1, 1\.2"):
        exercises.check("7.7", 1)


# --- In the notebooks -----------------------------------------------------------------------------


def checks(notebook: Path) -> dict[str, str]:
    """Return what the cell of each exercise has printed, in the notebook's order."""
    found: dict[str, str] = {}
    for cell in json.loads(notebook.read_text())["cells"]:
        for number in re.findall(r'exercises\.check\("([\d.]+)"', "".join(cell["source"])):
            assert number not in found, f"{number} has two cells"
            found[number] = "".join(text for output in cell["outputs"] for text in output["text"])
    return found


def lessons() -> list[Path]:
    return [path for path in sorted(NOTEBOOKS.glob("*.ipynb")) if checks(path)]


def test_every_exercise_is_in_its_lesson() -> None:
    for lesson in lessons():
        own = [number for number in exercises.EXERCISES if number.split(".")[0] == str(int(lesson.name[:2]))]
        assert list(checks(lesson)) == own
        assert len(own) >= 3
    assert sorted(number for lesson in lessons() for number in checks(lesson)) == sorted(exercises.EXERCISES)


@pytest.mark.parametrize("lesson", lessons(), ids=lambda path: path.stem)
def test_a_lesson_leaves_its_exercises_open_and_the_solutions_solve_them(lesson: Path) -> None:
    for number, printed in checks(lesson).items():
        assert printed.startswith(f"{number}: no answer yet.")
    solved = checks(NOTEBOOKS / "solutions" / lesson.name)
    assert list(solved) == list(checks(lesson))
    for number, printed in solved.items():
        assert printed.startswith(f"{number}: right.")
