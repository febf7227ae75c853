"""The widgets of a chat box, and how they react to a user and to an answer.

The box uses only widgets of ipywidgets 7.7 and 8, so it works alike on Colab and in JupyterLab 4, without a network.
`chat_box.js` adds keys, the clipboard and scrolling. Without that script, the buttons still work.

The style's ``onload`` starts the script. `anywidget` would start it too, but Colab then loads `anywidget` and another
widget manager from a CDN, and JupyterLab shows an error if it runs in a different environment from the kernel.
"""

from __future__ import annotations

import contextvars
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import ipywidgets as widgets
from IPython.display import display

from ..answer import FINISH_REASONS, Answer
from ..conversation import Conversation, Turn
from ..errors import HelpersError, InvalidRequest, to_wire
from . import page
from .settings import Settings
from .turn_list import TurnList

# What the script appends to a text: the action to take with it. One message carries both, because ipywidgets holds a
# text back while the kernel is busy, and a click would overtake it.
_SEND, _EDIT, _CANCEL = "\x1e", "\x1d", "\x1c"
_DRAW_INTERVAL = 0.05  # seconds


class _Attempt(NamedTuple):
    """A question, and the method that asks it: as the next one, or in place of an earlier one."""

    question: str
    ask: Callable[[str], Answer]


