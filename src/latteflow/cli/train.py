"""``latteflow train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from latteflow.errors import UserError


def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe, such as recipes/emoji-64/generator.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value changes, such as train.steps=100; smoke=true for a short run.")
    ] = None,
) -> None:
    """Train one stage as a recipe says; run again after an interruption to resume."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from latteflow.train.build import build_stage
    from latteflow.train.guard import TrainingDiverged
    from latteflow.train.loop import Progress as Step
    from latteflow.train.loop import Stopped
    from latteflow.train.loop import train as run
    from latteflow.train.recipe import load_recipe

    settings = load_recipe(recipe, overrides or [])
    console = Console(stderr=True)
    stage = build_stage(settings)
    parameters = sum(p.numel() for p in stage.model.parameters() if p.requires_grad)
    console.print(f"{settings.stage}: {stage.number} samples, {parameters / 1e6:.2f}M trainable parameters")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("training", total=settings.train.steps)

        def watch(step: Step) -> None:
            bar.update(task, completed=step.step, description=f"loss {step.loss:.4f}")
            validation = {name: value for name, value in step.figures.items() if name.startswith("validation/")}
            if validation:
                shown = " ".join(
                    f"{name.removeprefix('validation/')} {value:.4g}" for name, value in validation.items()
                )
                console.print(f"step {step.step} ({step.seconds:.0f} s): loss {step.loss:.4f} {shown}", highlight=False)

        try:
            final = run(settings, stage, watch=watch)
        except Stopped as stop:
            console.print(str(stop), highlight=False)
            return
        except (TrainingDiverged, OSError) as error:
            raise UserError(str(error)) from error
    print(f"trained weights: {final}")
