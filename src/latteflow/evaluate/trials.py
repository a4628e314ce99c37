"""Trials: short training runs of the generator that differ in one thing and share all else, for ``claims.py`` to weigh.

A trial is a run of the project's own loop and stage. What this file adds is that arms with another number of groups see
the same times too, and that readings are taken alike.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from latteflow.data.loader import generator_of
from latteflow.data.shards import write_json
from latteflow.errors import UserError
from latteflow.evaluate.trial_feed import TrialFeed
from latteflow.flow.timesteps import balanced_groups
from latteflow.models.transformer import LatteFlowTransformer
from latteflow.nn.block import ReplicaLayer
from latteflow.nn.norm import RMSNorm
from latteflow.train.generator import GeneratorStage
from latteflow.train.loop import Progress, train
from latteflow.train.recipe import GeneratorRecipe, GeneratorSection
from latteflow.train.samples import Samples, step_samples

Weights = Literal["backbone", "random"]
"""Where the replica's layers start: copied from the backbone, or drawn as PyTorch draws a linear layer."""
BINS = 8
"""Parts of [0, 1] that a held-out loss is also told for."""
GATE_TIMES = 21
"""Times from 0 to 1 that gates are read at."""
_REPEATS = 2


class TrialStage(GeneratorStage):
    """The generator's stage, with times that do not depend on K and readings that do not depend on the seed.

    Every L places of a batch hold each L-th of [0, 1] once, and a sample's u in [0, 1] follows from seed, step and
    place alone. Its group is the one whose share of [0, 1], a K-th, holds u; its t is u where intervals are uniform,
    and stands as far into its interval as u into the K-th where they are not. So t is the same in uniform arms of any
    K.

    Args:
        settings: of the recipe; it trains whole replicas from their start.
        feed: shared by all runs.
        size: pixels a side.
        seed: the run's.
        weights: where the layers start.

    Raises:
        UserError: the recipe trains adapters, single groups or from a trained replica.
    """

    feed: TrialFeed

    def __init__(
        self, settings: GeneratorSection, feed: TrialFeed, *, size: int, seed: int, weights: Weights = "backbone"
    ) -> None:
        for name in ("start_from", "lora", "groups"):
            if getattr(settings, name) is not None:
                raise UserError(f"a trial trains a whole replica from its start: leave generator.{name} out")
        super().__init__(settings, feed, size=size, seed=seed)
        replica = self.pipe.transformer
        if weights == "random":
            torch.manual_seed(seed)
            draw_layers(replica)
        # From the seed once more: what has no counterpart in the backbone starts alike in all arms of a seed.
        torch.manual_seed(seed)
        replica.initialize_additions()
        self.other_seconds = 0.0
        """Processor time that was not training's."""

    def to(self, device: torch.device) -> None:
        """Prepare as the stage does; what the first run computes for all is not its training's time."""
        began = time.process_time()
        super().to(device)
        self.other_seconds += time.process_time() - began

    def _strata(self, batch_size: int, seed: int, step: int) -> torch.Tensor:
        number = self.pipe.transformer.config.num_layers  # which every K divides
        return balanced_groups(batch_size, number, generator=generator_of(seed, "groups", step))

    def _groups(self, batch_size: int, seed: int, step: int) -> torch.Tensor:
        return self._strata(batch_size, seed, step) // self.pipe.transformer.group_size

    def _draws(self, samples: Samples) -> torch.Tensor:
        strata = self._strata(samples.batch_size, samples.seed, samples.step)[samples.places]
        share = self.pipe.transformer.group_size
        return torch.stack([(strata % share + samples.rand("time")) / share, samples.rand("density")])

    def validate(self) -> dict[str, float]:
        """Return the losses that ``readings`` returns; the processor time that it takes is not the run's."""
        began = time.process_time()
        found = self.readings()
        self.other_seconds += time.process_time() - began
        return found

    @torch.no_grad()
    def readings(self, *, other_prompts: bool = False) -> dict[str, float]:
        """Return mean losses over fixed noise and times, uniform over [0, 1] and the same for every arm and seed.

        Args:
            other_prompts: give each picture its neighbour's prompt.

        Returns:
            ``loss`` on held-out pictures, ``loss/t-0`` to ``-7`` by eighths of [0, 1], ``loss/group-k`` (left out where
            no time fell there); ``seen`` on as many training pictures.
        """
        sums: dict[str, list[torch.Tensor]] = {}
        for part, (name, x_1, context) in enumerate(self.feed.parts()):
            context = context.select(torch.arange(len(x_1)).roll(1)) if other_prompts else context
            for repeat in range(_REPEATS):
                generator = generator_of(0, "reading", part, repeat)
                places = torch.randperm(len(x_1), generator=generator)
                t = ((places + torch.rand(len(x_1), generator=generator)) / len(x_1)).to(self.device)
                x_0 = torch.randn(x_1.shape, generator=generator).to(self.device)
                groups = self.pipe.transformer.intervals.group_of(t)
                losses = self._flow_loss(self.model, x_0, x_1, groups, t, context).per_sample
                sums.setdefault(name, []).append(losses)
                if name == "loss":
                    for k in range(BINS):
                        sums.setdefault(f"loss/t-{k}", []).append(losses[(t * BINS).long().clamp(max=BINS - 1) == k])
                    for k in range(self.settings.num_groups):
                        sums.setdefault(f"loss/group-{k}", []).append(losses[groups == k])
        whole = {name: torch.cat(losses) for name, losses in sums.items()}
        return {name: float(losses.mean()) for name, losses in whole.items() if len(losses)}

    def preview(self) -> None:
        """Draw nothing while training."""

    def export(self, folder: Path) -> None:
        """Write the replica alone: backbone and autoencoder are the base recipe's."""
        folder.mkdir(parents=True)
        self.pipe.transformer.save_pretrained(folder / "transformer")

    @torch.no_grad()
    def gates(self) -> dict[str, Any] | None:
        """Return each gated layer's g(t), a number a head, over its own interval; None where nothing is carried.

        Returns:
            ``times`` from 0 to 1, and ``layers``: by layer's number, a list of heads a time, None outside its interval.
        """
        replica = self.pipe.transformer
        times = torch.linspace(0, 1, GATE_TIMES)
        owners = replica.intervals.group_of(times).tolist()
        layers: dict[str, list[list[float] | None]] = {}
        for group in range(self.settings.num_groups):
            embedding = replica.io_of(group).time_embedding(times.to(self.device))
            for number in replica.layers_of(group):
                gate = replica.layers[number].gate
                if gate is not None:
                    found = gate(embedding).flatten(1).float().cpu()
                    rows = zip(found, owners, strict=True)
                    layers[str(number)] = [_rounded(heads) if owner == group else None for heads, owner in rows]
        return {"times": _rounded(times), "layers": layers} if layers else None

    def draws_sha256(self, batch_size: int, seed: int, steps: int = 3) -> str:
        """Return a hash of the samples, noise, captions and places in [0, 1] of the first steps: one in all arms."""
        digest = hashlib.sha256()
        for step in range(steps):
            (samples,) = step_samples(step, number=self.number, batch_size=batch_size, seed=seed)
            strata = self._strata(batch_size, seed, step)
            for draw in (
                samples.index,
                samples.randn("noise", (4,)),
                samples.integers("caption", self.feed.captions_per_image),
                samples.rand("dropped prompt"),
                strata + samples.rand("time"),
            ):
                digest.update(draw.numpy().tobytes())
        return digest.hexdigest()


