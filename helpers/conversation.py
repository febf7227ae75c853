"""A conversation: the client remembers the turns, because the model remembers nothing.

This module builds each request from the turns. The service decides whether a dialog is valid, and how much of it fits
into the context window.
"""

from __future__ import annotations

import errno
import json
import shutil
import tempfile
import threading
from collections.abc import Sequence
from functools import partial
from io import FileIO
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from .answer import FINISH_REASONS, Answer
from .client import build_request
from .errors import InvalidRequest, from_wire
from .fields import CountFields, OutputFields
from .messages import Message, check_history
from .options import HOST, check_port
from .transport import Call, Fields


class Turn(NamedTuple):
    """A question and its answer. ``answer.finish_reason`` tells how the answer ended."""

    question: str
    answer: Answer


class Window(NamedTuple):
    """The part of the context window that a conversation takes.

    - ``tokens``: the length of the prompt with the shortest possible next question, because a prompt always
      ends in a question. If it exceeds `size`, the service drops the oldest turns.
    - ``size``: the context length of the service.
    """

    tokens: int
    size: int

    @property
    def left(self) -> int:
        """Return how many tokens the next question and its answer may take before the oldest turn is dropped."""
        return max(0, self.size - self.tokens)


class Conversation:
    """A conversation with a service: each question is sent together with all earlier turns.

    `system` is the system prompt, or empty for none, and `options` are those of `helpers.client.stream`. Both may be
    changed between two questions. Raise `InvalidRequest` for a wrong value, and `TypeError` for an option that does not
    exist.

    ``turns`` holds the turns, oldest first. A turn is added when you begin to iterate over its answer. A stopped or
    failed answer keeps its text so far, and is sent with the next question unless that text is empty. With
    `keep_partial=False`, the answer and its question are dropped.

    A new question stops the answer that is still running. Threads may share a conversation.

    A copy, made with `copy` or `pickle`, has its own turns and options. If an answer is still running, the copy has the
    turns from before its question.
    """

    def __init__(self, system: str | None = None, *, keep_partial: bool = True, **options: Any) -> None:
        self.system = system
        self.keep_partial = keep_partial
        self.options = options
        self.turns: list[Turn] = []
        self._history: list[list[Turn]] = []  # `turns` before each change, for `undo`
        self._running: Turn | None = None  # the turn whose answer is being read
        self._lock = threading.RLock()
        self._chat_call(self.messages)  # refuses a wrong option now, not with the first question
        self.options = {name: value for name, value in options.items() if value is not None}

    def __repr__(self) -> str:
        return f"<Conversation, turns: {len(self.turns)}>"

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            state = {**vars(self), "options": dict(self.options), "_history": list(self._history), "_running": None}
            if self._running and self._running.answer.finish_reason is None:
                state["turns"] = state["_history"].pop()
        del state["_lock"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.RLock())

    @property
    def messages(self) -> list[Message]:
        """Return the dialog that is sent in front of the next question: the turns that have an answer."""
        return self._messages([turn for turn in self.turns if turn.answer.text])

    @property
    def answer(self) -> Answer | None:
        """Return the latest answer, with its usage and times, or None before the first question."""
        turns = self.turns
        return turns[-1].answer if turns else None

    @property
    def address(self) -> tuple[str, int]:
        """Return the host and the port of the service. Raise `InvalidRequest` if the port is not one."""
        host = self.options.get("host")
        return HOST if host is None else host, check_port(self.options.get("port"))

    def stream(self, question: str) -> Answer:
        """Return the answer to the next question. Iterating, with ``for`` or ``async for``, sends the question."""
        return self._next(question)

    def ask(self, question: str) -> str:
        """Return the text of the next answer when it is complete."""
        return "".join(self.stream(question))

    async def aask(self, question: str) -> str:
        """Return the text of the next answer when it is complete, in a program with an event loop."""
        return "".join([piece async for piece in self.stream(question)])

    def edit(self, turn: int, question: str) -> Answer:
        """Return the answer to `question` in place of ``turns[turn]``. All later turns are removed.

        `undo` brings them back. If the new answer fails or is stopped before its first word, nothing is replaced.
        Raise `InvalidRequest` if there is no such turn.
        """
        turns = self.turns
        if not -len(turns) <= turn < len(turns):
            raise InvalidRequest(f"There is no turn {turn}: the conversation has {len(turns)}. Count from 0.")
        return self._next(question, turns[: turn % len(turns)])

    def regenerate(self) -> Answer:
        """Return a new answer to the latest question, which replaces the old one as `edit` does.

        Raise `InvalidRequest` if there is no question yet.
        """
        turns = self.turns
        if not turns:
            raise InvalidRequest("Nothing has been asked yet. Ask a question first.")
        return self._next(turns[-1].question, turns[:-1])

    def undo(self) -> bool:
        """Undo the latest change: remove the latest turn, or bring back what an edited or regenerated one replaced.

        Return whether there was anything to undo.
        """
        with self._lock:
            if self._running:
                self._running.answer.stop()
                self._running = None
            if not self._history:
                return False
            self.turns = self._history.pop()
            return True

    def fork(self, turns: int | None = None) -> Conversation:
        """Return another conversation with the same turns, or with the first `turns` of them.

        An answer that is still running is left out.
        """
        other = Conversation(self.system, keep_partial=self.keep_partial, **self.options)
        other._set_turns([turn for turn in self.turns[:turns] if turn.answer.finish_reason])
        return other

    def window(self) -> Window:
        """Return how much of the context window the conversation takes, as the service counts it.

        Raise `ServiceUnavailable` if no service answers, `QueueFull` if its queue is full, and `InvalidRequest` for
        a system prompt that it refuses.
        """
        shortest_question: Message = {"role": "user", "content": "?"}
        count = self._call("/count", [*self.messages, shortest_question], CountFields).document()
        if count.error:
            raise from_wire(count.error)
        return Window(count.prompt_tokens, count.context_length)

    def save(self, path: str | Path) -> None:
        """Write all turns to a JSON file, as ``{"messages": [...], "answers": [...]}``.

        The messages are in OpenAI's format, which other tools read. A question without an answer is followed by an
        empty answer. ``answers`` says how each turn ended: its `finish_reason` and its `error`.

        An existing file is replaced when the new one is complete, and keeps its permissions. If it cannot be replaced,
        because it is a mount point or its folder is not writable, it is overwritten, and restored if that fails.

        Raise `OSError` if the file cannot be written, and `UnicodeEncodeError` for a system prompt that is not valid
        Unicode.
        """
        turns = self.turns
        answers = [{"finish_reason": answer.finish_reason or "cancelled", "error": answer.error} for _, answer in turns]
        saved = {"messages": self._messages(turns), "answers": answers}
        content = (json.dumps(saved, ensure_ascii=False, indent=2) + "\n").encode()
        path = Path(path).resolve()  # replaces the file that a link points to, not the link
        if path.exists() and not path.is_file():  # such as /dev/null
            raise FileExistsError(errno.EEXIST, "exists, and is not a file", str(path))
        try:
            _write(path, content)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error  # names the file, not the temporary one

    @classmethod
    def load(cls, path: str | Path, **options: Any) -> Conversation:
        """Return the conversation in a JSON file that `save` or another tool wrote.

        The file holds a list of messages, or a dict with one as ``"messages"``. `options` are those of a new
        conversation. Raise `OSError` if the file cannot be read, and `InvalidRequest` if it holds no conversation.
        """
        try:
            saved = json.loads(Path(path).read_bytes())  # detects the encoding: Windows tools also write UTF-16
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"{path} is not a JSON file ({error}). Choose a saved conversation.") from None
        saved = saved if isinstance(saved, dict) else {"messages": saved}
        try:
            messages = check_history(saved.get("messages"))
        except InvalidRequest as error:
            raise InvalidRequest(f"{path} does not hold a conversation. {error}") from None
        system = messages.pop(0)["content"] if messages and messages[0]["role"] == "system" else None
        conversation = cls(system, **options)
        conversation._set_turns(_turns(messages, saved.get("answers")))
        return conversation

    def _messages(self, turns: Sequence[Turn]) -> list[Message]:
        messages: list[Message] = []
        if self.system is not None and str(self.system).strip():
            messages.append({"role": "system", "content": self.system})
        for question, answer in turns:
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer.text})
        return messages

    def _call(self, endpoint: str, messages: Sequence[Message], reply_type: type[Fields]) -> Call[Fields]:
        """Return a request with these messages. Raise `InvalidRequest` if it cannot be sent."""
        sampling = {name: value for name, value in self.options.items() if name not in ("host", "port")}
        return Call(endpoint, build_request(messages, **sampling), reply_type, *self.address)

    def _chat_call(self, messages: Sequence[Message]) -> Call[OutputFields]:
        return self._call("/chat", messages, OutputFields)

    def _set_turns(self, turns: list[Turn]) -> None:
        """Set `turns`, with a history as if their questions had been asked one by one."""
        self.turns = turns
        self._history = [turns[:number] for number in range(len(turns))]

    def _next(self, question: str, kept: list[Turn] | None = None) -> Answer:
        """Return the answer to `question` after the turns `kept`, by default all of them."""
        message: Message = {"role": "user", "content": question}
        self._chat_call([*self._messages([]), message])  # a question that cannot be sent must not stop a running answer
        with self._lock:
            if self._running:
                self._running.answer.stop()
                self._settle(self._running.answer)
            before = self.turns
        kept = before if kept is None else kept
        call = self._chat_call([*self._messages([turn for turn in kept if turn.answer.text]), message])
        return Answer(call, on_start=partial(self._add, question, kept, before), on_end=self._settle)

    def _add(self, question: str, kept: list[Turn], before: list[Turn], answer: Answer) -> None:
        """Add a turn after `kept` when its answer begins. `before` are all turns at the time of the question."""
        with self._lock:
            if self.turns is not before:
                raise RuntimeError("The conversation has changed since this question was asked. Ask it again.")
            self._history.append(before)
            self._running = Turn(question, answer)
            self.turns = [*kept, self._running]

    def _settle(self, answer: Answer) -> None:
        """Keep or remove the turn of `answer`, which has ended."""
        with self._lock:
            if self._running is None or self._running.answer is not answer:
                return
            self._running = None
            if answer.finish_reason in ("cancelled", "error"):
                has_replaced = len(self._history[-1]) >= len(self.turns)
                if not self.keep_partial or (has_replaced and not answer.text):
                    self.turns = self._history.pop()


