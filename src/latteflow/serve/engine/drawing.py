"""A picture under way: where it stands on its path from noise to data, and all that its steps need."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from latteflow.flow.guidance import Guidance
from latteflow.flow.schedulers import model_output_of_velocity, schedule_times, set_schedule
from latteflow.models.context import Context


class Solver:
    """One path's solver: a diffusers scheduler of its own, because schedulers remember where they are.

    Args:
        scheduler: of the pipeline; it is copied, not changed.
        num_inference_steps: intervals of the grid.
        device: where the latents are.

    Attributes:
        times: t of every network call, in order.
    """

    def __init__(self, scheduler: SchedulerMixin, num_inference_steps: int, device: torch.device) -> None:
        self._scheduler: Any = copy.deepcopy(scheduler)
        set_schedule(self._scheduler, num_inference_steps, device=device)
        self.times = tuple(schedule_times(self._scheduler))

    def seek(self, step: int) -> None:
        """Go on from network call ``step``, as if those before had been made; of a solver without memory only."""
        self._scheduler.set_begin_index(step)

    def advance(self, step: int, v: torch.Tensor, x_t: torch.Tensor) -> torch.Tensor:
        """Return the latents after network call ``step``, which gave velocity ``v`` at ``x_t``; all of one shape."""
        timestep = self._scheduler.timesteps[step]
        return self._scheduler.step(model_output_of_velocity(v), timestep, x_t, return_dict=False)[0]


def remembers_nothing(scheduler: SchedulerMixin) -> bool:
    """Say whether a path can go on from its latents alone: multistep solvers and Heun's need what was before."""
    return isinstance(scheduler, FlowMatchEulerDiscreteScheduler) and not scheduler.config["stochastic_sampling"]


@dataclass(eq=False)
class Drawing:
    """One picture's state between two steps."""

    id: str
    x_t: torch.Tensor
    """Normalised latents, float32 (1, channels, height / factor, width / factor)."""
    solver: Solver
    conditional: Context
    """Of the one prompt."""
    unconditional: Context | None
    """Of the negative prompt; None where nothing is guided."""
    guidance: Guidance
    preview_every: int = 0
    step: int = 0
    """Network calls made."""
    passed_over: int = 0
    """Forwards since the last that it took part in."""

    @property
    def t(self) -> float:
        """The time of its next network call."""
        return self.solver.times[self.step]

    @property
    def steps(self) -> int:
        """Network calls in all."""
        return len(self.solver.times)

    @property
    def finished(self) -> bool:
        """Whether no call is left."""
        return self.step == self.steps

    @property
    def guided(self) -> bool:
        """Whether its next call needs the unconditional velocity, too."""
        return self.unconditional is not None and self.guidance.acts_at(self.t)

    def wants_preview(self) -> bool:
        """Say whether the step that was just made is one to show."""
        return self.preview_every > 0 and self.step % self.preview_every == 0
