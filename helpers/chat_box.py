"""A chat in a notebook: a `Conversation` with a field to type into.

Knows widgets and conversations; no wire and no model. What a model says is text to it: Markdown is shown as
such, and nothing in it can run, load or be followed. Made of the widgets of ipywidgets 7.7 or 8. What those cannot
do (keys, the clipboard, scrolling) a script in the page does, ``chat_box.js``; where no script may run, the buttons
are enough.
"""

from __future__ import annotations

import contextlib
import contextvars
import html
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ipywidgets as widgets
from IPython.display import display
from markdown_it import MarkdownIt
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from traitlets import TraitError

from .client import ENDS, MAX_TOKENS, Answer, Conversation, Turn
from .errors import InvalidRequest, to_wire

_HERE = Path(__file__).parent
_SEND = "\x1e"  # what the script puts behind a text that is to be sent
_SECONDS_BETWEEN_DRAWINGS = 0.05


class ChatBox:
    """A chat with a service, shown by the cell that ends in it: ``helpers.ChatBox(service.conversation())``.

    `talk` is the conversation, and stays yours: what is said here is in ``talk.turns``, and what was said before is
    shown. `examples` are questions that a click asks, as long as nothing has been said.

    Enter sends, Shift+Enter begins a new line, Esc stops the answer. Answers come while the kernel is free for other
    cells. The notebook keeps the conversation as text too, which is shown where there is no kernel.

    Show the box again after a cell has changed the conversation, so that it shows that too; and after the page was
    loaded anew, so that the notebook keeps what follows.
    """

    def __init__(self, talk: Conversation, *, examples: Sequence[str] = ()) -> None:
        self.talk = talk
        self._id = uuid.uuid4().hex
        self._coming: Answer | None = None
        self._thread = threading.Thread()
        self._drawing = threading.Lock()
        self._drawn: dict[widgets.HTML, tuple[Turn, str]] = {}  # complete ones, and what the notebook keeps of them
        self._is_shown = False
        self._trouble = ""
        self._again: Callable[[], None] = self._regenerate
        self._unasked: tuple[str, Callable[[str], Answer]] | None = None  # a question that has come to nothing
        self._asks: Callable[[str], Answer] | None = None  # what is done with a question that is being edited
        self._draft = ""  # what had been typed before that

        self._log = _named("log", widgets.VBox())
        self._status = _named("status", widgets.HTML())
        self._text = _named("entry", widgets.Textarea(description="Message", continuous_update=False))
        self._text.placeholder = "Enter sends, Shift+Enter begins a new line, Esc stops the answer"
        self._text.observe(self._on_text, "value")
        self._send = _named("asks", self._button("Send", self._send_text, style="primary"))
        self._stop = _named("stop", self._button("Stop", self.stop, style="warning"))
        self._cancel = _named("cancel", self._button("Cancel", self._cancel_editing))
        self._repeat = _named("asks", self._button("Regenerate", lambda: self._again()))
        self._edit = self._button("Edit question", self._begin_editing)
        self._undo = self._button("Undo", self._take_back)
        asking = [_named("asks", self._button(text, lambda text=text: self.send(text))) for text in examples]
        self._examples = _named("row", widgets.HBox(asking))
        self._settings = self._fields()
        fields = _named("settings", widgets.VBox([*self._settings.values()]))
        fold_out = widgets.ToggleButton(description="Settings", tooltip="Settings")
        fold_out.observe(lambda change: _show(fields, change["new"]), "value")
        _show(fields, False)
        buttons = [self._send, self._stop, self._cancel, self._repeat, self._edit, self._undo, fold_out]
        head = widgets.HTML(_head(self._id))
        rows = [self._log, self._status, self._examples, self._text, _named("row", widgets.HBox(buttons)), fields]
        self._box = widgets.VBox([head, *rows])
        self._box.add_class("helpers-chat")

    def __repr__(self) -> str:
        return f"<ChatBox, turns: {len(self.talk.turns)}>"

    def _ipython_display_(self) -> None:
        self._is_shown = True
        self._draw_settings()
        self._draw()
        display(self._saved(), raw=True, display_id=self._id)
        view = {"model_id": self._box.model_id, "version_major": 2, "version_minor": 0}
        display({"text/plain": "(Run this cell to go on.)", "application/vnd.jupyter.widget-view+json": view}, raw=True)
        self._watch()

    def send(self, question: str) -> None:
        """Ask, as if it had been typed; returns at once. An answer that is still coming is stopped.

        Raises `InvalidRequest` for what is no text. Other failures are told in the box.
        """
        self._start(lambda: self.talk.stream(question))

    def stop(self) -> None:
        """Stop the answer that is coming, if there is one. What has come stays."""
        if coming := self._answer_coming():
            coming.stop()

    def wait(self) -> None:
        """Return once no answer is coming any more."""
        if self._thread.ident is not None:
            self._thread.join()

    def _answer_coming(self) -> Answer | None:
        """The one of this box, or else one that the conversation is being asked for elsewhere."""
        latest = self.talk.answer
        return self._coming or (latest if latest and latest.finish_reason is None else None)

    def _start(
        self,
        ask: Callable[[], Answer],
        take: Callable[[], None] = lambda: None,
        unasked: tuple[str, Callable[[str], Answer]] | None = None,
    ) -> None:
        """Ask, and show the answer; `take` what was typed out of the field. Where nothing comes, it was `unasked`."""
        self._again = retry = lambda: self._start(ask, unasked=unasked)
        answer = ask()  # which stops the one that is coming
        self.wait()
        self._coming = answer
        self._forget_trouble()
        self._draw()
        take()
        self._in_thread(self._read, answer, retry, unasked)
        while self._coming and not self._has(answer):  # a moment: until it is read, the question is in no turn
            time.sleep(0.001)
        self._draw_settings()
        self._draw()

    def _in_thread(self, work: Callable[..., None], *arguments: Any) -> None:
        # in the caller's context: by it a kernel knows where a message belongs
        run = contextvars.copy_context().run
        self._thread = threading.Thread(target=run, args=(work, *arguments), daemon=True)
        self._thread.start()

    def _has(self, answer: Answer) -> bool:
        return any(turn.answer is answer for turn in self.talk.turns)

    def _read(
        self, answer: Answer, retry: Callable[[], None], unasked: tuple[str, Callable[[str], Answer]] | None
    ) -> None:
        """The thread that an answer comes in."""
        trouble = ""
        try:
            drawn, took = 0.0, 0.0
            for _ in answer:
                began = time.monotonic()
                if began - drawn > max(_SECONDS_BETWEEN_DRAWINGS, 10 * took):  # long ones take long
                    self._draw()
                    drawn = time.monotonic()
                    took = drawn - began
        except Exception as error:
            trouble = to_wire(error)
        if not self._has(answer):  # else the turn itself tells what went wrong
            self._trouble, self._again, self._unasked = trouble, retry, unasked
        self._coming = None
        self._end()

    def _watch(self) -> None:
        """Show an answer that is read elsewhere, in another box or a cell, if one is coming."""
        if self._answer_coming() and not self._thread.is_alive():
            self._in_thread(self._end)

    def _end(self) -> None:
        """Show what is still coming elsewhere; and then the notebook is handed all words."""
        while self._answer_coming():
            self._draw()
            time.sleep(_SECONDS_BETWEEN_DRAWINGS)
        self._draw()
        if self._is_shown:
            display(self._saved(), raw=True, display_id=self._id, update=True)

    def _regenerate(self) -> None:
        self._start(self.talk.regenerate)

    def _on_text(self, change: dict[str, Any]) -> None:
        if change["new"].endswith(_SEND):
            self._text.value = change["new"].rstrip(_SEND)
            self._do(self._send_text)

    def _send_text(self) -> None:
        question, ask = self._text.value.strip(), self._asks or self.talk.stream
        if not question or self._answer_coming():
            return
        take = self._end_editing if self._asks else lambda: self._take(question)
        self._start(lambda: ask(question), take, (question, ask))

    def _take(self, question: str) -> None:
        if self._text.value.strip() == question:
            self._text.value = ""

    def _begin_editing(self) -> None:
        """Put a question into the field: one that has come to nothing, or else the latest."""
        turn = self.talk.turns[-1] if self._unasked is None else None
        question, self._asks = self._unasked or (turn.question, lambda question: self._edit_turn(turn, question))
        self._draft, self._text.value = self._text.value, question

    def _edit_turn(self, edited: Turn, question: str) -> Answer:
        for number, turn in enumerate(self.talk.turns):
            if turn is edited:
                return self.talk.edit(number, question)
        raise InvalidRequest("The question that was to be edited is no longer there. Cancel, and ask it as a new one.")

    def _end_editing(self) -> None:
        if self._asks:
            self._asks, self._text.value = None, self._draft

    def _cancel_editing(self) -> None:
        self._end_editing()
        self._forget_trouble()

    def _take_back(self) -> None:
        self.talk.undo()
        self._forget_trouble()

    def _forget_trouble(self) -> None:
        self._trouble, self._again, self._unasked = "", self._regenerate, None

    def _button(self, text: str, action: Callable[[], None], *, style: str = "") -> widgets.Button:
        button = widgets.Button(description=text, tooltip=text, button_style=style)
        button.on_click(lambda _: self._do(action))
        return button

    def _do(self, action: Callable[[], None]) -> None:
        """What a person has asked for; what is wrong with it is told in the box."""
        try:
            action()
        except Exception as error:
            self._trouble = to_wire(error)
        self._draw_settings()
        self._draw()
        self._watch()

    def _fields(self) -> dict[str, Any]:
        """Of the fold-out: what the next question is asked with."""
        fields = {
            "system": widgets.Textarea(description="System prompt", continuous_update=False),
            "temperature": widgets.BoundedFloatText(description="Temperature", min=0, max=2, step=0.1),
            "max_tokens": widgets.BoundedIntText(description="Max tokens", min=1, max=2**31 - 1),
        }
        for name, field in fields.items():
            field.observe(lambda change, name=name: self._set(name, change["new"]), "value")
        return fields

    def _setting(self, name: str) -> Any:
        if name == "system":
            return self.talk.system or ""
        return self.talk.options.get(name, {"temperature": 0, "max_tokens": MAX_TOKENS}[name])

    def _set(self, name: str, value: Any) -> None:
        if value != self._setting(name):
            if name == "system":
                self.talk.system = value or None
            else:
                self.talk.options[name] = value

    def _draw_settings(self) -> None:
        """Only where nobody can be changing them, and not what a field cannot show (it would take the nearest)."""
        for name, field in self._settings.items():
            value = self._setting(name)
            with contextlib.suppress(TraitError, TypeError):
                if name == "system" or field.min <= value <= field.max:
                    field.value = value

    def _draw(self) -> None:
        """Bring the other widgets in line with the conversation."""
        with self._drawing:
            turns, coming = self.talk.turns, self._answer_coming()
            pages = [*self._log.children[: len(turns)]]
            pages += [widgets.HTML() for _ in turns[len(pages) :]]
            for page, turn in zip(pages, turns):
                if self._drawn.get(page, (None, ""))[0] is not turn:
                    is_complete = turn.answer is not coming and turn.answer.finish_reason is not None
                    kept = _turn(turn)
                    page.value = kept + (_copy_button(turn) if is_complete else "")
                    self._drawn.pop(page, None)
                    if is_complete:
                        self._drawn[page] = turn, kept
            gone = self._log.children[len(turns) :]
            if len(pages) != len(self._log.children):
                self._log.children = pages
            for page in gone:
                self._drawn.pop(page, None)
                for widget in (page, page.layout, page.style):
                    widget.close()
            has_failed = bool(self._trouble or (turns and turns[-1].answer.error))
            self._repeat.description = self._repeat.tooltip = "Retry" if has_failed else "Regenerate"
            for widget, is_shown in (
                (self._send, not coming),
                (self._stop, coming),
                (self._cancel, self._asks and not coming),
                (self._repeat, (turns or self._trouble) and not coming),
                (self._edit, (turns or self._unasked) and not self._asks and not coming),
                (self._undo, turns and not self._asks and not coming),
                (self._examples, self._examples.children and not turns and not coming),
            ):
                _show(widget, is_shown)
            self._status.value = self._state()  # last: whoever reads that an answer is complete can ask the next one

    def _state(self) -> str:
        """In words, for eyes and for a screen reader."""
        if coming := self._answer_coming():
            return "Answering …" if coming.text else "Waiting for the first word …"
        said = f'<div class="helpers-chat-trouble">{html.escape(self._trouble)}</div>' if self._trouble else ""
        if self._asks:
            said += "A question is being edited: Enter sends it, Esc gives it up."
        elif not said:
            latest = self.talk.answer
            said = f"Answer {ENDS.get(latest.finish_reason or '', 'complete')}." if latest else "Nothing has been said yet."
        return said

    def _saved(self) -> dict[str, str]:
        """What the notebook keeps: shown where the box is not."""
        turns = self.talk.turns
        said = [f"You: {turn.question}\n\nModel: {turn.answer.text}\n{turn.answer.summary}" for turn in turns]
        known = {id(turn): page for turn, page in self._drawn.copy().values()}
        pages = "".join(known.get(id(turn)) or _turn(turn) for turn in turns) or "Nothing has been said yet."
        # or else JupyterLab shows what is between dollars as a formula, in which there may be a link
        names = f"helpers-chat-saved {_of(self._id)} mathjax_ignore tex2jax_ignore"
        # where the box cannot be shown, there is a line that says so, or that it is still coming
        style = _css() + f".jp-OutputArea-child:has(.{_of(self._id)}) + :not(:has(.helpers-chat)) {{ display: none; }}"
        return {
            "text/plain": "\n\n".join(said) or "Nothing has been said yet.",
            "text/html": f'<div class="{names}"><style>{style}</style><p>A chat, as it was saved; run this cell to go on.</p>{pages}</div>',
        }


