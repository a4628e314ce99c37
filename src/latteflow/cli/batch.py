"""``latteflow batch``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from latteflow.cli.model import DEFAULT_MODEL, DeviceOption, DtypeOption, ModelOption
from latteflow.errors import UserError


def batch(
    prompts: Annotated[
        Path, typer.Argument(help="A .csv, .jsonl or .parquet with a column prompt, and seed if you like.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder; run again to go on after an interruption.")],
    model: ModelOption = DEFAULT_MODEL,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Row i without a seed has this plus i.")] = 0,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Calls of the network a picture.")] = 40,
    guidance: Annotated[float, typer.Option(min=0, help="1 is none; higher follows the prompt more closely.")] = 4.0,
    batch_size: Annotated[int, typer.Option(help="Pictures at a time.")] = 16,
    shard_size: Annotated[int, typer.Option(help="Rows a folder, a multiple of the batch.")] = 256,
    ray: Annotated[bool, typer.Option("--ray", help="Draw in workers on Ray, here or where RAY_ADDRESS says.")] = False,
    workers: Annotated[int, typer.Option(min=0, help="With --ray: how many; 0 is one a GPU.")] = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Draw a picture for each row of a file; what is there is not drawn again."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from latteflow.serve.deploy.batch import BatchWork, draw_batch
    from latteflow.serve.deploy.prompt_rows import read_rows
    from latteflow.serve.loading import check_asked, found_anywhere

    if workers and not ray:
        raise UserError("--workers is for Ray: give --ray too, or leave it out")
    check_asked(model, dtype)
    rows, bad = read_rows(prompts, seed)
    work = BatchWork(
        out.absolute(), rows, found_anywhere(model), steps, guidance, device, dtype, batch_size, shard_size
    )
    columns = (TextColumn("pictures"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("pictures", total=len(rows))
            draw_batch(work, bad, on_ray=ray, workers=workers, watch=lambda number: bar.advance(task, number))
    except OSError as error:
        raise UserError(f"drawing stopped: {error}; run it again to go on") from error
    left_out = f", {len(bad)} rows left out ({out / 'bad-rows.json'})" if bad else ""
    print(f"pictures: {out}: {len(rows)}{left_out}")
