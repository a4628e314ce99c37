"""What a forward of a group costs: measured where it will run, as seconds = fixed + each · pictures."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from latteflow.flow.guidance import Guidance
from latteflow.models.context import Context
from latteflow.models.transformer import LatteFlowTransformer
from latteflow.serve.engine.drawing import Drawing, Solver
from latteflow.serve.engine.executor import LocalExecutor
from latteflow.serve.engine.settings import EngineSettings

_SIZES = (1, 2, 4, 8)
_REPEATS = 5
_WORDS = 16
_STEPS_A_GROUP = 16


@dataclass(frozen=True)
class Cost:
    """Of one group's forwards."""

    fixed: float
    """Seconds that a forward takes whatever shares it: weights are read, kernels started."""
    each: float
    """Seconds that every picture in it adds."""

    def seconds(self, pictures: float) -> float:
        """Return what a forward of a number of pictures takes."""
        return self.fixed + self.each * pictures


def fit(pictures: Sequence[int], seconds: Sequence[float]) -> Cost:
    """Return the line through measured forwards, by least squares; neither part is below zero.

    Args:
        pictures: how many shared each forward, 1 or more; one number at least.
        seconds: what each took.
    """
    if len(set(pictures)) == 1:
        return Cost(sum(seconds) / len(seconds), 0.0)
    sizes = torch.tensor([[1.0, number] for number in pictures], dtype=torch.float64)
    taken = torch.tensor(seconds, dtype=torch.float64)
    fixed, each = torch.linalg.lstsq(sizes, taken).solution.tolist()
    if each < 0:  # noise: more pictures took no longer
        return Cost(sum(seconds) / len(seconds), 0.0)
    if fixed < 0:
        return Cost(0.0, float((sizes[:, 1] @ taken) / (sizes[:, 1] @ sizes[:, 1])))
    return Cost(fixed, each)


def measure(
    transformer: LatteFlowTransformer,
    group: int,
    scheduler: SchedulerMixin,
    settings: EngineSettings,
    device: torch.device,
) -> Cost:
    """Return the cost of a group's steps, guided, of the model's own size, here and now; in some twenty forwards.

    Args:
        transformer: the replica; the other groups' layers are not touched.
        group: which steps are measured; one that the scheduler never visits costs nothing.
        scheduler: of the pipeline.
        settings: of the engine.
        device: where the group is.
    """
    solver = Solver(scheduler, _STEPS_A_GROUP * transformer.config.num_groups, device)
    steps = [step for step, t in enumerate(solver.times) if transformer.group_of(t) == group][: _REPEATS + 1]
    if not steps:
        return Cost(0.0, 0.0)
    sizes = [size for size in _SIZES if size <= settings.max_batch]
    seconds = []
    for size in sizes:
        executor = LocalExecutor(transformer, settings)
        drawings = [_drawing(f"{number}", transformer, group, scheduler, steps[0], device) for number in range(size)]
        for drawing in drawings:
            executor.add(drawing)
        taken = []
        for _ in steps:
            begin = time.perf_counter()
            executor.advance()
            drawings[-1].x_t.sum().item()  # waits for the device
            taken.append(time.perf_counter() - begin)
        seconds.append(min(taken[1:] or taken))  # the first prepares what the others share
    return fit(sizes, seconds)


def _drawing(
    id: str,
    transformer: LatteFlowTransformer,
    group: int,
    scheduler: SchedulerMixin,
    step: int,
    device: torch.device,
) -> Drawing:
    """Return a guided picture at a step, with contexts of nothing."""
    config, numbers = transformer.config, transformer.layers_of(group)
    shape = (1, len(numbers), config.num_key_value_heads, _WORDS, config.head_dim)
    keys = torch.zeros(shape, dtype=transformer.dtype, device=device)
    mask = torch.ones(1, _WORDS, dtype=torch.bool, device=device)
    context = Context(keys, keys, mask, torch.full((1,), _WORDS, device=device), numbers.start)
    solver = Solver(scheduler, _STEPS_A_GROUP * config.num_groups, device)
    solver.seek(step)
    x_t = torch.zeros(1, config.latent_channels, config.sample_size, config.sample_size, device=device)
    return Drawing(id, x_t, solver, context, context, Guidance(4.0), step=step)