@torch.no_grad()
def draw_layers(replica: LatteFlowTransformer) -> None:
    """Draw anew what layers have from the backbone: linear layers as PyTorch does, norms neutral. [D]"""
    for layer in replica.layers:
        if not isinstance(layer, ReplicaLayer):
            raise TypeError(f"not a layer of a replica: {type(layer).__name__}")
        for module in layer.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
            elif isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)


def trial_flops(recipe: GeneratorRecipe, feed: TrialFeed, *, size: int) -> float:
    """Return the training operations of one sample under this recipe, by the project's formula."""
    return TrialStage(recipe.generator, feed, size=size, seed=recipe.train.seed).flops_per_sample()


def run_trial(
    recipe: GeneratorRecipe,
    feed: TrialFeed,
    *,
    size: int,
    weights: Weights = "backbone",
    watch: Callable[[Progress], None] = lambda progress: None,
) -> tuple[TrialStage, dict[str, Any]]:
    """Train as the recipe says, going on where it was interrupted, and return what was read on the way and at the end.

    Args:
        recipe: its output folder is the run's own; a reading is taken every ``train.preview_every`` steps.
        feed: shared by runs.
        size: pixels a side of the pictures.
        weights: where the layers start.
        watch: told of progress.

    Returns:
        The stage, which holds the averaged weights and can draw, and the run's figures: ``curve`` (a reading each:
        step, training operations by formula, processor seconds of training, losses), ``other_prompts`` (the losses at
        the end with another picture's prompt), ``gates``, ``draws_sha256`` and ``flops_per_sample``.

    Raises:
        UserError: checkpoints are not written where readings are taken, or the recipe cannot be tried.
        Stopped: after SIGTERM; the run can be taken up again.
    """
    settings, output = recipe.train, Path(recipe.output)
    if settings.checkpoint_every % settings.preview_every:
        raise UserError("train.checkpoint_every has to be a multiple of train.preview_every: readings must not be lost")
    torch.manual_seed(settings.seed)
    stage = TrialStage(recipe.generator, feed, size=size, seed=settings.seed, weights=weights)
    curve = Curve(output / "curve.json", stage, stage.flops_per_sample() * settings.batch_size)

    def note(progress: Progress) -> None:
        losses = {
            name.removeprefix("validation/"): value
            for name, value in progress.figures.items()
            if name.startswith("validation/")
        }
        if losses:
            curve.note(progress.step, progress.first, losses)
        watch(progress)

    final = train(recipe, stage, watch=note)
    trained = LatteFlowTransformer.from_pretrained(final / "transformer", use_safetensors=True)
    stage.pipe.transformer.load_state_dict(trained.state_dict())
    stage.pipe.transformer.eval()
    with torch.autocast(stage.device.type, torch.bfloat16, enabled=settings.mixed_precision == "bf16"):
        other = stage.readings(other_prompts=True)
        if settings.steps not in curve.rows:  # the process ended between the last checkpoint and its reading
            curve.note(settings.steps, settings.steps, stage.readings())
    return stage, {
        "flops_per_sample": stage.flops_per_sample(),
        "draws_sha256": stage.draws_sha256(settings.batch_size, settings.seed),
        "curve": [curve.rows[step] for step in sorted(curve.rows)],
        "other_prompts": {name: round(value, 6) for name, value in other.items()},
        "gates": stage.gates(),
    }


