"""Put a gateway together."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Depends, FastAPI
from fastapi.security import HTTPBearer
from starlette.middleware.cors import CORSMiddleware

from ..errors import InvalidRequest
from ..options import HOST, PORT
from . import chat, completions, page, responses, status
from .backend import Backend
from .errors import handle_errors
from .hosts import CheckHost
from .keys import Keys
from .openai_services import OpenAIServices
from .records import RecordRequests
from .services import Services
from .settings import KEEP_ALIVE, MAX_BODY, Settings

_DESCRIPTION = "OpenAI's API for one chat model. Fields that are not supported are refused by name."


def create_app(
    service: str | Sequence[str] = f"{HOST}:{PORT}",
    *,
    service_model: str | None = None,
    keys: Keys | Iterable[str] = (),
    cors: Sequence[str] = (),
    allowed_hosts: Sequence[str] | None = None,
    max_body: int = MAX_BODY,
    keep_alive: float = KEEP_ALIVE,
) -> FastAPI:
    """Return OpenAI's API for the service at ``HOST:PORT``, as an ASGI app. It may be mounted in another app.

    Several services that run the same model share the requests. Give their IP addresses, or one name for all of them.
    A URL such as ``http://127.0.0.1:8001/v1`` is another server with OpenAI's API; there may be several of these too.

    - `service_model`: the id of the model to use, for servers with OpenAI's API that list several.
    - `keys`: the API keys, as `Keys` reads them. Without any, every request may pass.
    - `cors`: the origins, such as ``https://chat.example.org``, whose pages may call the gateway from a browser.
    - `allowed_hosts`: requests must name one of these hosts, or this machine (localhost, 127.0.0.1, ::1), in their
      header ``Host``. None allows every host.
    - `max_body`: the maximum number of bytes in a request's body.
    - `keep_alive`: the seconds after which a silent stream sends a comment.

    The service need not run yet: until one answers, requests get status 503. Raise `InvalidRequest` for an address or
    a host that is not one, for keys that `Keys` refuses, for a `keep_alive` that is not positive, and if OpenAI's
    package is needed and not installed.
    """
    if keep_alive <= 0:
        raise InvalidRequest(f"keep_alive is {keep_alive}. Choose more than 0 seconds.")
    settings = Settings(
        backend=Backend(_services([service] if isinstance(service, str) else service, service_model)),
        keys=keys if isinstance(keys, Keys) else Keys(keys),
        max_body=max_body,
        keep_alive=keep_alive,
    )
    # no pages of documentation: they load scripts from another site
    app = _Gateway(title="Chat gateway", description=_DESCRIPTION, docs_url=None, redoc_url=None, lifespan=_lifespan)
    app.state.gateway = settings
    shows_keys = [Depends(HTTPBearer(auto_error=False, description="An API key, if the gateway has keys."))]
    for router in (chat.router, completions.router, responses.router, status.router):
        app.include_router(router, dependencies=shows_keys)
    app.include_router(status.open_router)
    app.include_router(page.router)
    handle_errors(app)
    if allowed_hosts is not None:
        app.add_middleware(CheckHost, hosts=allowed_hosts)
    app.add_middleware(RecordRequests, metrics=settings.metrics)
    if cors:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(cors),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Close the connections to the services when the server ends. Starlette does not do this for a mounted app."""
    try:
        yield
    finally:
        await app.state.gateway.backend.services.close()


def _services(addresses: Sequence[str], model: str | None) -> Services | OpenAIServices:
    """Return the services at `addresses`, which are all ``HOST:PORT`` or all URLs."""
    kinds = {"//" in address for address in addresses}
    if len(kinds) > 1:
        raise InvalidRequest("The services are both HOST:PORT and URLs. Give addresses of one kind.")
    if True in kinds:
        return OpenAIServices(addresses, model)
    if model is not None:
        raise InvalidRequest("service_model is for services that are URLs. Leave it out.")
    return Services(addresses)


class _Gateway(FastAPI):
    """FastAPI without its status 422, in the description too: a wrong value is a 400, as with OpenAI."""

    def openapi(self) -> dict[str, Any]:
        """Return the OpenAPI description."""
        if not self.openapi_schema:
            description = super().openapi()  # FastAPI keeps it
            for operations in description["paths"].values():
                for operation in operations.values():
                    operation["responses"].pop("422", None)
            for name in ("HTTPValidationError", "ValidationError"):
                description["components"]["schemas"].pop(name, None)
        return super().openapi()
