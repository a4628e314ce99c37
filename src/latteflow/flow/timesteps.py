"""Draws the training times: a batch is shared out among the groups first, then each sample draws t in its interval.

Groups come first because the loss is a sum over groups, each over its own interval: every expert gets the same share of
a batch whatever the density or the intervals' lengths are. Draws are made in float64 on the generator's device (so
with a CPU generator they are the same on every machine) and moved to the groups' device.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from latteflow.errors import UserError
from latteflow.flow.intervals import EDGE_TOLERANCE, Intervals

MIN_UNIFORM_MIX = 0.1
# Below this share of the global density an interval cannot be told from rounding: ndtr(z) near 1 resolves 1e-16.
_MIN_INTERVAL_MASS = 1e-9


def timesteps_of(
    draws: Tensor,
    groups: Tensor,
    intervals: Intervals,
    *,
    density: Literal["uniform", "logit_normal"] = "uniform",
    mean: float = 0.0,
    std: float = 1.0,
    uniform_mix: float = MIN_UNIFORM_MIX,
) -> Tensor:
    """Return one training time a sample, inside the interval of the sample's group.

    "uniform" is the paper's ``t ~ U[t_k, t_{k+1})``. "logit_normal" [D] is *one* density over all of [0, 1],
    ``logit(t) ~ N(mean, std^2)``, restricted to the interval and renormalised (so the experts together see the
    global density's shape, not K copies of it), and mixed with the uniform density of the interval.

    Args:
        draws: Uniform in [0, 1), float64, shape (2, B). Both are used up whatever the density is.
        groups: Group of each sample, shape (B,), int64 in [0, K).
        intervals: The groups' intervals.
        density: "uniform" or "logit_normal".
        mean: Mean of logit(t); above 0 leans towards data. Used by "logit_normal" only.
        std: Spread of logit(t), above 0. Used by "logit_normal" only.
        uniform_mix: Share of uniform draws [D], in [0.1, 1]: a logit-normal vanishes at t = 0 and t = 1, yet a solver
            calls each expert at the very edges of its interval. Used by "logit_normal" only.

    Returns:
        ``t``, shape (B,), float32, on the device of ``groups``; ``intervals.group_of(t)`` equals ``groups``.

    Raises:
        UserError: If ``density`` is unknown, ``uniform_mix``, ``mean`` or ``std`` is out of range, or the density
            leaves an interval empty.
        ValueError: If a group does not exist.
    """
    num_groups = len(intervals)
    k = groups.to(draws.device)
    if bool(((k < 0) | (k >= num_groups)).any()):
        raise ValueError(f"groups must be in [0, {num_groups}), not {groups.tolist()}")
    edges = torch.tensor(intervals.edges, dtype=torch.float64, device=k.device)
    lo, hi = edges[k], edges[k + 1]
    r, coin = draws
    t = lo + (hi - lo) * r
    if density == "logit_normal":
        _check_logit_normal(mean, std, uniform_mix)
        cdf = torch.special.ndtr((torch.logit(edges) - mean) / std)
        _check_mass(cdf, intervals)
        p = cdf[k] + (cdf[k + 1] - cdf[k]) * r
        restricted = torch.sigmoid(mean + std * torch.special.ndtri(p))
        t = torch.where(coin < uniform_mix, t, restricted)
    elif density != "uniform":
        raise UserError(f"unknown timestep density {density!r}; choose 'uniform' or 'logit_normal'")
    # Twice the tolerance, so that rounding to float32 cannot carry t across to where the next expert begins.
    inner = torch.where(k == num_groups - 1, hi, hi - 2 * EDGE_TOLERANCE)
    return t.clamp(lo, inner).to(groups.device, torch.float32)


def sample_timesteps(
    groups: Tensor,
    intervals: Intervals,
    *,
    density: Literal["uniform", "logit_normal"] = "uniform",
    mean: float = 0.0,
    std: float = 1.0,
    uniform_mix: float = MIN_UNIFORM_MIX,
    generator: torch.Generator,
) -> Tensor:
    """Draw one training time a sample from ``generator``; the rest is as in ``timesteps_of``."""
    draws = torch.rand((2, *groups.shape), generator=generator, dtype=torch.float64, device=generator.device)
    return timesteps_of(draws, groups, intervals, density=density, mean=mean, std=std, uniform_mix=uniform_mix)


def widened(t: Tensor, groups: Tensor, intervals: Intervals, share: float) -> Tensor:
    """Return times of which each has moved towards noise, so that the intervals they fill begin earlier. [D]

    An expert that only ever sees its own times can do without the prompt where much of the picture shows already, and
    never learns to read it (docs/LOG.md). One that began at noise, where there is nothing else to go by, has.

    Args:
        t: times in the samples' own intervals, (B,).
        groups: Group of each sample, int64 (B,).
        intervals: The groups' intervals.
        share: 1 lets every group's times begin at 0, 0 leaves them as they are; where intervals end does not change.
    """
    edges = torch.tensor(intervals.edges, dtype=torch.float64, device=t.device)
    k = groups.to(t.device)
    lo, hi = edges[k], edges[k + 1]
    return (hi - (hi - t.double()) * (hi - lo * (1 - share)) / (hi - lo)).clamp(min=0).to(t.dtype)


def balanced_groups(batch_size: int, num_groups: int, *, generator: torch.Generator) -> Tensor:
    """Share a batch out among the groups as evenly as it divides, in random order.

    Every K places in a row hold each group once, so that a process that takes a run of them has its share of every
    group. The counts differ by at most 1; who gets one more is drawn at random, so on average the shares are equal,
    also where the batch is smaller than the number of groups.

    Args:
        batch_size: B, at least 1.
        num_groups: K, at least 1.
        generator: Source of the draws.

    Returns:
        Groups, shape (B,), int64 in [0, K), on the generator's device.

    Raises:
        ValueError: If ``batch_size`` or ``num_groups`` is below 1.
    """
    if batch_size < 1 or num_groups < 1:
        raise ValueError(f"batch_size and num_groups must be at least 1, not {batch_size} and {num_groups}")
    rounds = -(-batch_size // num_groups)
    order = torch.rand((rounds, num_groups), generator=generator, device=generator.device).argsort(dim=1)
    return order.flatten()[:batch_size]


def _check_logit_normal(mean: float, std: float, uniform_mix: float) -> None:
    """Refuse the parameters of a logit-normal that would be no density, or would starve an interval's edges."""
    if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
        raise UserError(f"a logit-normal density needs a finite mean and a std above 0, not {mean} and {std}")
    if not MIN_UNIFORM_MIX <= uniform_mix <= 1:
        raise UserError(
            f"uniform_mix must be in [{MIN_UNIFORM_MIX}, 1], not {uniform_mix}: each expert must know its edges"
        )


def _check_mass(cdf: Tensor, intervals: Intervals) -> None:
    """Refuse a density that hardly ever falls into one of the intervals: there is nothing to renormalise."""
    mass, k = (cdf[1:] - cdf[:-1]).min(dim=0)
    if float(mass) < _MIN_INTERVAL_MASS:
        raise UserError(
            f"the logit-normal density almost never falls into {intervals.bounds(int(k))}; raise std or move mean"
        )
