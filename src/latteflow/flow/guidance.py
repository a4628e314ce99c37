"""Classifier-free guidance of velocities, and when it is worth its second network call.

The scale is diffusers': 1 is no guidance (the paper sweeps 1 to 9).
"""

from __future__ import annotations

from torch import Tensor

from latteflow.errors import UserError
from latteflow.flow.intervals import EDGE_TOLERANCE


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


def guidance_is_active(t: float, scale: float, interval: tuple[float, float] = (0.0, 1.0)) -> bool:
    """Say whether a call at time ``t`` needs the unconditional velocity as well.

    Guidance may be limited to an interval of t (Kynkaanniemi et al., 2024). The interval is read as an expert's is:
    half-open, closed at t = 1, and a time within ``EDGE_TOLERANCE`` of an edge counts as above it [D]; so an interval
    that ends at experts' edges switches with the experts.

    Args:
        t: Time of the call, in [0, 1].
        scale: Guidance scale; 1 is never active.
        interval: ``(lo, hi)`` in t with 0 <= lo <= hi <= 1; lo = hi is never active, unless both are 1.

    Raises:
        UserError: If ``interval`` is not that.
    """
    lo, hi = interval
    if not 0 <= lo <= hi <= 1:
        raise UserError(f"the guidance interval must be (lo, hi) with 0 <= lo <= hi <= 1, not {interval}")
    return scale != 1 and lo - EDGE_TOLERANCE <= t and (t < hi - EDGE_TOLERANCE or hi == 1)
