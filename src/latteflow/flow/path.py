"""The straight path from noise to data, and its velocity: the three formulas everything else builds on.

``t`` is always the time of the flow (0 noise, 1 data), one a sample; it is broadcast over the other axes in here and
nowhere else. Latents keep their dtype whatever the precision of ``t`` is.
"""

from __future__ import annotations

import torch
from torch import Tensor


def interpolate(x_0: Tensor, x_1: Tensor, t: Tensor) -> Tensor:
    """Return the point of the straight path at time ``t``: ``x_t = (1 - t) x_0 + t x_1``.

    t = 0 is noise and t = 1 is data, so ``x_0`` is the noise and ``x_1`` the latents (paper, the path equation).

    Args:
        x_0: Noise, shape (B, ...).
        x_1: Latents of the data, the shape of ``x_0``.
        t: Times in [0, 1], shape (B,), float32 or float64. The range is not checked.

    Returns:
        ``x_t``, the shape and dtype of the latents. It equals ``x_0`` at t = 0 and ``x_1`` at t = 1 exactly.

    Raises:
        ValueError: If the shapes differ, or ``t`` is not of shape (B,) and of float32 or float64.
    """
    _require_same_shape("x_0", x_0, "x_1", x_1)
    t = _over_samples(t, x_1)
    return ((1 - t) * x_0 + t * x_1).to(torch.result_type(x_0, x_1))


def target_velocity(x_0: Tensor, x_1: Tensor) -> Tensor:
    """Return the velocity of the straight path, ``u = x_1 - x_0``, the same at every t (paper, the path equation).

    Args:
        x_0: Noise, shape (B, ...).
        x_1: Latents of the data, the shape of ``x_0``.

    Returns:
        ``u``, the shape of the latents.

    Raises:
        ValueError: If the shapes differ.
    """
    _require_same_shape("x_0", x_0, "x_1", x_1)
    return x_1 - x_0


def predict_clean(x_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """Return the data that a straight path through ``x_t`` with velocity ``v`` ends in: ``x_t + (1 - t) v``.

    With ``v = x_1 - x_0`` this is ``x_1``; with a trained network's ``v`` it estimates ``E[x_1 | x_t]``.

    Args:
        x_t: Points of the path, shape (B, ...).
        v: Velocities at these points, the shape of ``x_t``.
        t: Times in [0, 1], shape (B,), float32 or float64. The range is not checked.

    Returns:
        The estimate of ``x_1``, the shape and dtype of ``x_t`` and ``v``.

    Raises:
        ValueError: If the shapes differ, or ``t`` is not of shape (B,) and of float32 or float64.
    """
    _require_same_shape("x_t", x_t, "v", v)
    return (x_t + (1 - _over_samples(t, x_t)) * v).to(torch.result_type(x_t, v))


def _over_samples(t: Tensor, x: Tensor) -> Tensor:
    """Return ``t``, checked, with as many trailing axes as ``x`` has after the batch."""
    # Half precision resolves t to no better than 2^-12: enough to leave the expert's interval without notice.
    if t.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"t must be float32 or float64, not {t.dtype}")
    if t.shape != x.shape[:1]:
        raise ValueError(f"t must hold one time a sample, shape {tuple(x.shape[:1])}, not {tuple(t.shape)}")
    return t.reshape(-1, *[1] * (x.ndim - 1))


def _require_same_shape(name_a: str, a: Tensor, name_b: str, b: Tensor) -> None:
    """Refuse shapes that differ: broadcasting latents is always a mistake here, and a silent one."""
    if a.shape != b.shape:
        raise ValueError(f"{name_a} and {name_b} must have one shape, not {tuple(a.shape)} and {tuple(b.shape)}")
