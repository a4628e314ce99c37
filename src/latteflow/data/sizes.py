"""Picture sizes: one area in several aspects, each picture in the nearest, each batch in one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from PIL import Image, ImageOps

from latteflow.data.loader import batch_indices, generator_of
from latteflow.errors import UserError

Size = tuple[int, int]
"""Height and width, in pixels."""


def bucket_sizes(size: int, *, factor: int, most_aspect: float = 1.0) -> tuple[Size, ...]:
    """Return the sizes of about ``size`` squared pixels whose sides are multiples of ``factor``.

    The square, and for every shorter side the longest other that stays within its area: no size costs more. [D]

    Args:
        size: side of the square, such as 256, 512 or 1024.
        factor: what the autoencoder and the patches shrink a side by.
        most_aspect: how many times one side may be the other; 1 gives the square alone.

    Returns:
        Sizes from the widest to the tallest.

    Raises:
        UserError: ``size`` is no multiple of ``factor``, or ``most_aspect`` is less than 1.
    """
    if size < 1 or size % factor:
        raise UserError(
            f"size {size} is not a multiple of {factor}, by which pictures shrink: take {_near(size, factor)}"
        )
    if most_aspect < 1:
        raise UserError(f"an aspect of {most_aspect:g} cannot be: 1 is the square, 2 twice as long as high")
    side = size // factor
    sizes = {(side, side)}
    for short in range(1, side):
        long = side * side // short
        if long <= most_aspect * short:
            sizes |= {(short, long), (long, short)}
    return tuple((height * factor, width * factor) for height, width in sorted(sizes))


def _near(size: int, factor: int) -> int:
    return max(1, round(size / factor)) * factor


def nearest_size(width: int, height: int, sizes: Sequence[Size]) -> int:
    """Return the number of the size whose aspect a picture's is nearest to, by ratio; of two as near the first."""
    aspect = math.log(width / height)
    return min(range(len(sizes)), key=lambda i: (abs(math.log(sizes[i][1] / sizes[i][0]) - aspect), i))


def fitted(picture: Image.Image, size: Size) -> torch.Tensor:
    """Return a picture shrunk (or stretched) to cover ``size``, and cut to it around its centre.

    Returns:
        uint8 (3, height, width), RGB.
    """
    height, width = size
    picture = ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)


def as_input(pictures: torch.Tensor) -> torch.Tensor:
    """Return uint8 pictures as float32 in [-1, 1]."""
    return pictures.float().div_(127.5).sub_(1.0)


@dataclass(frozen=True)
class BucketedBatches:
    """Batches of one bucket each, all of ``batch_size`` samples: a pure function of seed and step.

    A bucket's samples come in fresh permutations, one after the other, and are cut into batches; what is left at the
    end of one is the beginning of its next batch, so no sample is lost and none comes more often. In every epoch the
    buckets' batches stand in a fresh order.
    """

    buckets: torch.Tensor
    """int64 (number,), each sample's bucket."""
    batch_size: int
    seed: int

    def indices(self, step: int) -> torch.Tensor:
        """Return the samples of a step, int64 (batch_size,)."""
        epoch, place = self._epoch_of(step)
        order = self._order(epoch)
        bucket = int(order[place])
        number = self._full(epoch)[bucket] + int((order[:place] == bucket).sum())
        members = self._members[bucket]
        seed = generator_of(self.seed, "bucket", bucket).initial_seed()
        index = batch_indices(int(number), number=len(members), batch_size=self.batch_size, seed=seed)
        return members[index]

    def first_step(self, epoch: int) -> int:
        """Return the step at which an epoch begins."""
        return int(self._full(epoch).sum())

    @cached_property
    def _members(self) -> list[torch.Tensor]:
        return [(self.buckets == bucket).nonzero()[:, 0] for bucket in range(int(self.buckets.max()) + 1)]

    def _full(self, epoch: int) -> torch.Tensor:
        """Return how many batches each bucket has filled before an epoch."""
        return torch.tensor([len(members) for members in self._members]) * epoch // self.batch_size

    def _order(self, epoch: int) -> torch.Tensor:
        """Return the bucket of every batch of an epoch."""
        batches = self._full(epoch + 1) - self._full(epoch)
        order = torch.arange(len(batches)).repeat_interleave(batches)
        return order[torch.randperm(len(order), generator=generator_of(self.seed, "buckets", epoch))]

    def _epoch_of(self, step: int) -> tuple[int, int]:
        epoch = step * self.batch_size // len(self.buckets)  # no epoch begins later than its share of the samples
        while self.first_step(epoch + 1) <= step:
            epoch += 1
        return epoch, step - self.first_step(epoch)
