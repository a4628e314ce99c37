"""Whether the process lives, and whether it is worth sending requests to. Open to everybody."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from latteflow.serve.api.answers import Health
from latteflow.serve.api.service import ServiceOf

router = APIRouter(tags=["health"])
_NOT_READY: dict[int | str, dict[str, Any]] = {
    503: {"model": Health, "description": "Not ready: send requests elsewhere, or wait."}
}


@router.get("/livez")
async def livez() -> Health:
    """Say that the process answers."""
    return Health(status="ok")


@router.get("/readyz", responses=_NOT_READY, response_model=Health)
@router.get("/health", responses=_NOT_READY, response_model=Health, operation_id="health")
async def readyz(service: ServiceOf) -> JSONResponse:
    """Say whether requests would be worked on: 503 while warming up, about to leave, failed, or hanging."""
    trouble = "draining" if service.leaving else service.trouble()
    return JSONResponse({"status": trouble or "ok"}, 200 if trouble is None else 503)