def _named(name: str, widget: Any) -> Any:
    """The widget, for the style and the script by the class ``helpers-chat-NAME``."""
    widget.add_class(f"helpers-chat-{name}")
    return widget


def _show(widget: Any, is_shown: Any) -> None:
    widget.layout.display = None if is_shown else "none"


def _css() -> str:
    return (_HERE / "chat_box.css").read_text(encoding="utf-8")


def _of(box: str) -> str:
    """The class of what a notebook keeps of one box."""
    return f"helpers-chat-saved-{box}"


def _head(box: str) -> str:
    """The style of a box, which hides what the notebook keeps of it, and starts the script."""
    script = (_HERE / "chat_box.js").read_text(encoding="utf-8")
    return f'<style onload="{html.escape(script)}">{_css()} .{_of(box)} {{ display: none; }}</style>'


def _turn(turn: Turn) -> str:
    """HTML of a question and its answer."""
    answer = turn.answer
    return (
        '<div class="helpers-chat-turn" role="article"><div class="helpers-chat-question">'
        f'<span class="helpers-chat-who"><b>You:</b> </span>{html.escape(turn.question)}</div>'
        '<div class="helpers-chat-answer"><span class="helpers-chat-who"><b>Model:</b> </span>'
        f"{_MARKDOWN.render(answer.text)}</div>"
        + (f'<div class="helpers-chat-trouble" role="alert">{html.escape(answer.error)}</div>' if answer.error else "")
        + f'<div class="helpers-chat-note">{html.escape(answer.summary)}</div></div>'
    )


