"""The velocity that a solver follows: one call of the transformer a step, guided or not."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch

from latteflow.flow.guidance import Guidance, guide
from latteflow.models.context import Context
from latteflow.models.sampling_cache import SamplingCache
from latteflow.models.transformer import LatteFlowTransformer


class GuidedVelocity:
    """The field of one run.

    Args:
        transformer: the replica.
        context: of every picture; with guidance, the unconditional half stands first.
        times: of the run's steps.
        guidance: how much, and where.
    """

    def __init__(
        self, transformer: LatteFlowTransformer, context: Context, times: Sequence[float], guidance: Guidance
    ) -> None:
        self.transformer, self.guidance = transformer, guidance
        self.cache = SamplingCache(times)
        self.context = context
        self._dtype = transformer.dtype  # asked once: diffusers walks all modules to tell it

    @cached_property
    def conditional(self) -> Context:
        """The context without its unconditional half."""
        if self.guidance.scale == 1.0:
            return self.context
        number = len(self.context) // 2
        return self.context.select(torch.arange(number, 2 * number, device=self.context.mask.device)).trim()

    def __call__(self, x_t: torch.Tensor, t: float) -> torch.Tensor:
        """Return the velocity at latents x_t (pictures, channels, height, width) and time t, in x_t's dtype."""
        if not self.guidance.acts_at(t):
            return self._expert(x_t, t, self.conditional)
        # One batch of both halves: the weights are read once.
        v_unconditional, v_conditional = self._expert(torch.cat([x_t, x_t]), t, self.context).chunk(2)
        return guide(v_conditional, v_unconditional, self.guidance.scale)

    def _expert(self, x_t: torch.Tensor, t: float, context: Context) -> torch.Tensor:
        return self.transformer(x_t.to(self._dtype), t, context, self.cache).to(x_t.dtype)
