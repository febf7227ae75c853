"""Load a model and start its engine: all that an executor needs before it can answer.

This module imports torch when a model is loaded, so that a service can load its model while it imports Jina.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .options import EngineArgs

if TYPE_CHECKING:
    from .engine import Engine
    from .models import ChatModel


@dataclass(frozen=True)
class LoadedModel:
    """A model, and the engine that runs it. ``longest_token`` is the most characters that one token stands for."""

    chat_model: ChatModel
    engine: Engine
    longest_token: int


def load_model(model: str, precision: str, args: EngineArgs) -> LoadedModel:
    """Load `model` at `precision`, as `helpers.models.load` does, and start its engine. Raise what both raise."""
    from . import models, prompts

    chat_model = models.load(model, precision)
    from .engine import Engine  # not before: it imports torch, which takes as long as loading a small model

    engine = Engine(
        chat_model.model,
        eos_token_ids=chat_model.eos_token_ids,
        context_length=chat_model.context_length,
        args=args,
    )
    return LoadedModel(chat_model, engine, prompts.longest_token(chat_model.tokenizer))


def start_loading(model: str, precision: str, args: EngineArgs) -> Future[LoadedModel]:
    """Call `load_model` in a thread, and return its result as a future."""
    future: Future[LoadedModel] = Future()

    def run() -> None:
        try:
            future.set_result(load_model(model, precision, args))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="load-model", daemon=True).start()
    return future
