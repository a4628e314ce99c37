"""The samples of a step, and everything that is drawn at random for them.

A sample's draws depend on the seed, the step and its place in the batch alone: not on which process takes it, with
which others, or whether the other groups' samples are taken at all. So one process, several, and a run of one expert
group by itself see the same noise, times and captions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from latteflow.data.loader import batch_indices, generator_of


@dataclass(frozen=True)
class Samples:
    """A part of a step's batch."""

    index: torch.Tensor
    """int64 (n,), which samples of the set."""
    places: torch.Tensor
    """int64 (n,), their places in the batch."""
    total: int
    """How many samples the step has, over all its parts and processes."""
    batch_size: int
    """How many places the batch has; more than ``total`` where only some groups are trained."""
    seed: int
    step: int

    def __len__(self) -> int:
        return len(self.index)

    @property
    def share(self) -> float:
        """This part's share of the step, by number."""
        return len(self) / self.total

    @cached_property
    def generator(self) -> torch.Generator:
        """One generator for draws about the part as a whole, such as augmentation; it depends on how parts are cut."""
        first = int(self.places[0]) if len(self) else -1
        return generator_of(self.seed, "part", self.step, first)

    def rand(self) -> torch.Tensor:
        """Return a float64 number in [0, 1) a sample, (n,)."""
        return self._stacked([torch.rand((), generator=g, dtype=torch.float64) for g in self._generators])

    def integers(self, high: int) -> torch.Tensor:
        """Return an int64 number in [0, high) a sample, (n,)."""
        return self._stacked([torch.randint(high, (), generator=g) for g in self._generators]).long()

    def randn(self, shape: Sequence[int]) -> torch.Tensor:
        """Return float32 normal noise of ``shape`` a sample, (n, *shape)."""
        drawn = [torch.randn(tuple(shape), generator=g) for g in self._generators]
        return torch.stack(drawn) if drawn else torch.zeros(0, *shape)

    @cached_property
    def _generators(self) -> list[torch.Generator]:
        return [generator_of(self.seed, "sample", self.step, place) for place in self.places.tolist()]

    @staticmethod
    def _stacked(drawn: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(drawn) if drawn else torch.zeros(0)


def step_samples(
    step: int,
    *,
    number: int,
    batch_size: int,
    seed: int,
    chosen: torch.Tensor | None = None,
    process: int = 0,
    processes: int = 1,
    parts: int = 1,
) -> list[Samples]:
    """Return the samples that one process takes in a step, in parts whose gradients are accumulated.

    Args:
        step: counted from 0.
        number: samples of the set.
        batch_size: samples of a step, over all processes and parts.
        seed: the run's.
        chosen: places of the batch that are trained on; left out, all.
        process: this process's number.
        processes: how many there are.
        parts: accumulation steps.
    """
    index = batch_indices(step, number=number, batch_size=batch_size, seed=seed)
    places = torch.arange(batch_size) if chosen is None else chosen
    mine = places.tensor_split(processes)[process].tensor_split(parts)
    return [Samples(index[part], part, len(places), batch_size, seed, step) for part in mine]
