"""The samples of a step, and everything that is drawn at random for them.

A sample's draws depend on the seed, the step and its place in the batch alone: not on which process takes it, with
which others, or whether the other groups' samples are taken at all. So one process, several, and a run of one expert
group by itself see the same noise, times and captions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from latteflow.data.loader import batch_indices, generator_of

_STRIDE = 0x9E3779B97F4A7C15  # odd, so that places never share a seed; far from small, so that seeds are not neighbours


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
    counted: bool = True
    """False for what is taken only so that a process without samples runs what the others run."""

    def __len__(self) -> int:
        return len(self.index)

    @property
    def share(self) -> float:
        """This part's share of the step, by number."""
        return len(self) / self.total if self.counted else 0.0

    @cached_property
    def generator(self) -> torch.Generator:
        """One generator for draws about the part as a whole, such as augmentation; it depends on how parts are cut."""
        first = int(self.places[0]) if len(self) else -1
        return generator_of(self.seed, "part", self.step, first)

    def rand(self, purpose: str) -> torch.Tensor:
        """Return a float64 number in [0, 1) a sample, (n,); another purpose draws others."""
        drawn = [torch.rand((), generator=g, dtype=torch.float64) for g in self._generators(purpose)]
        return torch.stack(drawn) if drawn else torch.zeros(0, dtype=torch.float64)

    def integers(self, purpose: str, high: int) -> torch.Tensor:
        """Return an int64 number in [0, high) a sample, (n,)."""
        drawn = [torch.randint(high, (), generator=g) for g in self._generators(purpose)]
        return torch.stack(drawn) if drawn else torch.zeros(0, dtype=torch.int64)

    def randn(self, purpose: str, shape: Sequence[int]) -> torch.Tensor:
        """Return float32 normal noise of ``shape`` a sample, (n, *shape)."""
        drawn = [torch.randn(tuple(shape), generator=g) for g in self._generators(purpose)]
        return torch.stack(drawn) if drawn else torch.zeros(0, *shape)

    def _generators(self, purpose: str) -> Iterator[torch.Generator]:
        first = generator_of(self.seed, purpose, self.step).initial_seed()
        for place in self.places.tolist():
            yield torch.Generator().manual_seed((first + place * _STRIDE) % 2**63)


def step_samples(
    step: int,
    *,
    number: int,
    batch_size: int,
    seed: int,
    index: torch.Tensor | None = None,
    chosen: torch.Tensor | None = None,
    process: int = 0,
    processes: int = 1,
    parts: int = 1,
) -> list[Samples]:
    """Return the samples that one process takes in a step, in parts whose gradients are accumulated.

    The batch's places are cut first and chosen from then, so that a group's samples are cut alike whether the other
    groups are trained with it or not. Among several processes a part may so be left without samples here and with some
    elsewhere: it gets one that is not ``counted``. A part without samples of a single process is left out.

    Args:
        step: counted from 0.
        number: samples of the set.
        batch_size: samples of a step, over all processes and parts.
        seed: the run's.
        index: the samples of the step, int64 (batch_size,); left out, of a fresh permutation every epoch.
        chosen: places of the batch that are trained on; left out, all.
        process: this process's number.
        processes: how many there are.
        parts: accumulation steps.

    Returns:
        The parts; none at all, in any process, where nothing is chosen.
    """
    if index is None:
        index = batch_indices(step, number=number, batch_size=batch_size, seed=seed)
    places = torch.arange(batch_size)
    chosen = places if chosen is None else chosen
    if not len(chosen):
        return []

    def samples(mine: torch.Tensor, *, counted: bool = True) -> Samples:
        return Samples(index[mine], mine, len(chosen), batch_size, seed, step, counted)

    cut = places.tensor_split(processes)[process].tensor_split(parts)
    kept = [samples(part[torch.isin(part, chosen)]) for part in cut]
    if processes == 1:
        return [part for part in kept if len(part)]
    return [part if len(part) else samples(chosen[:1], counted=False) for part in kept]
