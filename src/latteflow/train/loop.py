"""The training loop: one for every stage.

A step is a pure function of the weights, the seed and its number: which samples it sees and all that is drawn at
random follow from them, so that a resumed run repeats the straight one bit for bit.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset

from latteflow.data.loader import generator_of
from latteflow.errors import UserError
from latteflow.train.checkpoint import CheckpointDamaged, load_checkpoint, newest_checkpoint, save_checkpoint
from latteflow.train.distributed import (
    anywhere,
    averaged,
    load_whole,
    shard,
    sharded_optimizer_state,
    summed,
    whole,
    whole_state,
)
from latteflow.train.guard import Guard
from latteflow.train.meter import Meter, matrix_rate
from latteflow.train.optimizer import build_optimizer
from latteflow.train.recipe import StageRecipe, TrainSection, resolved
from latteflow.train.samples import Samples, step_samples
from latteflow.train.stage import Stage

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """What a step reports to whoever watches."""

    step: int
    steps: int
    loss: float
    seconds: float
    """Wall time since the run (or its resumption) began."""
    figures: dict[str, float]
    """The logged figures; validation figures where the step has them."""
    first: int = 0
    """The step that the run was resumed from."""

    @property
    def seconds_left(self) -> float:
        """The time the rest takes at the speed so far."""
        return self.seconds / max(self.step - self.first, 1) * (self.steps - self.step)


class Stopped(Exception):
    """The run was asked to stop, has saved its state, and goes on when it is started again."""


def train(recipe: StageRecipe, stage: Stage, *, watch: Callable[[Progress], None] = lambda progress: None) -> Path:
    """Train a stage as its recipe says, resuming from the newest checkpoint of the recipe's output folder.

    SIGTERM ends the run after the step at hand, saved.

    Returns:
        The folder ``<output>/final`` with the averaged (EMA) weights, in the form that users load.

    Raises:
        UserError: a checkpoint does not fit the recipe or cannot be read.
        TrainingDiverged: the loss is not finite; the last checkpoint is left in place.
        OSError: the last checkpoint or the final weights cannot be written.
        Stopped: after SIGTERM.
    """
    settings, output = recipe.train, Path(recipe.output)
    if settings.cpu_threads:
        torch.set_num_threads(settings.cpu_threads)
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # or processes on CPUs would not find one another
        # Heads, and the layers of a group without samples, may have no gradient in a step.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        mixed_precision=settings.mixed_precision,
        log_with=None if settings.tracker == "none" else settings.tracker,
        project_config=ProjectConfiguration(project_dir=str(output), logging_dir=str(output / "logs")),
    )
    if settings.batch_size % accelerator.num_processes:
        raise UserError(f"batch_size {settings.batch_size} does not divide among {accelerator.num_processes} processes")
    if accelerator.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
    accelerator.init_trackers("tensorboard" if settings.tracker == "tensorboard" else "latteflow")
    run = _Run(accelerator, recipe, settings, output, stage)
    with _asked_to_stop() as asked:
        run.steps(watch, asked)
    final = run.export()
    accelerator.end_training()  # after which processes no longer hear of one another
    return final


class _Run:
    """One run's moving parts: the stage's model, its optimizer, schedule and averaged weights."""

    def __init__(
        self, accelerator: Accelerator, recipe: StageRecipe, settings: TrainSection, output: Path, stage: Stage
    ) -> None:
        self.accelerator, self.recipe, self.settings = accelerator, recipe, settings
        self.output, self.stage = output, stage
        checkpoint = newest_checkpoint(output)
        saved = None if checkpoint is None else load_checkpoint(checkpoint)
        self.start = 0 if saved is None else saved[0]
        stage.to(accelerator.device)
        self.model = self._placed(stage.model)
        self.parameters = {name: p for name, p in stage.model.named_parameters() if p.requires_grad}
        if saved is not None:
            _load_parameters(self.parameters, saved[1], checkpoint)
        optimizer = build_optimizer(stage.model, settings)
        self.schedule = get_scheduler(
            settings.schedule,
            optimizer,
            num_warmup_steps=settings.warmup_steps,
            num_training_steps=settings.steps,
        )
        if saved is not None:
            state = saved[3]["optimizer"]
            if settings.strategy == "fsdp2":
                order = [p for group in optimizer.param_groups for p in group["params"]]
                state = sharded_optimizer_state(state, order)
            optimizer.load_state_dict(state)
            self.schedule.load_state_dict(saved[3]["schedule"])
        self.optimizer = accelerator.prepare(optimizer)
        self.ema = EMAModel(list(self.parameters.values()), decay=settings.ema_decay, use_ema_warmup=True, power=0.75)
        self.ema.optimization_step = self.start
        if saved is not None:
            _load_parameters(dict(zip(self.parameters, self.ema.shadow_params, strict=True)), saved[2], checkpoint)
        self.guard = Guard(
            stage,
            accelerator,
            clip=settings.gradient_clip,
            policy=settings.nonfinite,
            patience=settings.nonfinite_patience,
            folder=output / "nonfinite",
        )

    def _placed(self, model: nn.Module) -> nn.Module:
        """Return what a step calls: the model on its device, compiled, and spread over the processes."""
        settings, accelerator = self.settings, self.accelerator
        if settings.activation_checkpointing:
            if not getattr(model, "_supports_gradient_checkpointing", False):
                raise UserError(f"train.activation_checkpointing: a {type(model).__name__} cannot; set it to false")
            model.enable_gradient_checkpointing()  # type: ignore[operator]
        if settings.compile:
            for module in model.modules():
                if type(module).__name__ in (getattr(model, "_no_split_modules", None) or ()):
                    module.compile()
        if settings.strategy == "fsdp2" and accelerator.num_processes > 1:
            model.to(accelerator.device)
            shard(model, accelerator, half=settings.mixed_precision == "bf16")
            return model
        return accelerator.prepare(model)

    def steps(self, watch: Callable[[Progress], None], asked: threading.Event) -> None:
        """Run from the resumed step to the last."""
        settings, meter = self.settings, self._meter()
        for step, (samples, data) in enumerate(self._batches(), start=self.start):
            loss, figures = self._step(step, samples, data)
            meter.count(sum(len(part) for part in samples if part.counted) * self.accelerator.num_processes)
            done, last = step + 1, step + 1 == settings.steps
            stop = anywhere(asked.is_set(), self.accelerator) and not last
            if last or stop or done % settings.checkpoint_every == 0:
                self._save(done, must=last or stop)
            at_preview = last or done % settings.preview_every == 0
            if at_preview or done % settings.log_every == 0:
                logged = averaged({name: float(value) for name, value in figures.items()}, self.accelerator)
                logged |= {"learning_rate": float(self.schedule.get_last_lr()[0]), **meter.reading()}
                if at_preview:
                    logged |= self._preview(done)
                total = float(summed(loss.clone(), self.accelerator))
                self.accelerator.log({"loss": total, **logged}, step=done)
                watch(Progress(done, settings.steps, total, meter.seconds, logged, self.start))
            if stop:
                raise Stopped(f"stopped after step {done} of {settings.steps}, saved; start it again to go on")

    def _batches(self) -> Iterator[tuple[list[Samples], list[Any]]]:
        """Yield each step's samples and what is read for them, in worker processes where there are some."""
        settings, accelerator = self.settings, self.accelerator
        steps = _Steps(self.stage, settings, accelerator.process_index, accelerator.num_processes)
        loader = DataLoader(
            steps,
            batch_size=None,
            sampler=range(self.start, settings.steps),
            num_workers=settings.workers,
            collate_fn=_as_it_is,
        )
        yield from loader

    def _step(self, step: int, samples: list[Samples], data: list[Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        accelerator = self.accelerator
        torch.manual_seed(_module_seed(self.settings.seed, step, accelerator.process_index))
        total = torch.zeros((), device=accelerator.device)
        told: dict[str, list[torch.Tensor]] = {}
        for number, (part, read) in enumerate(zip(samples, data, strict=True), start=1):
            with nullcontext() if number == len(samples) else accelerator.no_sync(self.model):
                with accelerator.autocast():  # around the loss alone: autocast keeps cast weights until it is left
                    loss, seen = self.stage.loss(self.model, part, read)
                if not part.counted:  # nor may it be NaN
                    loss, seen = loss.where(torch.zeros_like(loss, dtype=torch.bool), 0.0), {}
                # DDP and FSDP2 take the mean over processes, of which each brings its own share.
                accelerator.backward(loss * accelerator.num_processes if accelerator.num_processes > 1 else loss)
            total += loss.detach()
            for name, value in seen.items():
                told.setdefault(name, []).append(value)
        figures = {name: torch.stack(values).mean() for name, values in told.items()}
        norms = self.guard.clip_gradients({"all": total, **figures}, samples, step + 1)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.step(self.parameters.values())
        names = {"all": "gradient_norm"}
        return total, {**figures, **{names.get(k, f"gradient_norm/{k}"): norm for k, norm in norms.items()}}

    def _meter(self) -> Meter:
        flops, accelerator = self.stage.flops_per_sample(), self.accelerator
        half = self.settings.mixed_precision == "bf16"
        if flops is None:
            return Meter(None, None)
        rate = matrix_rate(accelerator.device, torch.bfloat16 if half else torch.float32)
        return Meter(flops, rate * accelerator.num_processes)

    def _preview(self, step: int) -> dict[str, float]:
        with self.averaged_weights(), self.accelerator.autocast():
            figures = {f"validation/{name}": value for name, value in self.stage.validate().items()}
            picture = self.stage.preview()
        if picture is not None and self.accelerator.is_main_process:
            file = self.output / "previews" / f"step-{step:08d}.png"
            try:
                file.parent.mkdir(exist_ok=True)
                picture.save(file)
            except OSError as error:
                _log.error("%s cannot be written (%s); training goes on", file, error)
        return figures

    def _save(self, step: int, *, must: bool) -> None:
        """Save; where it may fail (a full disk), say so, keep the last good one and go on."""
        model = {name: whole(p.detach()) for name, p in self.parameters.items()}
        ema = {name: whole(p) for name, p in zip(self.parameters, self.ema.shadow_params, strict=True)}
        optimizer = {"optimizer": whole_state(self.optimizer.state_dict()), "schedule": self.schedule.state_dict()}
        failed: OSError | CheckpointDamaged | None = None
        if self.accelerator.is_main_process:
            seen = step * self.settings.batch_size
            state = {"epoch": seen // self.stage.number, "place": seen % self.stage.number}
            try:
                save_checkpoint(
                    self.output,
                    step,
                    model=model,
                    ema=ema,
                    optimizer=optimizer,
                    state={**state, "recipe": resolved(self.recipe)},
                    keep=self.settings.keep_checkpoints,
                )
            except (OSError, CheckpointDamaged) as error:
                failed = error
        fatal = isinstance(failed, CheckpointDamaged) or (must and failed is not None)
        if anywhere(fatal, self.accelerator):
            raise failed or OSError(f"the first process cannot save step {step}")
        if failed is not None:
            _log.error("%s; the last good checkpoint is kept and training goes on", failed)

    def export(self) -> Path:
        """Write the averaged weights for users, complete or not at all."""
        final, partial = self.output / "final", self.output / ".final.partial"
        with self.averaged_weights(), _unsharded(self.stage.model):
            if self.accelerator.is_main_process:
                shutil.rmtree(partial, ignore_errors=True)
                self.stage.export(partial)
                (partial / "recipe.json").write_text(json.dumps(resolved(self.recipe), indent=2) + "\n")
                shutil.rmtree(final, ignore_errors=True)
                os.replace(partial, final)
            self.accelerator.wait_for_everyone()
        return final

    @contextmanager
    def averaged_weights(self) -> Any:
        """Let the model hold the averaged weights for a while, in evaluation mode."""
        parameters = list(self.parameters.values())
        self.ema.store(parameters)
        self.ema.copy_to(parameters)
        self.stage.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.stage.model.train()
            self.ema.restore(parameters)


class _Steps(Dataset[tuple[list[Samples], list[Any]]]):
    """Step numbers to a process's samples of the step and what is read for them."""

    def __init__(self, stage: Stage, settings: TrainSection, process: int, processes: int) -> None:
        self.stage, self.settings = stage, settings
        self.process, self.processes = process, processes

    def __getitem__(self, step: int) -> tuple[list[Samples], list[Any]]:
        settings = self.settings
        samples = step_samples(
            step,
            number=self.stage.number,
            batch_size=settings.batch_size,
            seed=settings.seed,
            index=self.stage.indices(step, settings.batch_size, settings.seed),
            chosen=self.stage.chosen(settings.batch_size, settings.seed, step),
            process=self.process,
            processes=self.processes,
            parts=settings.gradient_accumulation_steps,
        )
        return samples, [self.stage.read(part) for part in samples]


def _as_it_is(item: Any) -> Any:
    return item


def _module_seed(seed: int, step: int, process: int) -> int:
    """Return the seed of what modules themselves draw in a step, such as dropout."""
    return generator_of(seed, "modules", step, process).initial_seed()


@contextmanager
def _asked_to_stop() -> Iterator[threading.Event]:
    """Turn SIGTERM into an event for a while; where signals are not ours to take, it is never set."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _unsharded(model: nn.Module) -> Iterator[None]:
    """Let a sharded model hold whole parameters for a while; every process has to take part."""
    sharded = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if isinstance(parameter, DTensor)
    ]
    for module, name, parameter in sharded:
        setattr(module, name, nn.Parameter(whole(parameter.detach()), requires_grad=parameter.requires_grad))
    try:
        yield
    finally:
        for module, name, parameter in sharded:
            setattr(module, name, parameter)


def _load_parameters(parameters: Mapping[str, torch.Tensor], state: dict[str, torch.Tensor], folder: Any) -> None:
    """Copy ``state`` into ``parameters``; they have to agree in names and shapes."""
    for name in sorted(set(parameters) ^ set(state)):
        raise UserError(f"checkpoint {folder} does not fit this recipe (weight {name!r}): give another `output`")
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.shape != state[name].shape:
                raise UserError(
                    f"checkpoint {folder} does not fit this recipe: {name} is {tuple(state[name].shape)}, "
                    f"the recipe makes it {tuple(parameter.shape)}; give another `output`"
                )
            load_whole(parameter, state[name])
