"""From settings to an executor: in this process, or a group pipeline, or whichever is better."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from latteflow.errors import UserError
from latteflow.models.quantization import quantization_of
from latteflow.pipeline import LatteFlowPipeline
from latteflow.serve.engine.drawing import Solver, remembers_nothing
from latteflow.serve.engine.executor import Executor, LocalExecutor
from latteflow.serve.engine.settings import EngineSettings
from latteflow.serve.executors.cost import Cost, measure
from latteflow.serve.executors.group_pipeline import GroupPipeline, Patience
from latteflow.serve.executors.placement import Work, pipeline_is_better
from latteflow.serve.executors.stage import StageSettings
from latteflow.serve.executors.stage_process import Inbox, Stage, StageProcess

_log = logging.getLogger(__name__)

_STEPS = 40

StartStage: TypeAlias = Callable[[StageSettings, Inbox], Stage]
"""Starts a stage, which will report to the inbox."""


def build_executor(
    model: str | Path,
    pipe: LatteFlowPipeline,
    settings: EngineSettings,
    patience: Patience = Patience(),  # noqa: B008  (frozen)
    start_stage: StartStage = StageProcess,
) -> Executor:
    """Return what makes an engine's steps, as ``settings.placement`` says; stages are ready when this returns.

    Args:
        model: folder of the saved pipeline that ``pipe`` was loaded from, or an embedded model's name. Stages read
            their groups' weights there: what was changed in memory they do not have.
        pipe: the model. With "pipeline" its replica's layers may lack storage (``transformer_without_layers``).
        settings: of the engine.
        patience: with stages.
        start_stage: makes a stage; left out, a process here.

    Raises:
        UserError: the solver, the weights, the devices or the system do not allow a pipeline where one is asked for.
        EngineFailed: stages end again and again before they are ready.
    """
    obstacle = _obstacle(pipe)
    if settings.placement == "local" or (settings.placement == "auto" and obstacle is not None):
        return LocalExecutor(pipe.transformer, settings)
    if obstacle is not None:
        raise UserError(obstacle)
    pipeline = start_pipeline(model, pipe, settings, patience, start_stage)
    if settings.placement == "pipeline" or _is_better(pipeline, pipe, settings):
        return pipeline
    pipeline.close()
    return LocalExecutor(pipe.transformer, settings)


def start_pipeline(
    model: str | Path,
    pipe: LatteFlowPipeline,
    settings: EngineSettings,
    patience: Patience,
    start_stage: StartStage = StageProcess,
) -> GroupPipeline:
    """Return a group pipeline whose stages are ready; arguments and errors are those of ``build_executor``."""
    devices = stage_devices(settings.devices, pipe)
    threads = max(1, torch.get_num_threads() // max(1, devices.count("cpu")))
    engine = dataclasses.asdict(settings) | {"placement": "local", "devices": ()}
    scheduler = json.loads(pipe.scheduler.to_json_string())

    def start(group: int, inbox: Inbox) -> Stage:
        return start_stage(
            StageSettings(
                model=str(model),
                group=group,
                device=devices[group],
                dtype=str(pipe.transformer.dtype).removeprefix("torch."),
                threads=threads,
                scheduler=scheduler,
                engine=engine,
                beat=patience.silence / 4,
                pipe=-1,
            ),
            inbox,
        )

    pipeline = GroupPipeline(pipe.transformer, start, patience)
    pipeline.wait_until_ready()
    return pipeline


def stage_devices(devices: Sequence[str], pipe: LatteFlowPipeline) -> list[str]:
    """Return each group's device: as given, one for all, or where the pipeline computes.

    Raises:
        UserError: it is another number of devices, or one has no such name.
    """
    number = pipe.transformer.config.num_groups
    given = list(devices) or [str(pipe.vae.device)]
    if len(given) not in (1, number):
        raise UserError(f"{len(given)} devices for {number} groups: give one, or one for each group")
    try:
        return [str(torch.device(name)) for name in given] * (number // len(given))
    except RuntimeError as error:
        raise UserError(f"{', '.join(given)}: no devices, which are called cpu, cuda:0 and the like") from error


def _obstacle(pipe: LatteFlowPipeline) -> str | None:
    """Return why a pipeline cannot be; None if it can."""
    scheduler = pipe.scheduler
    if type(scheduler) is not FlowMatchEulerDiscreteScheduler or not remembers_nothing(scheduler):
        return (
            f"{type(scheduler).__name__} remembers the steps before, which no stage has seen: use the euler solver, "
            "or placement local"
        )
    if quantization_of(pipe.transformer) is not None or getattr(pipe.transformer, "peft_config", None):
        return (
            "stages read plain weights from the model's folder: without quantisation and adapters, or placement local"
        )
    return None


def sharing(devices: Sequence[str], cores: int) -> list[float]:
    """Return how many times longer each stage's forwards take when all stages work.

    Stages on the CPU have cores of their own, as far as there are enough; those on another device take turns.

    Args:
        devices: of each stage.
        cores: that torch uses of the CPU.
    """
    counts = Counter(devices)
    return [max(1.0, counts[each] / cores) if each == "cpu" else float(counts[each]) for each in devices]


def _is_better(pipeline: GroupPipeline, pipe: LatteFlowPipeline, settings: EngineSettings) -> bool:
    """Measure both placements, and say whether the pipeline is better."""
    transformer, scheduler = pipe.transformer, pipe.scheduler
    device = torch.device(pipe.vae.device)
    groups = range(transformer.config.num_groups)
    steps = Counter(int(transformer.group_of(t)) for t in Solver(scheduler, _STEPS, device).times)
    devices = stage_devices(settings.devices, pipe)
    factors = sharing(devices, torch.get_num_threads())
    stages = [
        Work(steps[group], Cost(factor * cost.fixed, factor * cost.each))
        for group, cost, factor in zip(groups, pipeline.measure(), factors, strict=True)
    ]
    engine = [Work(steps[group], measure(transformer, group, scheduler, settings, device)) for group in groups]
    better = pipeline_is_better(
        stages,
        engine,
        most=settings.max_batch,
        active=settings.max_active,
        # An engine on the CPU takes all its cores; of other devices each holds one.
        engines=max(1, len({each for each in devices if each != "cpu"})),
        load=settings.load,
    )
    _log.info("placement %s: of stages %s, of an engine %s", "pipeline" if better else "local", stages, engine)
    return better
