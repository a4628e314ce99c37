"""What every route stands on: the engine, the settings, and whether work is taken now."""

from __future__ import annotations

import time
from typing import Annotated

import anyio
from fastapi import Depends, Request

from latteflow.serve.api.errors import ApiError
from latteflow.serve.api.schemas import Body
from latteflow.serve.api.settings import ServerSettings
from latteflow.serve.engine.engine import Engine

_DECODERS = 2


class Service:
    """An engine as the API offers it.

    Args:
        engine: which does the work.
        settings: of the API.
    """

    def __init__(self, engine: Engine, settings: ServerSettings) -> None:
        self.engine, self.settings = engine, settings
        self.created = int(time.time())
        self.decoders = anyio.CapacityLimiter(_DECODERS)
        """How many pictures are decoded at a time."""
        self.leaving = False
        """Set before draining begins, so that a load balancer looks elsewhere while requests are still taken."""

    def trouble(self) -> str | None:
        """Return why nothing would come of a request now: "warming", "draining", "failed" or "hanging"."""
        status = self.engine.status()
        if status.failed is not None:
            return "failed"
        if status.draining:
            return "draining"
        if not status.ready:
            return "warming"
        return "hanging" if status.silent_for > self.settings.max_silence else None

    def know(self, model: str | None) -> None:
        """Refuse another model's name.

        Raises:
            ApiError: 404.
        """
        if model is not None and model != self.settings.model:
            words = f"there is no model of that name: {self.settings.model!r} is served"
            raise ApiError(404, "model_not_found", words, param="model")

    def take(self, model: str | None) -> None:
        """Refuse a request for another model, or one of which nothing would come now.

        Raises:
            ApiError: 404 or 503.
        """
        self.know(model)
        trouble = self.trouble()
        if trouble is not None:
            raise ApiError(
                503, f"engine_{trouble}", f"the engine is {trouble}: ask again", headers={"Retry-After": "2"}
            )


def service_of(request: Request) -> Service:
    """Return the service that a request is for."""
    return request.app.state.service


ServiceOf = Annotated[Service, Depends(service_of)]
"""A route's parameter that is given the service."""


def ignored_header(body: Body) -> dict[str, str]:
    """Return the header that names the fields of a request that had no effect."""
    ignored = body.ignored()
    return {"x-latteflow-ignored": ", ".join(ignored)} if ignored else {}
