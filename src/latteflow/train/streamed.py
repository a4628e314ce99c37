"""Feeds that read sample by sample: pictures, encoded in the step, and latents that were computed ahead."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from latteflow.data.latents import LatentShards
from latteflow.data.quarantine import Quarantined
from latteflow.data.sizes import BucketedBatches, Size, as_input, fitted
from latteflow.errors import UserError
from latteflow.models.autoencoder import encode_pictures, normalized_latents
from latteflow.models.context import Context
from latteflow.train.feeds import Feed, channel_statistics
from latteflow.train.samples import Samples

_AT_ONCE = 64
_FOR_STATISTICS = 2048


class PictureFeed(Feed):
    """Pictures of a source, read in worker processes; autoencoder and backbone run in the step.

    Args:
        source: captioned pictures; the last ``validation`` are not trained on.
        size: height and width that pictures are brought to.
        validation: how many are kept apart.
    """

    def __init__(self, source: Quarantined, size: Size, validation: int) -> None:
        self.source, self.size = source, size
        self.number = _training(len(source), validation)

    def statistics(self, vae: Any) -> tuple[list[float], list[float]]:
        """Return mean and spread over at most 2,048 pictures."""
        index = torch.linspace(0, self.number - 1, min(_FOR_STATISTICS, self.number)).long()
        with torch.no_grad():
            latents = [vae.encode(as_input(self._read(part, 0)[0])).latent for part in index.split(_AT_ONCE)]
        return channel_statistics(latents, vae)

    def read(self, samples: Samples) -> tuple[torch.Tensor, list[str]]:
        """Return uint8 pictures (n, 3, height, width) and captions; a bad one's replacement is the epoch's."""
        return self._read(samples.index, samples.step * samples.batch_size // self.number)

    def inputs(self, samples: Samples, data: Any, prompt_dropout: float) -> tuple[torch.Tensor, Context]:
        """Encode pictures and prompts."""
        pictures, captions = data
        dropped = samples.rand("dropped prompt") < prompt_dropout
        words = ["" if drop else caption for drop, caption in zip(dropped.tolist(), captions, strict=True)]
        return self._encode(pictures), self.pipe.encode_prompt(words)

    def validation(self) -> Iterator[tuple[torch.Tensor, Context]]:
        """Yield the pictures kept apart."""
        for index in torch.arange(self.number, len(self.source)).split(_AT_ONCE):
            pictures, captions = self._read(index, 0)
            yield self._encode(pictures), self.pipe.encode_prompt(captions)

    def _read(self, index: torch.Tensor, epoch: int) -> tuple[torch.Tensor, list[str]]:
        samples = [self.source.read(i, epoch) for i in index.tolist()]
        return torch.stack([fitted(sample.picture, self.size) for sample in samples]), [s.caption for s in samples]

    @torch.no_grad()
    def _encode(self, pictures: torch.Tensor) -> torch.Tensor:
        there = as_input(pictures.to(self.device)).to(self.pipe.vae.dtype)
        return encode_pictures(self.pipe.vae, self.pipe.transformer.config, there).float()


class LatentFeed(Feed):
    """Latents that ``latteflow encode`` wrote, of one size or several; contexts are read where they were written too.

    Args:
        shards: the latents; the last ``validation`` are not trained on.
        validation: how many are kept apart.
    """

    def __init__(self, shards: LatentShards, validation: int) -> None:
        self.shards = shards
        self.number = _training(len(shards), validation)
        self._batches: BucketedBatches | None = None

    def statistics(self, vae: Any) -> tuple[list[float], list[float]]:
        """Return mean and spread of all latents, as they were written down."""
        return self.shards.mean, self.shards.std

    def indices(self, step: int, batch_size: int, seed: int) -> torch.Tensor | None:
        """Return a batch of one size, where there are several."""
        if len(self.shards.sizes) == 1:
            return None
        if self._batches is None:
            self._batches = BucketedBatches(self.shards.buckets[: self.number], batch_size, seed)
        return self._batches.indices(step)

    def read(self, samples: Samples) -> tuple[torch.Tensor, list[str], Context | None]:
        """Return latents, captions, and contexts of the captions and the empty prompt where they are on the disk."""
        return self._read(samples.index)

    def inputs(self, samples: Samples, data: Any, prompt_dropout: float) -> tuple[torch.Tensor, Context]:
        """Normalise latents, and encode the prompts whose contexts were not read."""
        latents, captions, contexts = data
        dropped = samples.rand("dropped prompt") < prompt_dropout
        if contexts is None:
            words = ["" if drop else caption for drop, caption in zip(dropped.tolist(), captions, strict=True)]
            return self._normalized(latents), self.pipe.encode_prompt(words)
        which = torch.where(dropped, len(samples), torch.arange(len(samples)))  # the empty prompt's stands last
        return self._normalized(latents), contexts.select(which).trim().to(self.device)

    def validation(self) -> Iterator[tuple[torch.Tensor, Context]]:
        """Yield the latents kept apart, those of one size at a time."""
        kept = torch.arange(self.number, len(self.shards))
        buckets = self.shards.buckets[kept]
        for bucket in buckets.unique().tolist():
            for index in kept[buckets == bucket].split(_AT_ONCE):
                latents, captions, contexts = self._read(index)
                if contexts is None:
                    yield self._normalized(latents), self.pipe.encode_prompt(captions)
                else:
                    yield self._normalized(latents), contexts.select(torch.arange(len(index))).to(self.device)

    def _read(self, index: torch.Tensor) -> tuple[torch.Tensor, list[str], Context | None]:
        contexts, stored = None, self.shards.contexts
        if stored is not None:
            contexts = stored.read(torch.cat([stored.numbers(index), torch.zeros(1, dtype=torch.int64)]))
        return self.shards.batch(index), [self.shards.caption(i) for i in index.tolist()], contexts

    def _normalized(self, latents: torch.Tensor) -> torch.Tensor:
        return normalized_latents(self.pipe.transformer.config, latents.to(self.device).float())


def _training(number: int, validation: int) -> int:
    if number <= validation:
        raise UserError(
            f"there are {number} samples, and data.validation keeps {validation} apart: none is left to train on"
        )
    return number - validation
