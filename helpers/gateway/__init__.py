"""OpenAI's HTTP API in front of a service: any OpenAI client can talk to the model.

The gateway is a client of the service, over gRPC, and knows nothing about the model. `create_app` returns it as an
ASGI app; ``python -m helpers gateway`` runs it. FastAPI is imported when `create_app` is looked up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .keys import Keys

if TYPE_CHECKING:
    from .app import create_app

__all__ = ["Keys", "create_app"]


def __getattr__(name: str) -> Any:
    if name != "create_app":
        raise AttributeError(f"module 'helpers.gateway' has no attribute {name!r}")
    from .app import create_app

    return create_app
