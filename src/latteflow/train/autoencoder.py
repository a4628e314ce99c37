"""Stage one: a DC-AE that turns pictures into latents and back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from latteflow.data.captioned import CaptionedImages
from latteflow.data.grid import picture_grid
from latteflow.models.autoencoder import small_autoencoder
from latteflow.train.recipe import AutoencoderSection
from latteflow.train.samples import Samples
from latteflow.train.stage import Stage


class AutoencoderStage(Stage):
    """L1 on pixels and, if asked, on the differences of neighbouring pixels. [D: the paper takes a trained DC-AE.]"""

    def __init__(self, settings: AutoencoderSection, images: CaptionedImages, heldout: CaptionedImages) -> None:
        self.settings, self.images, self.heldout = settings, images, heldout
        self.model: nn.Module = small_autoencoder(
            latent_channels=settings.latent_channels, widths=settings.widths, layers=settings.layers
        )
        self.number = len(images)
        self.device = torch.device("cpu")

    def to(self, device: torch.device) -> None:
        """Remember where batches go."""
        self.device = device

    def loss(self, model: nn.Module, samples: Samples, data: Any) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        """Return the reconstruction loss of pictures, half of them mirrored at random."""
        x, generator = self.images.batch(samples.index), samples.generator
        mirrored = torch.rand(len(x), generator=generator) < 0.5
        x = torch.where(mirrored[:, None, None, None], x.flip(-1), x).to(self.device)
        y = model(x).sample if not self.settings.latent_noise else self._noisy(x, generator)
        pixel = (y.float() - x).abs().mean()
        edge = _edge_loss(y.float(), x)
        loss = (pixel + self.settings.gradient_weight * edge) * samples.share
        return loss, {"pixel": pixel.detach(), "edge": edge.detach()}

    def _noisy(self, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Decode latents with a little noise on them, so that the decoder forgives a generator's small errors."""
        latent = self.model.encode(x).latent  # type: ignore[operator]
        noise = torch.randn(latent.shape, generator=generator).to(latent)
        spread = latent.detach().float().std(dim=(0, 2, 3), keepdim=True).to(latent)
        return self.model.decode(latent + self.settings.latent_noise * spread * noise).sample  # type: ignore[operator]

    def validate(self) -> dict[str, float]:
        """Return PSNR in dB on 512 held-out pictures."""
        return {"psnr": mean_psnr(self.model, self.heldout.spread(512), self.device)}

    def preview(self) -> Image.Image:
        """Return held-out pictures above their reconstructions."""
        index = torch.linspace(0, len(self.heldout) - 1, 24).long()
        x = self.heldout.batch(index).to(self.device)
        y = self.model(x).sample.float()
        rows = [picture for pair in zip(x.split(12), y.split(12), strict=True) for picture in pair]
        return picture_grid(torch.cat(rows), columns=12)

    def export(self, folder: Path) -> None:
        """Write the autoencoder as diffusers loads it."""
        self.model.save_pretrained(folder)  # type: ignore[operator]


@torch.no_grad()
def mean_psnr(vae: nn.Module, images: CaptionedImages, device: torch.device) -> float:
    """Return the mean over pictures of 10 log10(1 / mean squared error), in dB, pixels in [0, 1]."""
    found, dtype = [], next(vae.parameters()).dtype
    for index in torch.arange(len(images)).split(64):
        x = images.batch(index).to(device)
        y = vae(x.to(dtype)).sample.float().clamp(-1, 1)
        found.append(-10 * torch.log10(((y - x) / 2).square().mean(dim=(1, 2, 3))))
    return torch.cat(found).mean().item()


def _edge_loss(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    difference = y - x
    return difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
