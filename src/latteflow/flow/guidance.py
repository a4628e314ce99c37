"""Classifier-free guidance of velocities.

The scale is diffusers': 1 is no guidance (the paper sweeps 1 to 9).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Guidance:
    """How much velocities are guided, and at which times.

    Guidance on a limited interval is from Kynkäänniemi et al. (arXiv 2404.07724).
    """

    scale: float
    """1 is no guidance."""
    first: float = 0.0
    """The first t, in [0, 1], that is guided."""
    last: float = 1.0
    """The last."""

    def acts_at(self, t: float) -> bool:
        """Return whether the velocity at t is guided, so that the unconditional one is needed."""
        return self.scale != 1.0 and self.first <= t <= self.last


def guide(v_cond: Tensor, v_uncond: Tensor, scale: float) -> Tensor:
    """Return the guided velocity, ``v_uncond + scale * (v_cond - v_uncond)`` (Ho & Salimans, 2022).

    Args:
        v_cond: Velocities given the prompt, any shape.
        v_uncond: Velocities without it, the shape of ``v_cond``.
        scale: Guidance scale; 0 ignores the prompt.

    Returns:
        The guided velocity, the shape of ``v_cond``; at scale 1 ``v_cond`` itself, so no bit of it changes.

    Raises:
        ValueError: If the shapes differ.
    """
    if v_cond.shape != v_uncond.shape:
        raise ValueError(
            f"v_cond and v_uncond must have one shape, not {tuple(v_cond.shape)} and {tuple(v_uncond.shape)}"
        )
    return v_cond if scale == 1 else v_uncond + scale * (v_cond - v_uncond)
