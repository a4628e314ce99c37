"""The one model that is served, as OpenAI's clients list it."""

from __future__ import annotations

from fastapi import APIRouter

from latteflow.serve.api.answers import ERRORS, ModelList, ModelObject, ModelShape
from latteflow.serve.api.keys import KeyedRoute
from latteflow.serve.api.service import Service, ServiceOf

router = APIRouter(prefix="/v1", tags=["models"], route_class=KeyedRoute, responses=ERRORS)


@router.get("/models")
async def list_models(service: ServiceOf) -> ModelList:
    """List the model."""
    return ModelList(data=[_model(service)])


@router.get("/models/{model:path}")
async def get_model(model: str, service: ServiceOf) -> ModelObject:
    """Describe the model; a hub id may hold a slash."""
    service.know(model)
    return _model(service)


def _model(service: Service) -> ModelObject:
    pipe = service.engine.pipe
    side = pipe.transformer.config.sample_size * pipe.vae.spatial_compression_ratio
    shape = ModelShape(
        size=f"{side}x{side}",
        size_multiple=pipe.spatial_factor,
        groups=pipe.transformer.config.num_groups,
        edges=list(pipe.transformer.intervals.edges),
        weights={name: str(value) for name, value in service.settings.weights.items()},
    )
    return ModelObject(id=service.settings.model, created=service.created, latteflow=shape)
