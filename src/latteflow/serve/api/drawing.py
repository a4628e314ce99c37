"""From what a client asks to what the engine is asked for a picture: sizes, seeds, previews."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

from latteflow.models.processor import Message
from latteflow.serve.api.schemas import Drawing
from latteflow.serve.api.service import Service
from latteflow.serve.engine.requests import DrawRequest

_MOST_RANDOM_SEED = 2**32
"""Drawn seeds are short enough for every language's numbers, and to be typed."""


def draw_requests(
    drawing: Drawing, prompt: str | Sequence[Message], service: Service, *, number: int = 1, previews: int = 0
) -> list[DrawRequest]:
    """Return what to ask the engine for.

    Args:
        drawing: how to draw.
        prompt: words, or a conversation.
        service: whose model draws.
        number: of pictures; picture i has the seed of the first plus i.
        previews: of each picture, about.
    """
    width, height = _size(drawing.size, service.engine.pipe)
    steps = drawing.number_of_steps
    seed = secrets.randbelow(_MOST_RANDOM_SEED) if drawing.seed is None else drawing.seed
    return [
        DrawRequest(
            prompt=prompt,
            negative_prompt=drawing.negative_prompt or "",
            seed=seed + i,
            height=height,
            width=width,
            num_inference_steps=steps,
            guidance_scale=drawing.scale,
            preview_every=max(1, steps // (previews + 1)) if previews else 0,
            timeout=drawing.timeout,
        )
        for i in range(number)
    ]


def picture_tokens(service: Service, width: int, height: int) -> int:
    """Return the tokens that a picture of that size is made of."""
    return width * height // service.engine.pipe.spatial_factor**2


def _size(text: str | None, pipe: Any) -> tuple[int, int]:
    """Return width and height in pixels."""
    if text is None or text == "auto":
        side = pipe.transformer.config.sample_size * pipe.vae.spatial_compression_ratio
        return side, side
    width, height = (int(side) for side in text.split("x"))
    return width, height
