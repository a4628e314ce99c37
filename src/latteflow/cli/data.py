"""``latteflow data NAME``: build a data set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from latteflow.errors import UserError

DATASETS = {
    "emoji": "captioned emoji in six styles and four extra ones, 64x64, from npm packages (about 200 MB of downloads)"
}
"""The data sets that can be built, and what they are."""


def data(
    name: Annotated[str, typer.Argument(help="The data set: emoji.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the data set (default: data/NAME).")] = None,
    cache: Annotated[Path | None, typer.Option(help="Folder of the downloaded npm archives.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Build anew even if it is complete.")] = False,
) -> None:
    """Build a data set; an interrupted build is taken up where it stopped."""
    if name not in DATASETS:
        listed = "; ".join(f"{key} ({what})" for key, what in DATASETS.items())
        raise UserError(f"no data set is named {name!r}; there is: {listed}")
    try:
        # Rendering libraries are wanted here only: no other verb should wait for them, or need them.
        from latteflow.data.emoji import build_emoji
    except ModuleNotFoundError as error:
        raise UserError(
            f"building data sets needs {error.name}, which is not installed: pip install 'latteflow[data]'"
        ) from error

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, TaskID] = {}

        def show(what: str, done: int, total: int) -> None:
            # All packages share one bar; every other step has its own.
            key = "fetch" if what.startswith("fetch") else what
            if key not in tasks:
                tasks[key] = bars.add_task(what, total=total or None)
            bars.update(tasks[key], description=what, completed=done)

        report = build_emoji(out or Path("data") / name, cache, force, show)
    counts = ", ".join(f"{count:,} {part}" for part, count in report.images.items())
    typer.echo(f"{report.folder}: {counts} pictures" + ("" if report.built else " (complete already, left alone)"))
