"""The turns of a conversation on screen."""

from __future__ import annotations

from collections.abc import Sequence

import ipywidgets as widgets

from ..answer import Answer
from ..conversation import Turn
from .page import copy_button, turn_html


class TurnList:
    """One HTML widget for each turn, in `box`."""

    def __init__(self) -> None:
        self.box = widgets.VBox()
        self.box.add_class("helpers-chat-log")
        self._complete: dict[widgets.HTML, tuple[Turn, str]] = {}  # with their HTML, which is not rendered again

    def draw(self, turns: Sequence[Turn], running: Answer | None) -> None:
        """Show `turns`. An answer can be copied when it is complete, so not while it is the `running` one."""
        pages = list(self.box.children[: len(turns)])
        pages += [widgets.HTML() for _ in turns[len(pages) :]]
        for page, turn in zip(pages, turns, strict=True):
            if page in self._complete and self._complete[page][0] is turn:
                continue
            is_complete = turn.answer is not running and turn.answer.finish_reason is not None
            html = turn_html(turn)
            page.value = html + (copy_button(turn) if is_complete else "")
            if is_complete:
                self._complete[page] = turn, html
            else:
                self._complete.pop(page, None)
        surplus = self.box.children[len(turns) :]
        if len(pages) != len(self.box.children):
            self.box.children = pages
        for page in surplus:
            self._complete.pop(page, None)
            for widget in (page, page.layout, page.style):
                widget.close()

    def html_of(self, turn: Turn) -> str:
        """Return `page.turn_html` of a turn, from the last drawing if its answer was complete then."""
        drawn = (html for other, html in self._complete.copy().values() if other is turn)
        return next(drawn, None) or turn_html(turn)
