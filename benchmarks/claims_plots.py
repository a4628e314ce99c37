"""The plots of benchmarks/claims.py, from saved runs alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from claims_saved import LINES, Case, Run, readings
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure


def write_plots(case: Case, folder: Path) -> list[Path]:
    """Write ``claims-CASE-curves``, ``-seeds`` and, where attention is carried, ``-gates`` as SVG and PNG.

    Returns:
        The PNG files.
    """
    plots = {"curves": plot_curves(case), "seeds": plot_seeds(case), "gates": plot_gates(case)}
    written = []
    for name, figure in plots.items():
        if figure is not None:
            file = folder / f"claims-{case.plan.case}-{name}.png"
            with rc_context({"svg.hashsalt": file.stem}):  # else its ids would differ from one writing to the next
                figure.savefig(file.with_suffix(".svg"), metadata={"Date": None})
            figure.savefig(file, dpi=110, metadata={"Software": "latteflow"})
            written.append(file)
    return written


def plot_curves(case: Case) -> Figure:
    """Draw held-out loss over steps and operations for (a), and over steps for every other question."""
    lines = dict.fromkeys(claim.line for claim in case.plan.claims)
    panels = [(line, axis) for line in lines for axis in (("step", "flops") if line in "ab" else ("step",))]
    rows = -(-len(panels) // 3)
    figure = Figure(figsize=(12, 3.2 * rows), layout="constrained")
    for place, (line, axis) in enumerate(panels):
        axes = figure.add_subplot(rows, 3, place + 1)
        claims = [claim for claim in case.plan.claims if claim.line == line]
        for arm in dict.fromkeys(arm for claim in claims for arm in (claim.better, claim.than)):
            draw_band(axes, case, arm, axis)
        axes.set_title(f"({line}) {LINES[line]}", fontsize=8)
        axes.set(xlabel="steps" if axis == "step" else "training operations", ylabel="held-out loss", yscale="log")
        for formatted in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            formatted("{x:.2f}")
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=7)
    figure.suptitle(f"{case.plan.title}: mean over seeds, lowest to highest", fontsize=9)
    return figure


def draw_band(axes: Axes, case: Case, arm: str, axis: str) -> None:
    """Draw an arm's mean curve and, behind it, from the lowest to the highest of its seeds."""
    rows = readings(case, arm)[1:]  # the first reading is far above all others
    if not rows:
        return
    places = [row[0][axis] for row in rows]
    losses = [[reading["loss"] for reading in row] for row in rows]
    label = case.plan.arms[arm].label
    (drawn,) = axes.plot(places, [sum(some) / len(some) for some in losses], label=label, linewidth=1)
    axes.fill_between(places, list(map(min, losses)), list(map(max, losses)), color=drawn.get_color(), alpha=0.2)


def plot_seeds(case: Case) -> Figure:
    """Draw each arm's seeds, a panel a figure: the base arm's spread first."""
    figure = Figure(figsize=(12, 0.32 * len(case.runs) + 1.2), layout="constrained")
    arms = [arm for arm in case.plan.arms if arm in case.runs]
    for place, measure in enumerate(case.measures):
        axes = figure.add_subplot(1, 3, place + 1)
        for row, arm in enumerate(arms):
            values = list(case.values(arm, measure).values())
            axes.plot(values, [row] * len(values), "o", markersize=4, alpha=0.7, color="C0" if row else "C1")
        base = list(case.values(case.plan.base_arm, measure).values())
        axes.axvspan(min(base), max(base), color="C1", alpha=0.15)
        axes.set_yticks(
            range(len(arms)), [case.plan.arms[arm].label for arm in arms] if place == 0 else [""] * len(arms)
        )
        axes.tick_params(labelsize=7)
        axes.invert_yaxis()
        axes.set_xlabel(
            measure.name + (", more is better" if measure.larger_is_better else ", less is better"), fontsize=8
        )
        axes.grid(alpha=0.3, axis="x")
    figure.suptitle(
        f"{case.plan.title}: every seed; the band is {case.plan.arms[case.plan.base_arm].label}", fontsize=9
    )
    return figure


def plot_gates(case: Case) -> Figure | None:
    """Draw where gates have opened: the mean over seeds and heads of |g(t)|, by layer and t."""
    arms = [arm for arm, runs in case.runs.items() if any(run["gates"] for run in runs.values())]
    wanted = {arm for claim in case.plan.claims if claim.line in "ac" for arm in (claim.better, claim.than)}
    arms = [arm for arm in arms if arm in wanted]
    if not arms:
        return None
    figure = Figure(figsize=(3.6 * len(arms), 3), layout="constrained")
    for place, arm in enumerate(arms):
        layers, times = opened(list(case.runs[arm].values()))
        axes = figure.add_subplot(1, len(arms), place + 1)
        top = max(value for row in layers.values() for value in row if value is not None)
        grid = [[float("nan") if value is None else value for value in layers[number]] for number in layers]
        image = axes.pcolormesh(times, list(range(len(grid))), grid, vmin=0, vmax=top or 1, shading="nearest")
        axes.set_yticks(range(len(grid)), list(layers))
        axes.set(xlabel="t (0 is noise)", ylabel="layer")
        axes.set_title(f"{case.plan.arms[arm].label}: mean |g(t)|", fontsize=8)
        figure.colorbar(image)
    return figure


def opened(runs: Sequence[Run]) -> tuple[dict[str, list[float | None]], list[float]]:
    """Return the mean over runs and heads of |g| by layer, one a time; None where a layer does not run."""
    gates = [run["gates"] for run in runs if run["gates"]]
    layers: dict[str, list[float | None]] = {}
    for layer in gates[0]["layers"]:
        rows = zip(*(gate["layers"][layer] for gate in gates), strict=True)
        layers[layer] = [
            None if some[0] is None else sum(abs(g) for heads in some for g in heads) / sum(map(len, some))
            for some in rows
        ]
    return layers, gates[0]["times"]
