"""The training loop: one for every stage.

A step is a pure function of the weights, the seed and its number: which samples it sees and all that is drawn at
random follow from them, so that a resumed run repeats the straight one bit for bit.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel

from latteflow.data.loader import batch_indices, generator_of
from latteflow.errors import UserError
from latteflow.train.checkpoint import checkpoint_folders, load_checkpoint, save_checkpoint
from latteflow.train.optimizer import build_optimizer
from latteflow.train.recipe import StageRecipe, TrainSection, resolved
from latteflow.train.stage import Stage


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


class TrainingDiverged(RuntimeError):
    """The loss is no longer a finite number."""


def train(recipe: StageRecipe, stage: Stage, *, watch: Callable[[Progress], None] = lambda progress: None) -> Path:
    """Train a stage as its recipe says, resuming from the newest checkpoint of the recipe's output folder.

    Returns:
        The folder ``<output>/final`` with the averaged (EMA) weights, in the form that users load.

    Raises:
        UserError: a checkpoint does not fit the recipe or cannot be read.
        TrainingDiverged: the loss is not finite; the last checkpoint is left in place.
    """
    settings, output = recipe.train, Path(recipe.output)
    if settings.cpu_threads:
        torch.set_num_threads(settings.cpu_threads)
    accelerator = Accelerator(
        # Heads, and the layers of a group without samples, may have no gradient in a step.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        mixed_precision=settings.mixed_precision,
        log_with=None if settings.tracker == "none" else settings.tracker,
        project_config=ProjectConfiguration(project_dir=str(output), logging_dir=str(output / "logs")),
    )
    if accelerator.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
    accelerator.init_trackers("tensorboard" if settings.tracker == "tensorboard" else "run")
    run = _Run(accelerator, recipe, settings, output, stage)
    run.steps(watch)
    accelerator.end_training()
    final = output / "final"
    if accelerator.is_main_process:
        partial = output / ".final.partial"
        shutil.rmtree(partial, ignore_errors=True)
        with run.averaged_weights():
            stage.export(partial)
        (partial / "recipe.json").write_text(json.dumps(resolved(recipe), indent=2) + "\n")
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
    accelerator.wait_for_everyone()
    return final


class _Run:
    """One run's moving parts: the stage's model, its optimizer, schedule and averaged weights."""

    def __init__(
        self, accelerator: Accelerator, recipe: StageRecipe, settings: TrainSection, output: Path, stage: Stage
    ) -> None:
        self.accelerator, self.recipe, self.settings = accelerator, recipe, settings
        self.output, self.stage = output, stage
        self.parameters = {name: p for name, p in stage.model.named_parameters() if p.requires_grad}
        optimizer = build_optimizer(stage.model, settings)
        schedule = get_scheduler(
            settings.schedule,
            optimizer,
            num_warmup_steps=settings.warmup_steps,
            num_training_steps=settings.steps,
        )
        self.start = 0
        checkpoints = checkpoint_folders(output)
        ema_state = None
        if checkpoints:
            self.start, model_state, ema_state, optimizer_state = load_checkpoint(checkpoints[-1])
            _load_parameters(self.parameters, model_state, checkpoints[-1])
            optimizer.load_state_dict(optimizer_state["optimizer"])
            schedule.load_state_dict(optimizer_state["schedule"])
        stage.to(accelerator.device)
        self.model, self.optimizer = accelerator.prepare(stage.model, optimizer)
        self.schedule = schedule
        self.ema = EMAModel(list(self.parameters.values()), decay=settings.ema_decay, use_ema_warmup=True, power=0.75)
        self.ema.optimization_step = self.start
        if ema_state is not None:
            shadow = dict(zip(self.parameters, self.ema.shadow_params, strict=True))
            _load_parameters(shadow, ema_state, checkpoints[-1])

    def steps(self, watch: Callable[[Progress], None]) -> None:
        """Run from the resumed step to the last."""
        began = time.monotonic()
        for step in range(self.start, self.settings.steps):
            loss, figures = self._step(step)
            done, last = step + 1, step + 1 == self.settings.steps
            at_log = last or done % self.settings.log_every == 0
            at_preview = last or done % self.settings.preview_every == 0
            if last or done % self.settings.checkpoint_every == 0:
                _require_finite(loss, figures["gradient_norm"], done)
                self._save(done)
            if not (at_log or at_preview):
                continue
            _require_finite(loss, figures["gradient_norm"], done)
            logged: dict[str, float] = {name: float(value) for name, value in figures.items()}
            logged["learning_rate"] = float(self.schedule.get_last_lr()[0])
            if at_preview:
                logged |= self._preview(done)
            self.accelerator.log({"loss": loss.item(), **logged}, step=done)
            watch(Progress(done, self.settings.steps, loss.item(), time.monotonic() - began, logged))

    def _step(self, step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        settings, accelerator = self.settings, self.accelerator
        index = batch_indices(step, number=self.stage.number, batch_size=settings.batch_size, seed=settings.seed)
        mine = index.tensor_split(accelerator.num_processes)[accelerator.process_index]
        parts = mine.tensor_split(settings.gradient_accumulation_steps)
        total = torch.zeros((), device=accelerator.device)
        figures: Mapping[str, torch.Tensor] = {}
        for number, part in enumerate(parts):
            generator = generator_of(settings.seed, "step", step, accelerator.process_index, number)
            with accelerator.autocast():  # around the loss alone: autocast keeps cast weights until it is left
                loss, figures = self.stage.loss(self.model, part, generator)
            weight = len(part) / len(mine)
            accelerator.backward(loss * weight)
            total += loss.detach() * weight
        norm = accelerator.clip_grad_norm_(self.parameters.values(), settings.gradient_clip)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.step(self.parameters.values())
        return total, {**figures, "gradient_norm": torch.as_tensor(norm)}

    def _preview(self, step: int) -> dict[str, float]:
        with self.averaged_weights(), self.accelerator.autocast():
            figures = {f"validation/{name}": value for name, value in self.stage.validate().items()}
            picture = self.stage.preview()
        if picture is not None and self.accelerator.is_main_process:
            folder = self.output / "previews"
            folder.mkdir(exist_ok=True)
            picture.save(folder / f"step-{step:08d}.png")
        return figures

    def _save(self, step: int) -> None:
        if self.accelerator.is_main_process:
            save_checkpoint(
                self.output,
                step,
                model={name: p.detach() for name, p in self.parameters.items()},
                ema=dict(zip(self.parameters, self.ema.shadow_params, strict=True)),
                optimizer={"optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict()},
                recipe=resolved(self.recipe),
                keep=self.settings.keep_checkpoints,
            )
        self.accelerator.wait_for_everyone()

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


def _require_finite(loss: torch.Tensor, gradient_norm: torch.Tensor, step: int) -> None:
    if not (torch.isfinite(loss) and torch.isfinite(gradient_norm)):
        raise TrainingDiverged(
            f"step {step}: the loss is {loss.item()}, its gradient's norm {gradient_norm.item()}; "
            "lower train.learning_rate"
        )


def _load_parameters(parameters: Mapping[str, torch.Tensor], state: dict[str, torch.Tensor], folder: Path) -> None:
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
            parameter.copy_(state[name])
