"""``latteflow benchmark``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from latteflow.cli.model import DTYPES, DeviceOption
from latteflow.errors import UserError


def benchmark(
    names: Annotated[
        list[str] | None, typer.Argument(help="limits, startup, emoji, paper, curves; left out, all of them.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Calls of the network a picture of ours; peers keep their own.")] = 40,
    preset: Annotated[str, typer.Option(help="Whose geometry ours has in paper and curves.")] = "qwen2-vl-2b",
    dtype: Annotated[str, typer.Option(help="bfloat16, float32 or float16; the embedded model stays float32.")] = (
        "bfloat16"
    ),
    threads: Annotated[int | None, typer.Option(help="Of the CPU; left out, one a core.")] = None,
    out: Annotated[Path, typer.Option(help="The folder of results.")] = Path("benchmarks/results"),
    plots: Annotated[bool, typer.Option(help="Draw the curves (needs matplotlib).")] = True,
    quick: Annotated[bool, typer.Option(help="Few rounds and points: for a look, not for figures to quote.")] = False,
    device: DeviceOption = None,
) -> None:
    """Measure speed side by side with peers, in turns, with the machine's limits beside; write a page each."""
    if not 1 <= steps <= 1000:
        raise UserError(f"--steps has to be 1 to 1000: got {steps}")
    if threads is not None and threads < 1:
        raise UserError(f"--threads has to be 1 or more: got {threads}")
    if dtype not in DTYPES:
        raise UserError(f"no dtype {dtype!r}: there are {', '.join(DTYPES)}")
    import torch
    from diffusers.utils import logging as diffusers_logging
    from rich.console import Console
    from transformers.utils import logging as transformers_logging

    from latteflow.benchmark.report import Settings
    from latteflow.benchmark.run import run_benchmarks
    from latteflow.cli.model import target_device
    from latteflow.models import presets

    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    presets.preset(preset)  # one that is not there is said before anything is measured
    settings = Settings(
        device=target_device(device),
        dtype=getattr(torch, dtype),
        threads=threads or os.cpu_count() or 1,
        steps=steps,
        preset=preset,
        quick=quick,
    )
    console = Console(stderr=True)
    watch = lambda message: console.print(message, highlight=False)  # noqa: E731
    for file in run_benchmarks(names or (), settings, out, plots=plots, watch=watch):
        print(file)
