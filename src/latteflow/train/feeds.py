"""Where a generator's latents and contexts come from: memory, pictures, or latents computed ahead.

None depends on weights that train, nor on t. A small set is computed once and kept; a large one is read sample by
sample in worker processes, and encoded on the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from einops import rearrange
from torch.utils.data import get_worker_info

from latteflow.data.captioned import CaptionedImages
from latteflow.data.loader import generator_of
from latteflow.data.prompts import canonical_caption, draw_caption
from latteflow.data.transforms import nudge
from latteflow.errors import UserError
from latteflow.models.autoencoder import encode_pictures
from latteflow.models.context import Context, concatenate
from latteflow.pipeline import LatteFlowPipeline
from latteflow.train.samples import Samples

_AT_ONCE = 256
_FURTHEST = 2
"""Pixels that a copy is moved by at most: whole ones, so that strokes stay sharp."""


class Feed:
    """What a generator's stage asks of its data."""

    number: int
    """How many training samples there are."""
    pipe: LatteFlowPipeline
    device: torch.device

    def check(self, autoencoder: Mapping[str, Any], backbone: Mapping[str, Any]) -> None:
        """Refuse what was computed ahead with other frozen parts than these, told by their identities.

        Raises:
            UserError: it was.
        """

    def prepare(self, pipe: LatteFlowPipeline, device: torch.device) -> None:
        """Take the frozen parts, on their device, and compute what is computed ahead."""
        self.pipe, self.device = pipe, device

    def statistics(self, vae: Any) -> tuple[list[float], list[float]]:
        """Return mean and spread a channel of the scaled latents of some training pictures."""
        raise NotImplementedError

    def indices(self, step: int, batch_size: int, seed: int) -> torch.Tensor | None:
        """Return a step's samples where not any can stand together; None for the loop's own order."""
        return None

    def read(self, samples: Samples) -> Any:
        """Return what comes from the disk, for ``inputs``; called in worker processes where there are some.

        What a worker raises comes to the user as the text of a traceback. That is right for a fault of the program;
        a user's mistake and a failing disk are returned instead, and ``inputs`` raises them.

        Raises:
            UserError: the samples cannot be read, and this is no worker process.
            OSError: the disk fails, and this is no worker process.
        """
        try:
            return self._read(samples)
        except (UserError, OSError) as error:
            if get_worker_info() is None:
                raise
            # Made anew: what a library's own kind of OSError holds need not survive the way between processes.
            return (UserError if isinstance(error, UserError) else OSError)(str(error))

    def inputs(self, samples: Samples, data: Any, prompt_dropout: float) -> tuple[torch.Tensor, Context]:
        """Return latents (n, channels, height, width) and contexts on the device, some of the empty prompt.

        Raises:
            UserError: ``data`` could not be read.
            OSError: ``data`` could not be read.
        """
        if isinstance(data, (UserError, OSError)):
            raise data
        return self._inputs(samples, data, prompt_dropout)

    def _read(self, samples: Samples) -> Any:
        return None

    def _inputs(self, samples: Samples, data: Any, prompt_dropout: float) -> tuple[torch.Tensor, Context]:
        raise NotImplementedError

    def validation(self) -> Iterator[tuple[torch.Tensor, Context]]:
        """Yield latents and contexts, in parts, of pictures that no step sees."""
        raise NotImplementedError


class MemoryFeed(Feed):
    """A captioned set in memory: every picture's latents, and a few captions' contexts, are computed once.

    Args:
        images: to train on.
        heldout: to validate on, with their canonical captions.
        captions_per_image: captions of a picture; the first is its canonical one, the others are drawn.
        seed: of that draw, and of the copies'.
        copies_per_image: latents of a picture; the first are its own, the others of copies that are moved a little.
    """

    def __init__(
        self,
        images: CaptionedImages,
        heldout: CaptionedImages,
        captions_per_image: int,
        seed: int,
        *,
        copies_per_image: int = 1,
    ) -> None:
        self.images, self.heldout, self.seed = images, heldout, seed
        self.captions_per_image, self.copies_per_image = captions_per_image, copies_per_image
        self.number = len(images)

    def prepare(self, pipe: LatteFlowPipeline, device: torch.device) -> None:
        """Compute all latents and contexts."""
        super().prepare(pipe, device)
        copies = (self._encode(self.images, copy) for copy in range(self.copies_per_image))
        self.latents = rearrange(list(copies), "copy n c h w -> (n copy) c h w")
        captions = [caption for number in range(self.number) for caption in self._captions(number)]
        self.contexts = self._contexts([*captions, ""])
        self.heldout_latents = self._encode(self.heldout)
        self.heldout_contexts = self._contexts([canonical_caption(record) for record in self.heldout.records])

    def _captions(self, number: int) -> list[str]:
        record = self.images.records[number]
        generators = (generator_of(self.seed, "caption", number, i) for i in range(1, self.captions_per_image))
        return [canonical_caption(record), *(draw_caption(record, generator) for generator in generators)]

    @torch.no_grad()
    def statistics(self, vae: Any) -> tuple[list[float], list[float]]:
        """Return mean and spread over at most 2,048 pictures."""
        index = torch.linspace(0, self.number - 1, min(2048, self.number)).long()
        return channel_statistics([vae.encode(self.images.batch(part)).latent for part in index.split(_AT_ONCE)], vae)

    def _inputs(self, samples: Samples, data: Any, prompt_dropout: float) -> tuple[torch.Tensor, Context]:
        """Pick what was computed ahead."""
        caption = samples.integers("caption", self.captions_per_image)
        dropped = samples.rand("dropped prompt") < prompt_dropout
        copy = samples.integers("copy", self.copies_per_image)
        picture = samples.index * self.copies_per_image + copy
        # The empty prompt's context stands behind all others.
        which = torch.where(dropped, len(self.contexts) - 1, samples.index * self.captions_per_image + caption)
        return self.latents[picture.to(self.device)], self.contexts.select(which.to(self.device)).trim()

    def validation(self) -> Iterator[tuple[torch.Tensor, Context]]:
        """Yield all held-out pictures."""
        for index in torch.arange(len(self.heldout)).split(_AT_ONCE):
            there = index.to(self.device)
            yield self.heldout_latents[there], self.heldout_contexts.select(there)

    @torch.no_grad()
    def _encode(self, images: CaptionedImages, copy: int = 0) -> torch.Tensor:
        vae, config = self.pipe.vae, self.pipe.transformer.config
        found = []
        for part, index in enumerate(torch.arange(len(images)).split(_AT_ONCE)):
            pictures = images.batch(index)
            if copy:
                pictures = nudge(pictures, generator_of(self.seed, "copy", copy, part), _FURTHEST)
            found.append(encode_pictures(vae, config, pictures.to(self.device)))
        return torch.cat(found)

    def _contexts(self, captions: Sequence[str]) -> Context:
        """Return the contexts of captions in bfloat16: half the memory of what is read once a step."""
        found = [
            self.pipe.encode_prompt(captions[start : start + _AT_ONCE]).to(torch.bfloat16)
            for start in range(0, len(captions), _AT_ONCE)
        ]
        return concatenate(found)


def channel_statistics(latents: Sequence[torch.Tensor], vae: Any) -> tuple[list[float], list[float]]:
    """Return mean and spread a channel of an autoencoder's raw latents, scaled by its factor."""
    scaled = torch.cat(list(latents)) * vae.config.scaling_factor
    return scaled.mean((0, 2, 3)).tolist(), scaled.std((0, 2, 3)).tolist()
