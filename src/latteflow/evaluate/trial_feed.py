"""Latents and contexts of a captioned set, computed once for all runs of a plan and kept in a file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from latteflow.data.captioned import CaptionedImages
from latteflow.data.prompts import canonical_caption, with_article
from latteflow.data.shards import ShardDamaged, open_shard, tensors_sha256, write_shard
from latteflow.errors import UserError
from latteflow.models.context import Context
from latteflow.pipeline import LatteFlowPipeline
from latteflow.train.feeds import MemoryFeed
from latteflow.train.samples import Samples

Wording = Literal["captions", "classes"]
"""What a prompt says: a set's captions, or the name alone, "a shirt"."""

_FEW = 256


class TrialFeed(MemoryFeed):
    """A captioned set in memory whose latents and contexts are computed once and kept in a file.

    One feed serves any number of runs, whatever their seeds: captions are drawn with seed 0.

    Args:
        images: to train on.
        heldout: to read the loss on.
        captions_per_image: captions of a picture, as in ``MemoryFeed``; one where ``wording`` is "classes".
        wording: what prompts say.
        cache: the file, written if it is not there or is of other pictures, captions or frozen parts.
    """

    def __init__(
        self, images: CaptionedImages, heldout: CaptionedImages, captions_per_image: int, wording: Wording, cache: Path
    ) -> None:
        super().__init__(images, heldout, 1 if wording == "classes" else captions_per_image, seed=0)
        self.wording: Wording = wording
        self.cache = cache
        self.channels: tuple[list[float], list[float]] | None = None
        self.identity: str | None = None
        self.ready = False

    def check(self, autoencoder: Mapping[str, Any], backbone: Mapping[str, Any]) -> None:
        """Take what the file holds, if it was made with these frozen parts.

        Raises:
            UserError: the feed already holds what was computed with others.
        """
        captions = [self._captions(number) for number in range(self.number)]
        words = json.dumps([dict(autoencoder), dict(backbone), captions, self._canonical()], sort_keys=True)
        pixels = tensors_sha256({"train": self.images.pixels, "heldout": self.heldout.pixels})
        identity = hashlib.sha256(f"{pixels} {words}".encode()).hexdigest()
        if self.identity not in (None, identity):
            raise UserError("all runs of a plan have one autoencoder and one backbone: take them from the base recipe")
        if self.identity is None:
            self.identity = identity
            self._open()

    def statistics(self, vae: Any) -> tuple[list[float], list[float]]:
        """Return mean and spread a channel, computed once."""
        self.channels = self.channels or super().statistics(vae)
        return self.channels

    def prepare(self, pipe: LatteFlowPipeline, device: torch.device) -> None:
        """Compute what the file does not hold, and write it."""
        self.pipe, self.device = pipe, device
        if self.ready:
            return
        captions = [caption for number in range(self.number) for caption in self._captions(number)]
        canonical = self._canonical()
        unique = {caption: place for place, caption in enumerate(dict.fromkeys([*captions, *canonical, ""]))}
        contexts = self._contexts(list(unique))
        mean, std = self.statistics(pipe.vae)
        tensors = {
            "latents": self._encode(self.images),
            "heldout_latents": self._encode(self.heldout),
            "keys": contexts.keys,
            "values": contexts.values,
            "mask": contexts.mask,
            "next_position": contexts.next_position,
            "captions": torch.tensor([unique[caption] for caption in captions]),
            "heldout_captions": torch.tensor([unique[caption] for caption in canonical]),
            "empty": torch.tensor(unique[""]),
            "mean": torch.tensor(mean, dtype=torch.float64),
            "std": torch.tensor(std, dtype=torch.float64),
        }
        self.cache.parent.mkdir(parents=True, exist_ok=True)
        write_shard(self.cache, {name: tensor.cpu() for name, tensor in tensors.items()}, {"identity": self.identity})
        self._open()

    def parts(self) -> Iterator[tuple[str, torch.Tensor, Context]]:
        """Yield "loss" with held-out and "seen" with as many training pictures: latents and contexts, in parts."""
        held = torch.arange(len(self.heldout))
        seen = torch.linspace(0, self.number - 1, min(len(held), self.number)).long()
        first = self.captions.view(self.number, -1)[:, 0]
        for name, index, latents, captions in (
            ("loss", held, self.heldout_latents, self.heldout_captions),
            ("seen", seen, self.latents, first),
        ):
            for some in index.split(_FEW):
                yield name, latents[some].to(self.device), self._context(captions[some])

    def _open(self) -> None:
        try:
            found, about = open_shard(self.cache)
        except ShardDamaged:
            return
        if about.get("identity") != self.identity:
            return
        self.latents, self.heldout_latents = found["latents"], found["heldout_latents"]
        self.contexts = Context(found["keys"], found["values"], found["mask"], found["next_position"])
        self.captions, self.heldout_captions, self.empty = found["captions"], found["heldout_captions"], found["empty"]
        self.channels, self.ready = (found["mean"].tolist(), found["std"].tolist()), True

    def _captions(self, number: int) -> list[str]:
        if self.wording == "classes":
            return [with_article(self.images.records[number].label)]
        return super()._captions(number)

    def _canonical(self) -> list[str]:
        return prompts_of(self.heldout, self.wording)

    def _context(self, captions: torch.Tensor) -> Context:
        return self.contexts.select(captions).trim().to(self.device)

    def _inputs(self, samples: Samples, data: Any, prompt_dropout: float) -> tuple[torch.Tensor, Context]:
        caption = samples.integers("caption", self.captions_per_image)
        dropped = samples.rand("dropped prompt") < prompt_dropout
        which = self.captions[samples.index * self.captions_per_image + caption]
        return self.latents[samples.index].to(self.device), self._context(torch.where(dropped, self.empty, which))


def prompts_of(images: CaptionedImages, wording: Wording) -> list[str]:
    """Return the one prompt that stands for each picture."""
    if wording == "classes":
        return [with_article(record.label) for record in images.records]
    return [canonical_caption(record) for record in images.records]
