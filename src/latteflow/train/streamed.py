"""Feeds that read sample by sample: pictures, encoded in the step, and latents that were computed ahead."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch

from latteflow.data.latents import LatentShards
from latteflow.data.loader import batch_indices, kept_apart
from latteflow.data.quarantine import Quarantined
from latteflow.data.sizes import BucketedBatches, Size, as_input, fitted
from latteflow.data.sources.source import Sample
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
        source: captioned pictures.
        size: height and width that pictures are brought to.
        validation: how many are kept apart; a bad one is never stood in for, nor stands one in for a bad sample.
    """

    def __init__(self, source: Quarantined, size: Size, validation: int) -> None:
        self.source, self.size = source, size
        self._trained, self._kept = _divided(kept_apart(len(source), validation), validation)
        self.number = len(self._trained)

    def statistics(self, vae: Any) -> tuple[list[float], list[float]]:
        """Return mean and spread over at most 2,048 pictures."""
        index = self._trained[torch.linspace(0, self.number - 1, min(_FOR_STATISTICS, self.number)).long()]
        with torch.no_grad():
            latents = [vae.encode(as_input(self._pictures(part, 0)[0])).latent for part in index.split(_AT_ONCE)]
        return channel_statistics(latents, vae)

    def indices(self, step: int, batch_size: int, seed: int) -> torch.Tensor | None:
        """Return a step's samples by their numbers in the source."""
        return self._trained[batch_indices(step, number=self.number, batch_size=batch_size, seed=seed)]

    def _read(self, samples: Samples) -> tuple[torch.Tensor, list[str]]:
        """Return uint8 pictures (n, 3, height, width) and captions; a bad one's replacement is the epoch's."""
        return self._pictures(samples.index, samples.step * samples.batch_size // self.number)

    def _inputs(self, samples: Samples, data: Any, prompt_dropout: float) -> tuple[torch.Tensor, Context]:
        """Encode pictures and prompts."""
        pictures, captions = data
        dropped = samples.rand("dropped prompt") < prompt_dropout
        words = ["" if drop else caption for drop, caption in zip(dropped.tolist(), captions, strict=True)]
        return self._encode(pictures), self.pipe.encode_prompt(words)

    def validation(self) -> Iterator[tuple[torch.Tensor, Context]]:
        """Yield the pictures kept apart, without the bad ones: those that latents made of the source hold."""
        read = (self.source.good(i) for i in self._kept.tolist())
        good = (sample for sample in read if sample is not None)
        while samples := list(islice(good, _AT_ONCE)):
            pictures, captions = self._stacked(samples)
            yield self._encode(pictures), self.pipe.encode_prompt(captions)

    def _pictures(self, index: torch.Tensor, epoch: int) -> tuple[torch.Tensor, list[str]]:
        return self._stacked([self.source.read(i, epoch, self._trained) for i in index.tolist()])

    def _stacked(self, samples: Sequence[Sample]) -> tuple[torch.Tensor, list[str]]:
        return torch.stack([fitted(sample.picture, self.size) for sample in samples]), [s.caption for s in samples]

    @torch.no_grad()
    def _encode(self, pictures: torch.Tensor) -> torch.Tensor:
        there = as_input(pictures.to(self.device)).to(self.pipe.vae.dtype)
        return encode_pictures(self.pipe.vae, self.pipe.transformer.config, there).float()


class LatentFeed(Feed):
    """Latents that ``latteflow encode`` wrote, of one size or several; contexts are read where they were written too.

    Args:
        shards: the latents.
        validation: how many of the source's samples are kept apart: the ones that a ``PictureFeed`` of it keeps.
    """

    def __init__(self, shards: LatentShards, validation: int) -> None:
        self.shards = shards
        good = shards.good
        self._trained, self._kept = _divided(kept_apart(len(good), validation)[good], validation)
        self.number = len(self._trained)
        # Looked up here: a mistake found in a worker process, which asks for a step's samples, is no one-line message.
        self._buckets = shards.buckets[self._trained] if len(shards.sizes) > 1 else None
        self._batches: BucketedBatches | None = None

    def check(self, autoencoder: Mapping[str, Any], backbone: Mapping[str, Any]) -> None:
        """Refuse latents of another autoencoder, and contexts of another backbone."""
        self.shards.require({f"autoencoder.{field}": autoencoder[field] for field in ("sha256", "latent_scale")})
        if self.shards.contexts is not None:
            self.shards.contexts.require(backbone)

    def statistics(self, vae: Any) -> tuple[list[float], list[float]]:
        """Return mean and spread of all latents, as they were written down."""
        return self.shards.mean, self.shards.std

    def indices(self, step: int, batch_size: int, seed: int) -> torch.Tensor | None:
        """Return a step's samples by their numbers among the latents; of one size, where there are several."""
        if self._buckets is None:
            return self._trained[batch_indices(step, number=self.number, batch_size=batch_size, seed=seed)]
        if self._batches is None:
            self._batches = BucketedBatches(self._buckets, batch_size, seed)
        return self._trained[self._batches.indices(step)]

    def _read(self, samples: Samples) -> tuple[torch.Tensor, list[str], Context | None]:
        """Return latents, captions, and contexts of the captions and the empty prompt where they are on the disk."""
        return self._stored(samples.index)

    def _inputs(self, samples: Samples, data: Any, prompt_dropout: float) -> tuple[torch.Tensor, Context]:
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
        buckets = self.shards.buckets[self._kept]
        for bucket in buckets.unique().tolist():
            for index in self._kept[buckets == bucket].split(_AT_ONCE):
                latents, captions, contexts = self._stored(index)
                if contexts is None:
                    yield self._normalized(latents), self.pipe.encode_prompt(captions)
                else:
                    yield self._normalized(latents), contexts.select(torch.arange(len(index))).to(self.device)

    def _stored(self, index: torch.Tensor) -> tuple[torch.Tensor, list[str], Context | None]:
        contexts, stored = None, self.shards.contexts
        if stored is not None:
            contexts = stored.read(torch.cat([stored.numbers(index), torch.zeros(1, dtype=torch.int64)]))
        return self.shards.batch(index), [self.shards.caption(i) for i in index.tolist()], contexts

    def _normalized(self, latents: torch.Tensor) -> torch.Tensor:
        return normalized_latents(self.pipe.transformer.config, latents.to(self.device).float())


def _divided(apart: torch.Tensor, validation: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the numbers of the samples that are trained on, and of those that are kept apart, both in order."""
    trained, kept = (~apart).nonzero()[:, 0], apart.nonzero()[:, 0]
    if not len(trained):
        raise UserError(
            f"there are {len(apart)} samples, and data.validation keeps {validation} apart: none is left to train on"
        )
    return trained, kept
