"""``latteflow encode``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from latteflow.errors import UserError


def encode(
    recipe: Annotated[Path, typer.Argument(help="A generator's recipe with a section encode.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value changes, such as encode.batch_size=64.")
    ] = None,
) -> None:
    """Compute a recipe's latents ahead of training; run again after an interruption to go on."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    from latteflow.train.encode import EncodeProgress
    from latteflow.train.encode import encode as run
    from latteflow.train.encode_job import job_of
    from latteflow.train.recipe import load_recipe

    job = job_of(load_recipe(recipe, overrides or []))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bars = Progress(*columns, console=Console(stderr=True))
    tasks: dict[str, TaskID] = {}

    def watch(now: EncodeProgress) -> None:
        bars.start()  # not before there is something to show
        if now.what not in tasks:
            tasks[now.what] = bars.add_task(now.what, total=now.total)
        bad = f" ({now.bad} bad)" if now.bad else ""
        bars.update(tasks[now.what], completed=now.done, description=f"{now.what}{bad}")

    try:
        latents = run(job, watch)
    except OSError as error:
        raise UserError(f"encoding stopped: {error}; run it again to go on") from error
    finally:
        if tasks:
            bars.stop()
    bad = latents.manifest["bad"]
    left_out = f", {bad} left out ({latents.folder / 'quarantine.jsonl'})" if bad else ""
    print(f"latents: {latents.folder}: {len(latents)} samples{left_out}")