class ChatBox:
    """A chat with a service. A cell that ends in a chat box shows it.

    - `conversation`: holds the turns of the box. The box shows its earlier turns too.
    - `examples`: questions that a click asks, as long as there are no turns.
    - ``widget``: the box as an ipywidgets widget, for a layout of your own.

    Enter sends, Shift+Enter begins a new line, Esc stops the answer. The kernel stays free for other cells while an
    answer comes. The notebook stores the conversation as text, and shows that if there is no kernel.

    To see changes that other cells made in the conversation, show the box again. Do the same after a reload of the
    page, so that the notebook stores the new turns.
    """

    def __init__(self, conversation: Conversation, *, examples: Sequence[str] = ()) -> None:
        self.conversation = conversation
        self._id = uuid.uuid4().hex
        self._is_shown = False
        self._running: Answer | None = None  # the answer that this box reads
        self._thread = threading.Thread()  # reads that answer
        self._drawing = threading.Lock()
        self._error = ""
        self._retry: _Attempt | None = None  # the attempt that failed; None: regenerate the latest answer
        self._unanswered: _Attempt | None = None  # a question that ended without a turn
        self._edit: Callable[[str], Answer] | None = None  # asks the question that is being edited
        self._draft = ""  # the text in the entry before the edit
        self._make_widgets(examples)

    def __repr__(self) -> str:
        return f"<ChatBox, turns: {len(self.conversation.turns)}>"

    def _ipython_display_(self) -> None:
        self._is_shown = True
        self._settings.draw()
        self._draw()
        display(self._stored_copy(), raw=True, display_id=self._id)
        view = {"model_id": self.widget.model_id, "version_major": 2, "version_minor": 0}
        text = "(Run this cell to continue the chat.)"
        display({"text/plain": text, "application/vnd.jupyter.widget-view+json": view}, raw=True)
        self._follow()

    def send(self, question: str) -> None:
        """Ask `question`, as if the user had typed it, and return at once. Stop the answer that is running, if any.

        Raise `InvalidRequest` if the question or a setting cannot be sent. The box shows all later errors.
        """
        self._start(_Attempt(question, self.conversation.stream))

    def stop(self) -> None:
        """Stop the answer that is running, if any. Its text so far stays."""
        if running := self._running_answer():
            running.stop()

    def wait(self) -> None:
        """Return when no answer is running any more."""
        if self._thread.ident is not None:
            self._thread.join()

    # --- The widgets ---

    def _make_widgets(self, examples: Sequence[str]) -> None:
        self._turns = TurnList()
        self._status = _named("status", widgets.HTML())
        self._entry = _named("entry", widgets.Textarea(description="Message", continuous_update=False))
        self._entry.placeholder = "Enter sends, Shift+Enter begins a new line, Esc stops the answer"
        self._entry.observe(self._on_text, "value")
        self._send_button = _named("send", self._button("Send", self._send_text, style="primary"))
        self._stop_button = _named("stop", self._button("Stop", self.stop, style="warning"))
        self._cancel_button = _named("cancel", self._button("Cancel", self._cancel_editing))
        self._repeat_button = _named("asks", self._button("Regenerate", self._repeat))
        self._edit_button = _named("edit", self._button("Edit question", self._begin_editing))
        self._undo_button = self._button("Undo", self._undo)
        asking = [_named("asks", self._button(text, partial(self.send, text))) for text in examples]
        self._examples = _named("row", widgets.HBox(asking))
        self._settings = Settings(self.conversation)
        buttons = [
            self._send_button,
            self._stop_button,
            self._cancel_button,
            self._repeat_button,
            self._edit_button,
            self._undo_button,
            self._settings.toggle,
        ]
        self.widget = widgets.VBox(
            [
                widgets.HTML(page.head(self._id)),
                self._turns.box,
                self._status,
                self._examples,
                self._entry,
                _named("row", widgets.HBox(buttons)),
                self._settings.form,
            ]
        )
        self.widget.add_class("helpers-chat")

    def _button(self, text: str, action: Callable[[], None], *, style: str = "") -> widgets.Button:
        button = widgets.Button(description=text, tooltip=text, button_style=style)
        button.on_click(lambda _: self._do(action))
        return button

    def _do(self, action: Callable[[], None]) -> None:
        """Perform a user's action, and show its error in the box."""
        try:
            action()
        except Exception as error:
            self._error = _sentence(error)
        self._settings.draw()
        self._draw()
        self._follow()

    # --- Asking ---

    def _start(self, attempt: _Attempt | None, on_sent: Callable[[], None] = lambda: None) -> None:
        """Ask, or regenerate the latest answer if there is no `attempt`. Call `on_sent` unless that raises."""
        self._retry = attempt
        answer = attempt.ask(attempt.question) if attempt else self.conversation.regenerate()  # stops the running one
        self.wait()
        self._running = answer
        self._clear_error()
        self._draw()
        on_sent()
        self._run_in_thread(self._read, answer, attempt)
        while self._running and not self._has_turn(answer):  # the thread adds it at once
            time.sleep(0.001)
        self._settings.draw()
        self._draw()

    def _read(self, answer: Answer, attempt: _Attempt | None) -> None:
        """Read the answer, and show its text as it comes."""
        error, drawn, took = "", 0.0, 0.0
        try:
            for _ in answer:
                now = time.monotonic()
                if now - drawn > max(_DRAW_INTERVAL, 10 * took):  # a long answer takes long to draw
                    self._draw()
                    drawn = time.monotonic()
                    took = drawn - now
        except Exception as exception:
            error = _sentence(exception)
        if not self._has_turn(answer):  # otherwise the turn shows the error
            self._error, self._retry, self._unanswered = error, attempt, attempt
        self._running = None
        self._draw_to_the_end()

    def _running_answer(self) -> Answer | None:
        """Return the answer that this box, another box or a cell reads, or None."""
        latest = self.conversation.answer
        return self._running or (latest if latest and latest.finish_reason is None else None)

    def _follow(self) -> None:
        """Show an answer that another box or a cell reads, if any."""
        if self._running_answer() and not self._thread.is_alive():
            self._run_in_thread(self._draw_to_the_end)

    def _run_in_thread(self, work: Callable[..., None], *arguments: Any) -> None:
        # in the caller's context, which tells a kernel the cell that a message belongs to
        run = contextvars.copy_context().run
        self._thread = threading.Thread(target=run, args=(work, *arguments), daemon=True)
        self._thread.start()

    def _has_turn(self, answer: Answer) -> bool:
        return any(turn.answer is answer for turn in self.conversation.turns)

    def _clear_error(self) -> None:
        self._error, self._retry, self._unanswered = "", None, None

    # --- User actions ---

    def _on_text(self, change: dict[str, Any]) -> None:
        text: str = change["new"]
        actions = {_SEND: self._send_text, _EDIT: self._begin_editing, _CANCEL: self._cancel_editing}
        if action := actions.get(text[-1:]):
            self._entry.value = text[:-1]
            self._do(action)

    def _send_text(self) -> None:
        question = self._entry.value.strip()
        if not question or self._running_answer():
            return
        attempt = _Attempt(question, self._edit or self.conversation.stream)
        self._start(attempt, self._end_editing if self._edit else lambda: self._remove_from_entry(question))

    def _remove_from_entry(self, question: str) -> None:
        if self._entry.value.strip() == question:  # the user may have typed on
            self._entry.value = ""

    def _repeat(self) -> None:
        self._start(self._retry if self._error or self._unanswered else None)

    def _begin_editing(self) -> None:
        """Put the unanswered question, or else the latest one, into the entry."""
        if self._unanswered:
            question, self._edit = self._unanswered
        elif not self.conversation.turns:  # a cell has removed them
            raise InvalidRequest("There is no question left to edit. Ask another one.")
        else:
            turn = self.conversation.turns[-1]
            question, self._edit = turn.question, lambda question: self._ask_in_place_of(turn, question)
        self._draft, self._entry.value = self._entry.value, question

    def _ask_in_place_of(self, edited: Turn, question: str) -> Answer:
        for number, turn in enumerate(self.conversation.turns):
            if turn is edited:
                return self.conversation.edit(number, question)
        raise InvalidRequest("The question that you edit is no longer in the conversation. Cancel, and ask it again.")

    def _end_editing(self) -> None:
        if self._edit:
            self._edit, self._entry.value = None, self._draft

    def _cancel_editing(self) -> None:
        self._end_editing()
        self._clear_error()

    def _undo(self) -> None:
        self.conversation.undo()
        self._clear_error()

    # --- Drawing ---

    def _draw_to_the_end(self) -> None:
        """Show the answer that is running, if any, until it ends, and then update the notebook's copy."""
        while self._running_answer():
            self._draw()
            time.sleep(_DRAW_INTERVAL)
        self._draw()
        if self._is_shown:
            display(self._stored_copy(), raw=True, display_id=self._id, update=True)

    def _draw(self) -> None:
        """Update all widgets but the entry and the settings, which the user may be changing."""
        with self._drawing:
            turns, running = self.conversation.turns, self._running_answer()
            self._turns.draw(turns, running)
            has_failed = bool(self._error or (turns and turns[-1].answer.error))
            self._repeat_button.description = self._repeat_button.tooltip = "Retry" if has_failed else "Regenerate"
            is_idle, is_editing = not running, self._edit is not None
            for widget, is_visible in (
                (self._send_button, is_idle),
                (self._stop_button, running),
                (self._cancel_button, is_idle and is_editing),
                (self._repeat_button, is_idle and (turns or self._error)),
                (self._edit_button, is_idle and not is_editing and (turns or self._unanswered)),
                (self._undo_button, is_idle and not is_editing and turns),
                (self._examples, is_idle and not turns and self._examples.children),
            ):
                widget.layout.display = None if is_visible else "none"
            self._status.value = self._status_html()  # last, because "complete" invites the next question

    def _stored_copy(self) -> dict[str, str]:
        return page.stored_copy(self._id, self.conversation.turns, self._turns.html_of)

    def _status_html(self) -> str:
        """Return the state of the box as text, for sighted users and for screen readers."""
        if running := self._running_answer():
            return "Answering …" if running.text else "Waiting for the first word …"
        error = page.error_html(self._error) if self._error else ""
        if self._edit:
            return error + "You are editing a question: Enter sends it, Esc cancels."
        if error:
            return error
        if (latest := self.conversation.answer) is None:
            return page.EMPTY
        reason = latest.finish_reason or "stop"
        return f"Answer {FINISH_REASONS.get(reason, reason)}."


def _named(name: str, widget: Any) -> Any:
    """Add the class ``helpers-chat-NAME`` to the widget, for the style and the script, and return it."""
    widget.add_class(f"helpers-chat-{name}")
    return widget


def _sentence(error: Exception) -> str:
    """Return the message of an error. One that is no `HelpersError` comes from this program, so name its class."""
    return to_wire(error) if isinstance(error, HelpersError) else f"{type(error).__name__}: {error}"
