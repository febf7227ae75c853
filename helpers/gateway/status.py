"""What a gateway says about itself and the model: ``/v1/models``, ``/health``, ``/ready``, ``/metrics``."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel

from ..fields import ModelFields
from .backend import model_id
from .fields import served_model
from .guard import GuardedRoute
from .openai_services import ServerModel
from .results import FAILURES
from .settings import Settings, settings_of

router = APIRouter(route_class=GuardedRoute, responses={status: FAILURES[status] for status in (401, 503)})
open_router = APIRouter()
"""The routes that need no key. They tell nothing about the model or its users."""


class Model(BaseModel):
    """The model behind the gateway. What a server with OpenAI's API does not tell is null."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["helpers"] = "helpers"
    context_length: int | None
    precision: str | None


class ModelList(BaseModel):
    """The reply of `/v1/models`."""

    object: Literal["list"] = "list"
    data: list[Model]


class Status(BaseModel):
    """The reply of `/health` and `/ready`."""

    status: Literal["ok"] = "ok"


@router.get("/v1/models", summary="List the model")
async def list_models(request: Request) -> ModelList:
    """List the one model that the service runs."""
    settings = settings_of(request)
    return ModelList(data=[_model(await settings.backend.model(), settings)])


@router.get("/v1/models/{name:path}", summary="Describe the model", responses={404: FAILURES[404]})
async def get_model(name: str, request: Request) -> Model:
    """Describe the model, if `name` is its name."""
    settings = settings_of(request)
    return _model(await served_model(name, settings), settings)


@router.get("/metrics", summary="Metrics for Prometheus", response_class=Response)
async def metrics(request: Request) -> Response:
    """Return the metrics of the gateway and the load of each service, in Prometheus' text format."""
    settings = settings_of(request)
    services = await settings.backend.services.describe(patient=True)
    return Response(settings.metrics.page(services), media_type=CONTENT_TYPE_LATEST)


@open_router.get("/health", summary="Is the gateway alive?")
async def health() -> Status:
    """Answer, if the gateway is alive."""
    return Status()


@open_router.get("/ready", summary="Does a service answer?", responses={503: FAILURES[503]})
async def ready(request: Request) -> Status:
    """Answer, if a service behind the gateway answers."""
    await settings_of(request).backend.info()
    return Status()


def _model(model: ModelFields | ServerModel, settings: Settings) -> Any:
    return Model(
        id=model_id(model),
        created=settings.created,
        context_length=model.context_length,
        precision=model.precision,
    )
