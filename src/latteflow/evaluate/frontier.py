"""Quality against cost: held-out captions drawn by other solvers, in other numbers of steps, with other guidance."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latteflow.data.captioned import load_captioned_images
from latteflow.evaluate.embedded import drawings_of, outside_measures, pictures_of_model, pixels_of
from latteflow.flow.guidance import Guidance
from latteflow.flow.schedulers import make_scheduler, schedule_times, set_schedule
from latteflow.pipeline import LatteFlowPipeline


@dataclass(frozen=True)
class Sampling:
    """One way from noise to a picture."""

    solver: str = "euler"
    """A key of ``SCHEDULERS``."""
    steps: int = 40
    """Intervals of time: network calls, but for Heun, which makes 2 N - 1."""
    guidance_scale: float = 4.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """First and last t that are guided."""

    def cost(self) -> tuple[int, int]:
        """Return the network's calls a picture, and the sequences they take: two where guided, else one."""
        scheduler, guidance = make_scheduler(self.solver), Guidance(self.guidance_scale, *self.guidance_interval)
        set_schedule(scheduler, self.steps)
        times = schedule_times(scheduler)
        return len(times), sum(2 if guidance.acts_at(t) else 1 for t in times)


@dataclass(frozen=True)
class Point:
    """What a way of sampling costs and gives."""

    sampling: Sampling
    calls: int
    sequences: int
    figures: dict[str, float]
    """The judge's shares and the features' distances."""


def sampling_frontier(
    pipe: LatteFlowPipeline,
    model_folder: Path,
    data: Path,
    judge: Path,
    samplings: Iterable[Sampling],
    *,
    drawings: int = 256,
    seed: int = 0,
    watch: Callable[[str], None] = lambda message: None,
) -> tuple[dict[str, float], list[Point]]:
    """Draw the same held-out captions from the same noise in several ways, and let others judge.

    Args:
        pipe: the model; its scheduler is put back.
        model_folder: where its ``recipe.json`` lies.
        data: the folder that ``latteflow data emoji`` wrote.
        judge: folder of the trained judge.
        samplings: the ways.
        drawings: held-out captions, spread evenly; no fewer than 65, for the features' 64 directions.
        seed: of the noise.
        watch: told what is being done.

    Returns:
        The figures of the real pictures of these captions, and a point each way.

    Raises:
        UserError: no recipe, data set or judge there, or a solver, scale or interval that cannot be.
    """
    part = load_captioned_images(data, "heldout", **pictures_of_model(model_folder)).spread(drawings)
    measures = outside_measures(judge, data, model_folder, part, watch)

    def figures(pixels: Any) -> dict[str, float]:
        return {name: value for _, measure in measures for name, value in measure(pixels).items()}

    own, points = pipe.scheduler, []
    try:
        for sampling in samplings:
            watch(str(sampling))
            pipe.scheduler = make_scheduler(sampling.solver)
            drawn = drawings_of(
                pipe,
                part,
                seed,
                num_inference_steps=sampling.steps,
                guidance_scale=sampling.guidance_scale,
                guidance_interval=sampling.guidance_interval,
            )
            points.append(Point(sampling, *sampling.cost(), figures(pixels_of(drawn))))
    finally:
        pipe.scheduler = own
    return figures(part.pixels), points
