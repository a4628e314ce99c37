"""Curves as pictures. matplotlib is an extra: ``pip install 'latteflow[plots]'``."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from latteflow.benchmark.curves import Curve
from latteflow.errors import UserError


def require_matplotlib() -> None:
    """Look for matplotlib before anything is measured.

    Raises:
        UserError: it is not installed.
    """
    if find_spec("matplotlib") is None:
        raise UserError("plots need matplotlib: install it with pip install 'latteflow[plots]', or give --no-plots")


def plot_curves(curves: Sequence[Curve], file: Path, note: str) -> None:
    """Draw curves side by side, both axes logarithmic.

    Args:
        curves: what was measured.
        file: a PNG.
        note: conditions, written below.
    """
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]

    figure = Figure(figsize=(4 * len(curves), 4), layout="constrained")
    for number, curve in enumerate(curves):
        axes = figure.add_subplot(1, len(curves), number + 1)
        for name, line in curve.lines.items():
            points, timings = list(line), list(line.values())
            (drawn,) = axes.plot(points, [timing.median for timing in timings], marker="o", markersize=4, label=name)
            low, high = ([getattr(timing, side) for timing in timings] for side in ("low", "high"))
            axes.fill_between(points, low, high, color=drawn.get_color(), alpha=0.2)
        values = sorted({point for line in curve.lines.values() for point in line})
        axes.set(xscale="log", yscale="log", xlabel=curve.axis, ylabel="seconds", title=curve.what)
        axes.title.set_fontsize(9)
        axes.set_xticks(values, [str(value) for value in values])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.supxlabel(note, fontsize=7)
    figure.savefig(file, dpi=110, metadata={"Software": "latteflow"})