def _copy_button(turn: Turn) -> str:
    text = html.escape(turn.answer.text)
    return f'<button type="button" class="helpers-chat-copy" aria-label="Copy the answer" data-copy="{text}">Copy</button>' if text else ""


def _markdown() -> MarkdownIt:
    """What renders Markdown, and nothing else: HTML, links and pictures stay the text that they are written as.

    A line break is one. A line of dashes is no heading, which would turn the line above it into one as it comes.
    """
    inert = ["html_block", "html_inline", "link", "image", "autolink", "reference", "lheading"]
    options = {"html": False, "breaks": True, "maxNesting": 100, "highlight": _highlight}
    return MarkdownIt("commonmark", options).enable(["table", "strikethrough"]).disable(inert)


def _highlight(code: str, language: str, _: str) -> str:
    """HTML of a piece of code, or "" where it is to be shown as it is: some of Pygments' lexers take minutes
    for a text made for that, and hold up the whole kernel."""
    if language not in _LANGUAGES or len(code) > 2_000:
        return ""
    return highlight(code, get_lexer_by_name(language, stripnl=False), HtmlFormatter(nowrap=True))


_LANGUAGES = "bash c cpp css go html java javascript js json python py rust sh shell sql toml typescript yaml".split()
_MARKDOWN = _markdown()
