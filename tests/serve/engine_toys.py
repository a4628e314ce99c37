"""Engines on toy pipelines, and what their pictures are compared with."""

from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from latteflow.serve.engine.engine import Engine
from latteflow.serve.engine.requests import DrawRequest
from latteflow.serve.engine.settings import EngineSettings
from toys import toy_pipeline

PROMPTS = ("a red circle, solid style", "blue", "", "the green square, outline style, and a cross beside it")


@contextmanager
def running(pipe: Any = None, observer: Any = None, executor: Any = None, **settings: Any):
    engine = Engine(pipe or toy_pipeline(), EngineSettings(**settings), observer, executor)
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


def double_pipeline(**settings: Any) -> Any:
    """A toy in float64, in which rounding is far below what any mistake would change."""
    pipe = toy_pipeline(**settings)
    for part in (pipe.backbone, pipe.transformer, pipe.vae):
        part.to(torch.float64)
    return pipe


def alone(pipe: Any, request: DrawRequest) -> np.ndarray:
    """What the pipeline draws for the request by itself."""
    size = {"height": request.height, "width": request.width}
    image = pipe(
        request.prompt,
        request.negative_prompt or None,
        **size,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        guidance_interval=request.guidance_interval,
        generator=torch.Generator().manual_seed(request.seed),
    ).images[0]
    return np.asarray(image, dtype=np.int16)


def pixels(image: Any) -> np.ndarray:
    return np.asarray(image, dtype=np.int16)
