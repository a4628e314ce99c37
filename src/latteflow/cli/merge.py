"""``latteflow merge``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def merge(
    runs: Annotated[list[Path], typer.Argument(help="Output folders of runs that trained single groups.")],
    out: Annotated[Path, typer.Option(help="Folder for the pipeline of all groups.")],
) -> None:
    """Put groups that were trained by themselves (generator.groups=[k]) together into one model."""
    from latteflow.train.merge import merge_runs

    print(f"merged weights: {merge_runs(runs, out)}")
