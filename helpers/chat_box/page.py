"""The HTML of a chat: a turn, the style and script of a box, and the copy that the notebook stores.

The text of a model is untrusted. Its Markdown is rendered, but HTML, links and images in it stay text, so nothing
in an answer can run, load or be followed. The first letter of a text decides its direction.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from pathlib import Path

from ..conversation import Turn
from .markdown import render_markdown

EMPTY = "Nothing has been said yet."

_FOLDER = Path(__file__).parent


def turn_html(turn: Turn) -> str:
    """Return a question, its answer, and below it the error, if any, and the summary."""
    answer = turn.answer
    error = error_html(answer.error, ' role="alert"') if answer.error else ""
    return (
        '<div class="helpers-chat-turn" role="article">'
        f'<div class="helpers-chat-question" dir="auto">{_speaker("You")}{html.escape(turn.question)}</div>'
        f'<div class="helpers-chat-answer">{_speaker("Model")}{render_markdown(answer.text)}</div>'
        f'{error}<div class="helpers-chat-summary">{html.escape(answer.summary)}</div></div>'
    )


def copy_button(turn: Turn) -> str:
    """Return a button that copies the answer, or "" if the answer is empty."""
    if not turn.answer.text:
        return ""
    text = html.escape(turn.answer.text)
    label = 'aria-label="Copy the answer"'
    return f'<button type="button" class="helpers-chat-copy" {label} data-copy="{text}">Copy</button>'


def error_html(error: str, attributes: str = "") -> str:
    """Return an error as HTML."""
    return f'<div class="helpers-chat-error" dir="auto"{attributes}>{html.escape(error)}</div>'


def head(box_id: str) -> str:
    """Return the style of a box, which hides the stored copy of that box and starts the script."""
    script = html.escape((_FOLDER / "chat_box.js").read_text(encoding="utf-8"))
    return f'<style onload="{script}">{_css()} .{_copy_class(box_id)} {{ display: none; }}</style>'


def stored_copy(box_id: str, turns: Sequence[Turn], html_of: Callable[[Turn], str] = turn_html) -> dict[str, str]:
    """Return the turns as text and as HTML, by MIME type. A notebook shows them if there is no kernel."""
    texts = [f"You: {turn.question}\n\nModel: {turn.answer.text}\n{turn.answer.summary}" for turn in turns]
    pages = "".join(map(html_of, turns)) or EMPTY
    # the last two keep JupyterLab from showing text between dollars as a formula, which may hold a link
    names = f"helpers-chat-stored {_copy_class(box_id)} mathjax_ignore tex2jax_ignore"
    # hides the message that the box cannot be shown, which follows the copy
    style = f"{_css()}.jp-OutputArea-child:has(.{_copy_class(box_id)}) + :not(:has(.helpers-chat)) {{ display: none; }}"
    note = "<p>A stored chat. Run this cell to continue it.</p>"
    return {
        "text/plain": "\n\n".join(texts) or EMPTY,
        "text/html": f'<div class="{names}"><style>{style}</style>{note}{pages}</div>',
    }


def _speaker(name: str) -> str:
    """Return who speaks, for screen readers only. Its own `dir` keeps it from deciding the text's."""
    return f'<span class="helpers-chat-speaker" dir="ltr"><b>{name}:</b> </span>'


def _css() -> str:
    return (_FOLDER / "chat_box.css").read_text(encoding="utf-8")


def _copy_class(box_id: str) -> str:
    return f"helpers-chat-stored-{box_id}"
