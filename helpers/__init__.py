"""Prompting, streaming and serving a chat model with Jina and DocArray: the code behind the notebooks.

Importing this package is cheap: torch, transformers and jina come with the function that needs them.
"""

from __future__ import annotations

import importlib
from typing import Any

from . import errors

_HOME = {
    "serve": "service",
    "stream": "client",
    "ask": "client",
    "aask": "client",
    "info": "client",
    "Answer": "client",
    "Conversation": "client",
    "ChatBox": "chat_box",
}
__all__ = ["errors", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'helpers' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
