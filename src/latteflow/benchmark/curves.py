"""How time grows: with steps, with the number of experts K, with batch and with resolution."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from latteflow.benchmark import ours
from latteflow.benchmark.case import Case
from latteflow.benchmark.measure import Timing, interleaved
from latteflow.benchmark.report import Page, Settings, seconds, spread, table
from latteflow.models.presets import preset
from latteflow.models.transformer import LatteFlowTransformer

GROUPS = (1, 2, 4, 7, 14, 28)
BATCHES = (1, 2, 4, 8, 16, 32, 64)
MOST_VANILLA_BATCH = 16
"""Beyond, a step of all layers takes longer than it tells."""
RESOLUTIONS = (256, 512, 1024)
STEPS = (5, 10, 20, 40)
_FEW = 3
"""Points of a curve with --quick."""


@dataclass(frozen=True)
class Curve:
    """Seconds along one axis, one line a name."""

    axis: str
    what: str
    lines: dict[str, dict[int, Timing]]
    """By name, then by the axis' value."""


def curves_page(settings: Settings, watch: Callable[[str], object]) -> tuple[Page, list[Curve]]:
    """Time the four curves with the layers of one preset.

    Args:
        settings: as elsewhere.
        watch: told what is being done.

    Returns:
        The page, and what to plot.
    """
    chosen = preset(settings.preset)
    vanilla = ours.build_vanilla(chosen, settings.device, settings.dtype)
    experts = {k: ours.regrouped(vanilla, k) for k in sorted({1, 4, *GROUPS}) if chosen.num_layers % k == 0}
    few, all_layers = experts.get(4, vanilla), vanilla
    curves = []
    for measure in (_groups, _batches, _resolutions, _steps):
        watch(f"curves: {measure.__name__.strip('_')}")
        curves.append(measure(settings, experts if measure is _groups else {4: few, 1: all_layers}))
    made = (
        f"{settings.preset} geometry, random weights, {settings.dtype_name}, guided (two sequences a picture), prompts "
        f"of {ours.PROMPT_TOKENS} and {ours.EMPTY_PROMPT_TOKENS} tokens; every K cuts the same weights. Points of a "
        "curve take turns; a curve has a budget of time, so that slow points were taken less often."
    )
    return Page("curves", "How time grows", made, body(curves)), curves


def body(curves: Iterable[Curve]) -> str:
    """Return the tables of curves and the picture of them."""
    parts = ["![seconds against steps, K, batch and resolution](curves.png)"]
    for curve in curves:
        rows = [
            (name, point, seconds(timing.median), spread(timing))
            for name, line in curve.lines.items()
            for point, timing in line.items()
        ]
        parts.append(f"## {curve.what}\n\n" + table(("case", curve.axis, "s", "10% to 90% (times)"), rows))
    return "\n\n".join(parts)


def _groups(settings: Settings, experts: dict[int, LatteFlowTransformer]) -> Curve:
    cases = {("one picture", k): _case(replica, settings).step for k, replica in experts.items()}
    return _curve("K", "A guided step against K, the number of experts", cases, settings, rounds=10, budget=60)


def _batches(settings: Settings, experts: dict[int, LatteFlowTransformer]) -> Curve:
    cases = {
        (_name(k), batch): _case(replica, settings, pictures=batch).step
        for k, replica in experts.items()
        for batch in _points(BATCHES, settings)
        if k != 1 or batch <= MOST_VANILLA_BATCH
    }
    return _curve("batch", "A guided step of all pictures against batch", cases, settings, rounds=5, budget=100)


def _resolutions(settings: Settings, experts: dict[int, LatteFlowTransformer]) -> Curve:
    cases = {
        (_name(k), size): _case(replica, settings, resolution=size).step
        for k, replica in experts.items()
        for size in _points(RESOLUTIONS, settings)
    }
    return _curve("pixels a side", "A guided step against resolution", cases, settings, rounds=5, budget=60)


def _steps(settings: Settings, experts: dict[int, LatteFlowTransformer]) -> Curve:
    def whole(case: Case) -> Callable[[int], None]:
        def call(number: int) -> None:
            for step in range(case.steps):
                case.step(step)

        return call

    cases = {
        (_name(k), steps): whole(_case(replica, settings, steps=steps))
        for k, replica in experts.items()
        for steps in _points(STEPS, settings)
    }
    return _curve("steps", "All steps of a picture against their number", cases, settings, rounds=3, budget=100)


def _curve(
    axis: str,
    what: str,
    cases: Mapping[tuple[str, int], Callable[[int], object]],
    settings: Settings,
    *,
    rounds: int,
    budget: float,
) -> Curve:
    turns = {f"{name}|{point}": call for (name, point), call in cases.items()}
    timings = interleaved(
        turns, rounds=settings.rounds(rounds), device=settings.device, seconds=budget, least=1, warm_up=1
    )
    lines: dict[str, dict[int, Timing]] = {}
    for name, point in cases:
        lines.setdefault(name, {})[point] = timings[f"{name}|{point}"]
    return Curve(axis, what, lines)


def _case(
    replica: LatteFlowTransformer,
    settings: Settings,
    *,
    pictures: int = 1,
    resolution: int | None = None,
    steps: int | None = None,
) -> Case:
    return ours.latteflow_case(
        replica,
        steps=steps or settings.steps,
        resolution=resolution or preset(settings.preset).picture_size,
        pictures=pictures,
    )


def _points(values: tuple[int, ...], settings: Settings) -> tuple[int, ...]:
    return values[:_FEW] if settings.quick else values


def _name(groups: int) -> str:
    return "K = 1 (Vanilla)" if groups == 1 else f"K = {groups}"