class Curve:
    """A run's readings, by step, in a file that an interrupted run goes on with.

    Args:
        file: JSON, written at every reading.
        stage: it knows the processor time that is not training's.
        flops: training operations a step.
    """

    def __init__(self, file: Path, stage: TrialStage, flops: float) -> None:
        self.file, self.stage, self.flops = file, stage, flops
        rows = json.loads(file.read_text()) if file.is_file() else []
        self.rows: dict[int, dict[str, float]] = {row["step"]: row for row in rows}
        self.began = time.process_time()

    def note(self, step: int, first: int, losses: Mapping[str, float]) -> None:
        """Add a reading of a run that began, or went on, at step ``first``."""
        before = max((row["processor_seconds"] for at, row in self.rows.items() if at <= first), default=0.0)
        spent = before + time.process_time() - self.began - self.stage.other_seconds
        row = {"step": step, "flops": self.flops * step, "processor_seconds": round(spent, 2)}
        self.rows[step] = {**row, **{name: round(value, 6) for name, value in losses.items()}}
        write_json(self.file, [self.rows[at] for at in sorted(self.rows)])


def forget_checkpoints(output: Path) -> None:
    """Remove a finished run's checkpoints: a few times its weights, and nothing goes on from them."""
    shutil.rmtree(output / "checkpoints", ignore_errors=True)


def _rounded(values: torch.Tensor) -> list[float]:
    return [round(float(value), 4) for value in values]
