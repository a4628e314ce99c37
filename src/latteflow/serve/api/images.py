"""``POST /v1/images/generations``."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import anyio
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from latteflow.serve.api.answers import ERRORS, OR_STREAM, ImageData, ImagesAnswer, ImagesUsage, TokenDetails
from latteflow.serve.api.drawing import draw_requests, picture_tokens
from latteflow.serve.api.encoding import data_url, encode_picture, record_of
from latteflow.serve.api.keys import KeyedRoute
from latteflow.serve.api.schemas import ImageBody
from latteflow.serve.api.service import Service, ServiceOf, ignored_header
from latteflow.serve.api.tickets import HEARTBEAT, EventStream, events, finished, server_event
from latteflow.serve.engine.requests import DrawRequest, EngineFailed, Finished, Progress, Ticket

_QUIET = {False: 15.0, True: 1.0}
"""Seconds without news after which a stream says that it lives; with progress, what stands before it in the queue."""

router = APIRouter(prefix="/v1/images", tags=["images"], route_class=KeyedRoute, responses=ERRORS)


@router.post("/generations", response_model=ImagesAnswer, responses=OR_STREAM)
async def generate(request: Request, body: ImageBody, service: ServiceOf) -> Response:
    """Draw pictures; with ``stream``, as server-sent events with previews."""
    service.take(body.model)
    if service.settings.log_prompts:
        request.state.prompt = body.prompt
    asked = draw_requests(body, body.prompt, service, number=body.n or 1, previews=body.partial_images or 0)
    headers = ignored_header(body)
    tickets = service.engine.draw(asked)
    if body.stream:
        frames = _frames(body, asked[0], tickets[0], service)
        return EventStream(frames, tickets[0], headers, service.settings.send_seconds)
    ends = await finished(request, tickets)
    answer = ImagesAnswer(
        created=int(time.time()),
        data=[await _data(body, *pair, service) for pair in zip(asked, ends, strict=True)],
        output_format=body.output_format or "png",
        size=f"{asked[0].width}x{asked[0].height}",
        usage=_usage(asked, ends, service),
    )
    return JSONResponse(answer.model_dump(), headers=headers)


async def _encoded(body: ImageBody, asked: DrawRequest, end: Finished, service: Service) -> str:
    """Return a finished picture's file in base64, with its record inside."""
    if end.image is None:
        raise EngineFailed("a drawing ended without a picture")
    record = record_of(asked, body.prompt, service.settings.model, service.settings.weights)
    kind = body.output_format or "png"
    return await anyio.to_thread.run_sync(encode_picture, end.image, kind, body.output_compression, record)


async def _data(body: ImageBody, asked: DrawRequest, end: Finished, service: Service) -> ImageData:
    text = await _encoded(body, asked, end, service)
    if body.response_format == "url":
        return ImageData(url=data_url(text, body.output_format or "png"), seed=asked.seed)
    return ImageData(b64_json=text, seed=asked.seed)


async def _frames(body: ImageBody, asked: DrawRequest, ticket: Ticket, service: Service) -> AsyncIterator[str]:
    """Yield a picture's server-sent events: previews, steps where they are wanted, and the picture."""
    kind, sent = body.output_format or "png", 0
    about = {
        "background": "opaque",
        "created_at": int(time.time()),
        "output_format": kind,
        "quality": "auto",
        "size": f"{asked.width}x{asked.height}",
    }
    queued = "image_generation.queued"
    if body.progress:
        yield server_event({"type": queued, "latteflow": {"ahead": service.engine.ahead_of(ticket)}}, queued)
    async for event in events(ticket, _QUIET[bool(body.progress)]):
        match event:
            case None if body.progress:
                yield server_event({"type": queued, "latteflow": {"ahead": service.engine.ahead_of(ticket)}}, queued)
            case None:
                yield HEARTBEAT
            case Progress():
                step = {"latteflow": _step(event)} if body.progress else {}
                if body.progress:
                    yield server_event({"type": "image_generation.progress", **step}, "image_generation.progress")
                if event.preview is not None and sent < (body.partial_images or 0):
                    text = await anyio.to_thread.run_sync(encode_picture, event.preview, kind, body.output_compression)
                    name = "image_generation.partial_image"
                    yield server_event(
                        {"type": name, "b64_json": text, "partial_image_index": sent, **about, **step}, name
                    )
                    sent += 1
            case Finished():
                text, name = await _encoded(body, asked, event, service), "image_generation.completed"
                usage = _usage([asked], [event], service).model_dump()
                yield server_event({"type": name, "b64_json": text, "seed": asked.seed, **about, "usage": usage}, name)


def _step(event: Progress) -> dict[str, Any]:
    return {name: getattr(event, name) for name in ("step", "steps", "group", "t", "seconds", "batch")}


def _usage(asked: Sequence[DrawRequest], ends: Sequence[Finished], service: Service) -> ImagesUsage:
    read = sum(end.prompt_tokens for end in ends)
    drawn = sum(picture_tokens(service, each.width or 0, each.height or 0) for each in asked)
    return ImagesUsage(
        input_tokens=read,
        input_tokens_details=TokenDetails(text_tokens=read),
        output_tokens=drawn,
        total_tokens=read + drawn,
    )
