"""The capstone of lesson 3: run the learner's own service, and say which of the six faults it still has.

The learner's file runs for real, in a process of its own, with the tiny model of `helpers.capstone_runner`, which is
watched. No verdict depends on how fast the machine is: times are only limits for a service that never answers.
"""

from __future__ import annotations

import itertools
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from . import capstone_runner as runner
from .bundled import llama_tokenizer
from .errors import HelpersError, InvalidRequest, ServiceUnavailable
from .options import HOST
from .processes import port_to_listen_on
from .progress import progress
from .service import serve_script
from .transport import Call, is_ready

LIMIT = 60.0
"""Seconds until a service that does not start, or an answer that does not end, counts as hung."""

ASK, COUNT, BREAK = "What can you do for me?", "Please count:", "Tell me a story."
ANSWER, NUMBERS, BROKEN = "I am here to help you 🦙!", "one two three four five six seven eight", "It goes well until"
"""What the tiny model says after each of the three prompts. It repeats the numbers, and fails after `BROKEN`."""
LONG = 300
"""`max_tokens` of the answer whose client leaves."""


class _Prompt(BaseModel):
    prompt: str
    max_tokens: int


class _Output(BaseModel):
    token_id: Any = None
    generated_text: Any = None
    finish_reason: Any = None
    error: Any = None


@dataclass(frozen=True)
class _Verdict:
    is_found: bool
    seen: str


def check(path: str | Path) -> None:
    """Run the service in the file `path`, and print one line for each fault: whether it is still there.

    The file is a script such as the article's: ``python article_service.py MODEL`` deploys an Executor with the
    endpoint ``/stream``. If it does not start, print why. Nothing of it runs any more afterwards.
    """
    with tempfile.TemporaryDirectory(prefix="capstone-") as folder:
        try:
            verdicts = _verdicts(Path(path), Path(folder))
        except HelpersError as error:
            print(f"{path} cannot be checked. {error}")
            return
    for number, (name, (_, hint)) in enumerate(FAULTS.items(), 1):
        found = verdicts[name].is_found
        print(f"{number} {name}: {'found' if found else 'repaired'}. {verdicts[name].seen}", end="")
        print(f" Hint: {hint}" if found else "")
    left = [name for name in FAULTS if verdicts[name].is_found]
    print(f"Still to repair: {', '.join(left)}." if left else "Nothing is left to repair.")


