"""The settings of a chat box: a form for the system prompt, the temperature and the length of an answer."""

from __future__ import annotations

import contextlib
from typing import Any

import ipywidgets as widgets
from traitlets import TraitError

from ..conversation import Conversation
from ..options import SamplingParams


class Settings:
    """A form that shows and changes the settings of a conversation, and the button that opens it."""

    def __init__(self, conversation: Conversation) -> None:
        self._conversation = conversation
        self._fields = {
            "system": widgets.Textarea(description="System prompt", continuous_update=False),
            "temperature": widgets.BoundedFloatText(description="Temperature", min=0, max=2, step=0.1),
            "max_tokens": widgets.BoundedIntText(description="Max tokens", min=1, max=2**31 - 1),
        }
        for name, field in self._fields.items():
            field.observe(lambda change, name=name: self._set(name, change["new"]), "value")
        self.form = widgets.VBox(list(self._fields.values()))
        self.form.add_class("helpers-chat-settings")
        self.form.layout.display = "none"
        self.toggle = widgets.ToggleButton(description="Settings", tooltip="Settings")
        self.toggle.observe(self._open_or_close, "value")

    def draw(self) -> None:
        """Show the conversation's settings, but not a value out of a field's range, which the field would change."""
        for name, field in self._fields.items():
            value = self._get(name)
            with contextlib.suppress(TraitError, TypeError):
                if name == "system" or field.min <= value <= field.max:
                    field.value = value

    def _get(self, name: str) -> Any:
        if name == "system":
            return self._conversation.system or ""
        return self._conversation.options.get(name, getattr(SamplingParams, name))

    def _set(self, name: str, value: Any) -> None:
        if value == self._get(name):
            return
        if name == "system":
            self._conversation.system = value or None
        else:
            self._conversation.options[name] = value

    def _open_or_close(self, change: dict[str, Any]) -> None:
        self.form.layout.display = None if change["new"] else "none"
