"""Previews: a linear map from latents to pixels, fitted to the decoder, for a look at a picture that is not done."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderDC
from einops import rearrange
from PIL import Image

from latteflow.models.autoencoder import decode_latents

_PICTURES = 48
_RIDGE = 1e-3


class Preview:
    """One linear map for every place: a latent's channels to the pixels that it stands for.

    Args:
        weight: (channels + 1, 3 · factor²); the last row is added.
        factor: pixels a side of a latent.
    """

    def __init__(self, weight: torch.Tensor, factor: int) -> None:
        self.weight, self.factor = weight, factor

    @classmethod
    @torch.no_grad()
    def fit(cls, vae: AutoencoderDC, config: Any, latents: torch.Tensor) -> Preview:
        """Fit the map to what the decoder makes of normalised latents (number, channels, H, W), by least squares.

        Args:
            vae: the autoencoder.
            config: of the replica, with the latents' mean and spread.
            latents: what pictures of the model look like; see ``latents_for_fitting``.
        """
        factor = vae.spatial_compression_ratio
        pictures = decode_latents(vae, config, latents.to(vae.device, vae.dtype)).float().cpu()
        x = _rows(latents.float().cpu())
        y = rearrange(pictures, "b c (h i) (w j) -> (b h w) (c i j)", i=factor, j=factor)
        gram = x.T @ x + _RIDGE * len(x) * torch.eye(x.shape[1])
        return cls(torch.linalg.solve(gram, x.T @ y), factor)

    def __call__(self, latents: torch.Tensor) -> Image.Image:
        """Return the picture of normalised latents (1, channels, H, W), roughly."""
        pixels = rearrange(
            _rows(latents.float().cpu()) @ self.weight,
            "(h w) (c i j) -> (h i) (w j) c",
            h=latents.shape[2],
            i=self.factor,
            j=self.factor,
        )
        return Image.fromarray(((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy())


def latents_for_fitting(channels: int, rows: int, columns: int) -> torch.Tensor:
    """Return normalised latents that have colours and edges: noise at every scale, (number, channels, H, W). [D]

    Real pictures' latents would fit better; a model's folder holds none.
    """
    generator = torch.Generator().manual_seed(0)
    scales = []
    for side in (1, 2, 4, 8):
        noise = torch.randn(_PICTURES, channels, min(side, rows), min(side, columns), generator=generator)
        scales.append(torch.nn.functional.interpolate(noise, (rows, columns), mode="nearest"))
    return torch.stack(scales).mean(0) * len(scales) ** 0.5


def _rows(latents: torch.Tensor) -> torch.Tensor:
    """Return a row a place, with a 1 at its end, (places, channels + 1)."""
    x = rearrange(latents, "b c h w -> (b h w) c")
    return torch.cat([x, torch.ones(len(x), 1)], dim=1)
