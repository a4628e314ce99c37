"""Previews: a linear map from latents to pixels, fitted to the decoder, for a look at a picture that is not done."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderDC
from diffusers.image_processor import VaeImageProcessor
from einops import rearrange
from PIL import Image
from torch.nn import functional

from latteflow.models.autoencoder import encode_pictures

_RIDGE = 1e-3
"""Of the mean square of a normalised latent, which is about 1."""


class Preview:
    """One linear map for every place: a latent and its eight neighbours to the pixels that the latent stands for.

    Args:
        weight: (9 · channels + 1, 3 · factor²); the last row is added.
        factor: pixels a side of a latent.
    """

    def __init__(self, weight: torch.Tensor, factor: int) -> None:
        self.weight, self.factor = weight, factor

    @classmethod
    @torch.no_grad()
    def fit(cls, vae: AutoencoderDC, config: Any, images: Sequence[Image.Image]) -> Preview:
        """Fit the map to pictures of one size by least squares.

        A dozen pictures that the model draws without a prompt are enough: every place is an example. [D]

        Args:
            vae: the autoencoder.
            config: of the replica, with the latents' mean and spread.
            images: such as the model draws.
        """
        factor = vae.spatial_compression_ratio
        pictures = VaeImageProcessor().preprocess(list(images))
        latents = encode_pictures(vae, config, pictures.to(vae.device, vae.dtype))
        x = _neighbourhoods(latents)
        y = rearrange(pictures, "b c (h i) (w j) -> (b h w) (c i j)", i=factor, j=factor)
        gram = x.T @ x + _RIDGE * len(x) * torch.eye(x.shape[1])
        return cls(torch.linalg.solve(gram, x.T @ y), factor)

    @torch.no_grad()
    def __call__(self, latents: torch.Tensor) -> Image.Image:
        """Return the picture of normalised latents (1, channels, H, W), roughly."""
        pixels = rearrange(
            _neighbourhoods(latents) @ self.weight,
            "(h w) (c i j) -> (h i) (w j) c",
            h=latents.shape[2],
            i=self.factor,
            j=self.factor,
        )
        return Image.fromarray(((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy())


def _neighbourhoods(latents: torch.Tensor) -> torch.Tensor:
    """Return a row a place: the latents in 3x3 around it, those at the border repeated, and a 1."""
    padded = functional.pad(latents.float().cpu(), (1, 1, 1, 1), mode="replicate")
    rows = rearrange(functional.unfold(padded, 3), "b c n -> (b n) c")
    return torch.cat([rows, torch.ones(len(rows), 1)], dim=1)
