"""``latteflow train``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from latteflow.cli.resources import read_resources
from latteflow.errors import UserError

if TYPE_CHECKING:
    from latteflow.train.loop import Progress as Step


def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe, such as recipes/emoji-64/generator.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value changes, such as train.steps=100; smoke=true for a short run.")
    ] = None,
    resume: Annotated[
        Literal["auto", "never"],
        typer.Option(help="auto goes on from the newest whole checkpoint, where there is one."),
    ] = "auto",
    on_ray: Annotated[
        bool, typer.Option("--on-ray", help="Train each expert group by itself on Ray, and merge them.")
    ] = False,
    per_group: Annotated[
        str,
        typer.Option(
            help="With --on-ray: what a group takes, such as CPU=4,GPU=1; left out, a GPU where there are any."
        ),
    ] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what the run would be, and stop.")] = False,
    device: Annotated[str, typer.Option(help="With --dry-run: an accelerator by name.")] = "h100-sxm",
    devices: Annotated[int, typer.Option(help="With --dry-run: how many.")] = 8,
    mfu: Annotated[float, typer.Option(help="With --dry-run: the assumed share of their peak.")] = 0.4,
) -> None:
    """Train one stage as a recipe says; run again after an interruption to resume."""
    from latteflow.train.recipe import load_recipe

    settings = load_recipe(recipe, overrides or [])
    if dry_run:
        _plan(settings, device, devices, mfu)
        return
    if per_group and not on_ray:
        raise UserError("--per-group is what a group takes on Ray: give --on-ray too, or leave it out")
    kept = [found for where in ("checkpoints", "group-*/checkpoints") for found in Path(settings.output).glob(where)]
    if resume == "never" and kept:
        raise UserError(f"{settings.output} holds checkpoints: give another output, or leave --resume never out")
    if on_ray:
        _run_on_ray(settings, read_resources(per_group, "--per-group"))
    else:
        _run(settings)


def _plan(settings: Any, device: str, devices: int, mfu: float) -> None:
    from latteflow.evaluate.plan import plan_of
    from latteflow.train.recipe import GeneratorRecipe, resolved

    if not isinstance(settings, GeneratorRecipe):
        raise UserError(f"a dry run is for a generator's recipe: this is stage {settings.stage}")
    if devices < 1 or not 0 < mfu <= 1:
        raise UserError(f"--devices has to be 1 or more and --mfu above 0, to 1: got {devices} and {mfu}")
    plan = plan_of(settings, device=device, devices=devices, mfu=mfu)
    for section, values in resolved(settings).items():
        print(f"{section}: {values}")
    print()
    for name, value in plan.rows().items():
        print(f"{name:<28} {value}")


def _run(settings: Any) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from latteflow.train.build import build_stage
    from latteflow.train.guard import TrainingDiverged
    from latteflow.train.loop import Stopped
    from latteflow.train.loop import train as run

    console = Console(stderr=True)
    stage = build_stage(settings)
    parameters = sum(p.numel() for p in stage.model.parameters() if p.requires_grad)
    console.print(f"{settings.stage}: {stage.number} samples, {parameters / 1e6:.2f}M trainable parameters")
    if settings.stage == "generator":
        console.print("preparing: of a set in memory, latents and contexts are computed once, which can take minutes")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("preparing", total=settings.train.steps)

        def watch(step: Step) -> None:
            bar.update(task, completed=step.step, description=_described(step))
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


def _described(step: Step) -> str:
    """Return loss, groups' losses, speed, share of the machine and time left, in a line."""
    groups = [value for name, value in sorted(step.figures.items()) if name.startswith("loss/group-")]
    parts = [f"loss {step.loss:.4f}"]
    if groups:
        parts.append("(" + " ".join(f"{value:.3f}" for value in groups) + ")")
    parts.append(f"{step.figures['samples_per_second']:.3g}/s")
    if "mfu" in step.figures:
        parts.append(f"MFU {step.figures['mfu']:.0%}")
    minutes, seconds = divmod(round(step.seconds_left), 60)
    parts.append(f"{minutes // 60}:{minutes % 60:02}:{seconds:02} left")
    return " ".join(parts)


def _run_on_ray(settings: Any, resources: dict[str, float]) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from latteflow.train.guard import TrainingDiverged
    from latteflow.train.loop import Stopped
    from latteflow.train.on_ray import train_on_ray

    console = Console(stderr=True)
    bars = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), console=console)
    tasks: dict[int, Any] = {}

    def watch(group: int, step: Step) -> None:
        bars.start()  # not before there is something to show
        if group not in tasks:
            tasks[group] = bars.add_task("", total=step.steps)
        bars.update(tasks[group], completed=step.step, description=f"group {group}: {_described(step)}")

    try:
        final = train_on_ray(settings, resources=resources, watch=watch)
    except Stopped as stop:
        console.print(str(stop), highlight=False)
        return
    except (TrainingDiverged, OSError) as error:
        raise UserError(str(error)) from error
    finally:
        if tasks:
            bars.stop()
    print(f"trained weights: {final}")