def _verdicts(path: Path, folder: Path) -> dict[str, _Verdict]:
    """Return the verdict on each fault. Raise `HelpersError` if the service does not start."""
    if not path.is_file():
        raise InvalidRequest("There is no such file. Write it in the lesson, or name another.")
    tokenizer = llama_tokenizer()

    def tokens(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    answer, numbers, broken = (
        [tokens(prompt)[-1], *tokens(text)] for prompt, text in ((ASK, ANSWER), (COUNT, NUMBERS), (BREAK, BROKEN))
    )
    chains = [[*answer, tokenizer.eos_token_id], [*numbers, numbers[1]], broken]
    following = {token: after for chain in chains for token, after in itertools.pairwise(chain)}
    runner.write_model(folder, tokenizer, following)
    port, script = port_to_listen_on(HOST, 0), folder / "watched_service.py"
    settings = {"script": str(path.resolve()), "folder": str(folder), "port": port, "limit": LIMIT}
    runner.write_script(script, **settings, fails=broken[-1], holds=numbers[4])
    try:
        service = serve_script(script, str(folder), port=port)
    except HelpersError as error:
        raise ServiceUnavailable(
            f"It does not start. {' '.join(runner.read_lines(folder, runner.ERRORS)[:1]) or error}"
        ) from None
    with service, progress(f"Checking {path.name}"):
        stage = _Stage(folder, port, tokenizer, set(numbers))
        trial = stage.ask(ASK)
        if trial.is_hung or not trial.text:
            seen = [trial.end, trial.error, *runner.read_lines(folder, runner.ERRORS)[:1]]
            raise ServiceUnavailable(
                f"It starts, but a request to /stream gets no answer. {' '.join(filter(None, seen))}"
            )
        # error comes last, because a model that has failed may never answer again
        verdicts = {name: FAULTS[name][0](stage) for name in sorted(FAULTS, key="error".__eq__)}
    if runner.NO_BLOCK in runner.read_lines(folder, runner.ERRORS):
        raise ServiceUnavailable(runner.NO_BLOCK)
    return verdicts


class _Stream(threading.Thread):
    """A client that reads one answer in a thread. `end` says how the stream ended, "" if it ended by itself."""

    def __init__(self, port: int, prompt: str, max_tokens: int) -> None:
        super().__init__(daemon=True)
        self.call = Call("/stream", _Prompt(prompt=prompt, max_tokens=max_tokens), _Output, HOST, port)
        self.documents: list[_Output] = []
        self.end = ""
        self.is_hung = False
        self.start()

    def run(self) -> None:
        try:
            for document in self.call.documents():
                self.documents.append(document)
        except HelpersError as error:
            cause: Any = error.__cause__
            reason = cause.details() if hasattr(cause, "details") else cause or error
            self.end = self.end or f"The client got an exception: {' '.join(str(reason).split())[:200]}."

    def finish(self) -> _Stream:
        """Wait for the end of the answer, up to `LIMIT` seconds."""
        self.join(LIMIT)
        if self.is_alive():
            self.is_hung = True
            self.leave(f"The answer did not end within {LIMIT:.0f} seconds.")
        return self

    def leave(self, why: str) -> None:
        """Leave before the end of the answer."""
        self.end = why
        self.call.cancel()
        self.join()

    @property
    def text(self) -> str:
        return "".join(str(document.generated_text or "") for document in self.documents)

    @property
    def finish_reason(self) -> str:
        return str(self.documents[-1].finish_reason or "") if self.documents else ""

    @property
    def error(self) -> str:
        return str(self.documents[-1].error or "") if self.documents else ""


class _Stage:
    """The running service, and what its model did."""

    def __init__(self, folder: Path, port: int, tokenizer: Any, numbers: set[int]) -> None:
        self.folder, self.port, self.tokenizer, self.numbers = folder, port, tokenizer, numbers
        self.seen = 0
        self.is_blocked = False
        """Whether the service can do nothing else while its model computes. `_clients` finds it out."""

    def ask(self, prompt: str, max_tokens: int = 40) -> _Stream:
        """Return the whole answer. `runs` then returns the model's runs for it."""
        self.seen = len(runner.read_runs(self.folder))
        return _Stream(self.port, prompt, max_tokens).finish()

    def runs(self) -> list[runner.Run]:
        return runner.read_runs(self.folder)[self.seen :]

    def requests(self, which: str) -> int:
        """Return how many requests began, or ended."""
        return runner.read_lines(self.folder, runner.REQUESTS).count(which)

    def steps(self) -> int:
        """Return how often the model ran to make a number."""
        return sum(not self.numbers.isdisjoint(run.last) for run in self.runs())

    @contextmanager
    def counting(self, max_tokens: int) -> Iterator[_Stream]:
        """Ask for numbers, and hold the model in the middle of the answer until the block ends."""
        self.seen = len(runner.read_runs(self.folder))
        hold, held = self.folder / runner.HOLD, self.folder / runner.HELD
        held.unlink(missing_ok=True)
        hold.touch()
        try:
            stream = _Stream(self.port, COUNT, max_tokens)
            _wait_until(lambda: held.exists() or not stream.is_alive())
            yield stream
            hold.unlink()
            stream.finish()
        finally:
            hold.unlink(missing_ok=True)


def _wait_until(condition: Callable[[], Any], seconds: float | None = None) -> bool:
    """Return whether `condition` was met within some seconds, by default `LIMIT`."""
    end = time.monotonic() + (LIMIT if seconds is None else seconds)
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def _letters(text: str) -> str:
    """Return the letters of `text`, which fault 2 leaves as they are."""
    return "".join(filter(str.isalpha, text))


def _cost(stage: _Stage) -> _Verdict:
    made = 16
    stream = stage.ask(COUNT, made)
    prompt, runs = len(stage.tokenizer.encode(COUNT)), stage.runs()
    needed, read = prompt + made - 1, sum(len(run.ids) for run in runs)
    seen = f"For {made} tokens after a prompt of {prompt}, the model read {read} tokens."
    if stream.end or not runs:
        return _Verdict(True, stream.end or "The model did not run.")
    if read > needed + 4:  # one step too many, or a second BOS, is not this fault
        return _Verdict(True, f"{seen} With a KV cache it reads {needed}.")
    known = runs[-1].cache + len(runs[-1].ids)
    if abs(known - needed) > 4:
        return _Verdict(True, f"{seen} But its last step saw a context of {known} tokens instead of {needed}.")
    return _Verdict(False, seen)


def _text(stage: _Stage) -> _Verdict:
    stream = stage.ask(ASK)
    is_right = not stream.end and stream.text.lstrip(" ") == ANSWER
    said = f"The model said {ANSWER!r}, and the client read {stream.text!r}."
    return _Verdict(not is_right, stream.end or said)


def _clients(stage: _Stage) -> _Verdict:
    with stage.counting(16) as first:
        stage.is_blocked = any(run.on_event_loop for run in stage.runs())
        if stage.is_blocked:
            return _Verdict(True, "The model runs on the event loop: while it computes, nothing else is answered.")
        stage.is_blocked = not _wait_until(lambda: is_ready(HOST, stage.port), LIMIT / 4)
        if stage.is_blocked:
            return _Verdict(True, "While the model computed for one client, the service did not answer another.")
        if not _wait_until(lambda: first.text or not first.is_alive(), LIMIT / 4) or not first.is_alive():
            return _Verdict(True, first.end or "Four tokens were made, and no text had been sent.")
        before = stage.requests(runner.BEGAN)
        second = _Stream(stage.port, ASK, 40)
        _wait_until(lambda: stage.requests(runner.BEGAN) > before)
    for stream, right in ((first, f"{NUMBERS} {NUMBERS}"), (second.finish(), ANSWER)):
        if stream.end or _letters(stream.text) != _letters(right):
            seen = f"Of two clients at once, one should read {right!r}. It read {stream.text!r}. {stream.end}"
            return _Verdict(True, seen.rstrip())
    return _Verdict(False, "While the model computed, the service answered. Two clients each got their own answer.")


def _error(stage: _Stage) -> _Verdict:
    stream = stage.ask(BREAK)
    seen = f"The model failed after {BROKEN!r}, and the client read {stream.text!r}"
    if stream.is_hung or not _letters(BROKEN).startswith(_letters(stream.text)):
        return _Verdict(True, f"{seen}. {stream.end}".rstrip())
    if not stream.end and not (stream.finish_reason == "error" and stream.error):
        return _Verdict(
            True, f"{seen}. The last document has finish_reason {stream.finish_reason!r}, error {stream.error!r}."
        )
    for prompt, right in ((ASK, "stop"), (COUNT, "length")):
        after = stage.ask(prompt, 16)
        if after.end or after.finish_reason != right:
            other = f"The next answer should end with finish_reason {right!r}. It ended with {after.finish_reason!r}."
            return _Verdict(True, after.end or other)
    return _Verdict(False, f"{seen} and " + ("an exception." if stream.end else f"the error {stream.error!r}."))


def _bos(stage: _Stage) -> _Verdict:
    bos, seen = stage.tokenizer.bos_token, []
    for prompt in (f"{bos}[INST] {COUNT}", f"\n{bos}[INST] {COUNT}", COUNT):  # the second as in the article
        stage.ask(prompt, 1)
        seen.append(sum(run.ids.count(stage.tokenizer.bos_token_id) for run in stage.runs()))
    kinds = (f"that begins with {bos}", f"with a line break before {bos}", f"without {bos}")
    counted = ", ".join(f"{kind} with {count} BOS" for kind, count in zip(kinds, seen, strict=True))
    return _Verdict(seen != [1, 1, 1], f"The model read a prompt {counted}.")


def _leaving(stage: _Stage) -> _Verdict:
    if stage.is_blocked:
        return _Verdict(True, "While the model computes, nothing tells the service that its client left: fault 3.")
    for _ in range(4):  # Jina's gateway loses a cancellation now and then
        with stage.counting(LONG) as stream:
            stream.leave("")
            if _wait_until(lambda: stage.requests(runner.ENDED) >= stage.requests(runner.BEGAN), LIMIT / 6):
                break
    steps, before = stage.steps(), -1
    while before < steps < LONG:  # the model still ran for the client that left
        before = steps
        if _Stream(stage.port, ASK, 8).finish().is_hung:
            break
        steps = stage.steps()
    if not 0 < steps < LONG // 2:
        return _Verdict(True, f"The client left in step 5, and the model made {steps} steps for it.")
    return _Verdict(False, f"The client left in step 5, and the steps stopped long before {LONG}.")


FAULTS: dict[str, tuple[Callable[[_Stage], _Verdict], str]] = {
    "cost": (_cost, "Pass only the newest token to the model, with the past_key_values of the step before."),
    "text": (
        _text,
        "Decode the ids so far, not one alone. Send what is new, and hold back a character whose bytes are incomplete.",
    ),
    "clients": (
        _clients,
        "Run the model in a thread, await it, send each piece at once, and keep the state of each request apart.",
    ),
    "error": (
        _error,
        "Catch what the model raises, and say in the last document how the answer ended: stop, length, or error.",
    ),
    "BOS": (
        _bos,
        "Let the tokenizer add BOS (add_special_tokens) only if the prompt does not begin with it. Apply lstrip() "
        "first, because the article's prompt begins with a line break.",
    ),
    "leaving": (
        _leaving,
        "Jina closes the generator when its client leaves: end the model's loop there, in a finally.",
    ),
}
"""Each fault, in the lesson's order: its judge and its hint."""
