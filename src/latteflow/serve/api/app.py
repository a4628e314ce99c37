"""The application: routes, in front of an engine that it starts and stops."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer
from fastapi.telemetry import TelemetryConfig

from latteflow import __version__
from latteflow.serve.api import chat, errors, health, images, metrics, models
from latteflow.serve.api.gate import Gate
from latteflow.serve.api.keys import KeyedRoute
from latteflow.serve.api.logs import RequestLog
from latteflow.serve.api.metrics import Metrics
from latteflow.serve.api.service import Service
from latteflow.serve.api.settings import ServerSettings
from latteflow.serve.engine.engine import Engine

_KEYED = (images.router, chat.router, models.router, metrics.router)
_NO_TELEMETRY: TelemetryConfig = {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}
"""FastAPI's own would see bodies, and can be turned on by an environment variable."""
_description = APIRouter(route_class=KeyedRoute)


def create_app(engine: Engine, settings: ServerSettings | None = None, counted: Metrics | None = None) -> FastAPI:
    """Return the application of an engine: it starts the engine, warms it up, and stops it at its end.

    ``app.state.warm_up`` is a task that ends when the engine is warm.

    Args:
        engine: not started yet.
        settings: of the API; left out, for a client on this machine.
        counted: the metrics that are the engine's observer, if it has one.
    """
    settings, counted = settings or ServerSettings(), counted or Metrics()
    app = FastAPI(
        title="latteflow",
        version=__version__,
        summary="One model that understands pictures and makes them, as OpenAI's clients ask.",
        lifespan=_lifespan,
        openapi_url=None,  # described below, behind a key like everything else; the pages FastAPI has call out
        redirect_slashes=False,
        telemetry=_NO_TELEMETRY,
    )
    app.state.service, app.state.metrics = Service(engine, settings), counted
    counted.watch(engine.status)
    errors.install(app)
    app.include_router(health.router)
    # The check is KeyedRoute's; this describes it.
    described = [Depends(HTTPBearer(auto_error=False))] if settings.keys else []
    for router in (*_KEYED, _description):
        app.include_router(router, dependencies=described)
    app.add_middleware(
        Gate, hosts=settings.hosts, max_body_bytes=settings.max_body_bytes, body_seconds=settings.body_seconds
    )
    app.add_middleware(RequestLog, metrics=counted)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    engine = app.state.service.engine
    engine.start()
    app.state.warm_up = asyncio.ensure_future(asyncio.to_thread(engine.warm_up))
    try:
        yield
    finally:
        await asyncio.to_thread(engine.stop)
        await asyncio.gather(app.state.warm_up, return_exceptions=True)  # it may have been cut off


@_description.get("/openapi.json", include_in_schema=False)
def describe(request: Request) -> JSONResponse:
    """Return the API's description."""
    app: Any = request.app
    return JSONResponse(app.openapi())
