"""Which expert owns a time: the partition of t in [0, 1] into intervals, and the one function that routes by it.

Training and sampling both ask ``Intervals.group_of`` and nothing else, so they cannot disagree at an edge. A solver
visits the edges themselves, as float32 numbers a little off; hence the tolerance, and hence float64 inside.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import overload

import torch
from torch import Tensor

from latteflow.errors import UserError

# A time this close below an edge belongs to the interval above it [D]. A float32 sigma in [0, 1] is off by at most
# 3e-8, and UniPC starts at sigma = 1 - 1e-6: both are covered, and no useful interval is so short.
EDGE_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Intervals:
    """A partition of t in [0, 1] (0 noise, 1 data) into K intervals, half-open but for the last, which is closed.

    Group k, the k-th run of layers from the bottom, is the expert of ``[edges[k], edges[k + 1])``; so group 0 owns the
    noisiest interval [D]. The paper writes the intervals ``[t_k, t_{k+1})``.

    Attributes:
        edges: K + 1 times: 0 first, 1 last, each above the one before by more than twice ``EDGE_TOLERANCE``.

    Raises:
        UserError: If ``edges`` are anything else.
    """

    edges: tuple[float, ...]

    def __post_init__(self) -> None:
        edges = self.edges
        if not edges or edges[0] != 0 or edges[-1] != 1 or not all(math.isfinite(edge) for edge in edges):
            raise UserError(f"interval edges must be finite numbers from 0 to 1, such as (0, 0.5, 1), not {edges}")
        gap = 2 * EDGE_TOLERANCE
        if any(hi - lo <= gap for lo, hi in pairwise(edges)):
            raise UserError(f"interval edges must each exceed the one before by more than {gap:g}, not {edges}")

    @classmethod
    def uniform(cls, num_groups: int) -> Intervals:
        """Return ``num_groups`` intervals of one length, the paper's choice.

        Args:
            num_groups: K, at least 1.

        Raises:
            UserError: If ``num_groups`` is below 1, or so large that an interval falls below the tolerance.
        """
        if num_groups < 1 or 1 / num_groups <= 2 * EDGE_TOLERANCE:
            raise UserError(f"the number of groups must be at least 1 and below 500000, not {num_groups}")
        return cls(tuple(k / num_groups for k in range(num_groups + 1)))

    @classmethod
    def from_edges(cls, edges: Iterable[float]) -> Intervals:
        """Return the intervals between the given edges, for instance those of a saved configuration.

        Args:
            edges: K + 1 increasing times, 0 first and 1 last.

        Raises:
            UserError: If they are not that (see the class).
        """
        try:
            numbers = tuple(float(edge) for edge in edges)
        except (TypeError, ValueError) as error:
            raise UserError(f"interval edges must be numbers, such as (0, 0.5, 1), not {edges}") from error
        return cls(numbers)

    def __len__(self) -> int:
        """Return K, the number of intervals and of groups."""
        return len(self.edges) - 1

    def bounds(self, k: int) -> tuple[float, float]:
        """Return ``(lo, hi)``, the edges of group ``k``'s interval.

        Args:
            k: Group, in [0, K).

        Raises:
            IndexError: If there is no such group.
        """
        if not 0 <= k < len(self):
            raise IndexError(f"group {k} of {len(self)}")
        return self.edges[k], self.edges[k + 1]

    @overload
    def group_of(self, t: float) -> int: ...

    @overload
    def group_of(self, t: Tensor) -> Tensor: ...

    def group_of(self, t: float | Tensor) -> int | Tensor:
        """Return the group whose expert owns time ``t``: the one routing function of training and sampling.

        A time less than ``EDGE_TOLERANCE`` below an edge, or exactly so far, counts as at the edge. Give float32 or
        better: bfloat16 cannot tell times apart near an edge.

        Args:
            t: A time in [0, 1], or a tensor of times of any shape.

        Returns:
            The group of a number as an int; of a tensor as an int64 tensor of its shape, on its device.

        Raises:
            ValueError: If a time is outside [0, 1] by more than the tolerance, or not finite.
        """
        # Both branches count the inner edges at or below t, from the same float64 thresholds, so they agree exactly.
        thresholds = [edge - EDGE_TOLERANCE for edge in self.edges[1:-1]]
        if not isinstance(t, Tensor):
            if not -EDGE_TOLERANCE <= t <= 1 + EDGE_TOLERANCE:  # also true of NaN
                raise ValueError(f"t must be in [0, 1], not {t}")
            return bisect_right(thresholds, t)
        times = t.detach().to("cpu", torch.float64)  # the CPU, because MPS has no float64
        inside = (times >= -EDGE_TOLERANCE) & (times <= 1 + EDGE_TOLERANCE)
        if not bool(inside.all()):
            raise ValueError(f"t must be in [0, 1], not {times[~inside].flatten()[:4].tolist()}")
        groups = torch.bucketize(times, torch.tensor(thresholds, dtype=torch.float64), right=True)
        return groups.to(t.device)
