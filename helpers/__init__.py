"""Prompting, streaming and serving a chat model with Jina and DocArray: the code behind the notebooks.

Importing this package is cheap: torch, transformers and jina are imported by the functions that need them.
"""

from __future__ import annotations

import importlib
from typing import Any

from . import errors

_MODULES = {
    "serve": "service",
    "stream": "client",
    "ask": "client",
    "aask": "client",
    "info": "client",
    "Answer": "answer",
    "Conversation": "conversation",
    "ChatBox": "chat_box",
}
__all__ = ["errors", *_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'helpers' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
