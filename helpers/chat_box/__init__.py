"""A chat in a notebook: ``helpers.ChatBox(service.conversation())``."""

from .widget import ChatBox

__all__ = ["ChatBox"]