_IRREPLACEABLE = (errno.EACCES, errno.EBUSY, errno.EPERM, errno.EROFS, errno.EXDEV)
"""The errors for a file that is a mount point, or whose folder is not writable."""


def _write(path: Path, content: bytes) -> None:
    """Replace the file, or overwrite it if it cannot be replaced."""
    try:
        with tempfile.TemporaryDirectory(prefix=".", dir=path.parent) as folder:
            new = Path(folder, path.name)
            new.write_bytes(content)
            if path.exists():
                shutil.copymode(path, new)
            new.replace(path)
    except OSError as error:
        if error.errno not in _IRREPLACEABLE or not path.is_file():
            raise
        _overwrite(path, content)


def _overwrite(path: Path, content: bytes) -> None:
    """Write `content` into an existing file. If that fails, write its old content back."""
    with path.open("r+b", buffering=0) as file:
        old = file.read()
        try:
            _write_into(file, content)
        except BaseException:
            try:
                _write_into(file, old)
            except OSError as error:
                damage = f"{error.strerror}. The old file is damaged. Save the conversation in another one"
                raise OSError(error.errno, damage) from error
            raise


def _write_into(file: FileIO, content: bytes) -> None:
    file.seek(0)
    left = memoryview(content)
    while left:
        left = left[file.write(left) :]
    file.truncate()


def _turns(messages: Sequence[Message], answers: object) -> list[Turn]:
    """Return the turns of a file. `answers` may be of any form, because other tools write files too."""
    texts = [message["content"] for message in messages]
    ends = answers if isinstance(answers, list) else []
    turns = []
    for question, text, end in zip_longest(texts[::2], texts[1::2], ends[: (len(texts) + 1) // 2]):
        finish_reason, error = "cancelled" if text is None else "stop", None
        if isinstance(end, dict) and end.get("finish_reason") in list(FINISH_REASONS):  # may not be hashable
            finish_reason = end["finish_reason"]
            error = str(end["error"]).encode("utf-8", "replace").decode() if end.get("error") else None
        turns.append(Turn(question, Answer.ended(text or "", finish_reason, error)))
    return turns
