"""Markdown pages of results, each with the conditions it was measured under."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from latteflow import __version__
from latteflow.benchmark.measure import Timing
from latteflow.evaluate.record import processor_name


@dataclass(frozen=True)
class Settings:
    """What every benchmark is told."""

    device: torch.device
    dtype: torch.dtype
    threads: int
    steps: int = 40
    """Of a picture of ours; peers keep their own."""
    preset: str = "qwen2-vl-2b"
    quick: bool = False
    """Few rounds and points: for a look, not for a table to show."""

    @property
    def dtype_name(self) -> str:
        """Such as bfloat16."""
        return _name_of(self.dtype)

    def rounds(self, number: int) -> int:
        """Return how often to measure: ``number``, or 2 for a look."""
        return 2 if self.quick else number


@dataclass(frozen=True)
class Page:
    """One file of results."""

    name: str
    """Of the file, without its ending."""
    title: str
    made: str
    """How the numbers were made, one sentence or two; the README of the results repeats it."""
    body: str
    dtype: torch.dtype | None = None
    """That it was measured in, where it is not the settings' own."""

    def text(self, settings: Settings, *, load: float, seconds: float) -> str:
        """Return the whole page.

        Args:
            settings: that it was measured with.
            load: the machine's load average before.
            seconds: that the measurement took.
        """
        command = f"latteflow benchmark {self.name} --steps {settings.steps} --threads {settings.threads}"
        command += f" --dtype {_name_of(self.dtype or settings.dtype)} --device {settings.device}" + (
            " --quick" if settings.quick else ""
        )
        lines = [
            f"# {self.title}",
            f"`{command}`",
            f"{time.strftime('%Y-%m-%d')}, {conditions(settings)}. Load average before the run: {load:.1f} (a quiet "
            f"machine has less than 1); the page took {seconds:.0f} s.",
            *(["**Made with --quick: few rounds, for a look, not figures to quote.**"] if settings.quick else []),
            self.made,
            self.body,
        ]
        return "\n\n".join(lines) + "\n"


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def conditions(settings: Settings) -> str:
    """Return versions and hardware in one line."""
    where = f"{processor_name()}, {os.cpu_count()} cores, {settings.threads} thread{'s' * (settings.threads > 1)}"
    if settings.device.type == "cuda":
        where = f"{torch.cuda.get_device_name(settings.device)} (host: {where})"
    return f"latteflow {__version__}, torch {torch.__version__}, {platform.system()}, {where}"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def seconds(value: float) -> str:
    """Return seconds with three figures that count: 0.000123, 0.0456, 1.23, 123."""
    if value >= 100:
        return f"{value:.0f}"
    digits = 2 if value >= 1 else 3
    while value and value * 10**digits < 99.95 and digits < 6:
        digits += 1
    return f"{value:.{digits}f}"


def spread(timing: Timing) -> str:
    """Return the 10th to 90th percentile and how many were taken."""
    return f"{seconds(timing.low)} to {seconds(timing.high)} ({len(timing.seconds)})"


def large(value: float) -> str:
    """Return a number with a letter for its thousands."""
    for unit in ("", "k", "M", "G", "T"):
        if value < 1000:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}P"


def readme(pages: Sequence[tuple[str, str, str]]) -> str:
    """Return the README of a folder of results.

    Args:
        pages: name, title and how it was made, one a page.
    """
    lines = [
        "# Results",
        "Written by `latteflow benchmark` (all pages: without a name). Weights are random numbers at the published "
        "sizes unless a page says otherwise: a speed does not depend on what was learned. Cases of one table take "
        "turns in one process, after a warm-up, and every round starts with another; a figure is the median, its "
        "spread the 10th to 90th percentile and, in brackets, the number of times taken. A multiply-add is two "
        "operations. No figure here was measured on a GPU unless its page names one.",
        table(("page", "what", "how each number was made"), [(f"[{n}.md]({n}.md)", t, m) for n, t, m in pages]),
        "[memory.md](memory.md) and [residency.md](residency.md) are written by `benchmarks/memory.py` and "
        "`benchmarks/residency.py`.",
    ]
    return "\n\n".join(lines) + "\n"
