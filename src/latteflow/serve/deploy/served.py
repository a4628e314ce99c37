"""From settings to an application that is ready to be run: the model loaded, an engine around it, the API in front."""

from __future__ import annotations

import torch
from fastapi import FastAPI

from latteflow.errors import UserError
from latteflow.serve.api.app import create_app
from latteflow.serve.api.keys import ApiKeys
from latteflow.serve.api.metrics import Metrics
from latteflow.serve.deploy.settings import ServeSettings
from latteflow.serve.engine.engine import Engine
from latteflow.serve.engine.requests import EngineFailed
from latteflow.serve.executors.build import StartStage, build_executor
from latteflow.serve.executors.stage_process import StageProcess
from latteflow.serve.loading import fastest_threads, load_pipeline


def served_app(settings: ServeSettings, keys: ApiKeys, start_stage: StartStage = StageProcess) -> FastAPI:
    """Load a model and return its application, which starts the engine when it is run.

    Args:
        settings: of what is served.
        keys: who may ask.
        start_stage: makes a stage of a group pipeline; left out, a process here.

    Raises:
        UserError: there is no such model, it cannot be had in that way, or its stages do not start.
    """
    settings = settings.with_fastest_dtype()
    if (threads := settings.threads or fastest_threads(settings.model)) is not None:
        torch.set_num_threads(threads)
    pipe = load_pipeline(settings.model, settings.device, settings.dtype, settings.quantize, compiled=settings.compiled)
    bounds, metrics = settings.engine(), Metrics()
    try:
        executor = build_executor(settings.model, pipe, bounds, start_stage=start_stage)
    except EngineFailed as error:
        raise UserError(f"the stages of the group pipeline do not start: {error}") from error
    return create_app(Engine(pipe, bounds, metrics, executor), settings.api(keys), metrics)
