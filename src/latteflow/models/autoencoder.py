"""Pictures to latents and back: diffusers' ``AutoencoderDC``, and the one place where latents are scaled."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

import torch
from diffusers import AutoencoderDC
from torch import nn

from latteflow.errors import UserError


def small_autoencoder(*, latent_channels: int, widths: Sequence[int], layers: Sequence[int]) -> AutoencoderDC:
    """Return an untrained convolutional DC-AE that shrinks pictures ``2 ** (len(widths) - 1)`` times.

    Args:
        latent_channels: channels of the latents.
        widths: channels a stage, from full resolution down; neighbours have to divide one another.
        layers: residual blocks a stage. 0 in front joins the first stage to the second, which saves the work at
            full resolution: almost half of the time a step at 64x64, measured in docs/LOG.md.

    Raises:
        UserError: the two lists differ in length, or neighbouring widths do not divide.
    """
    if len(widths) != len(layers) or len(widths) < 2:
        raise UserError(f"an autoencoder needs a width and a block count a stage: got {list(widths)}, {list(layers)}")
    for small, large in pairwise(widths):
        if large % small and small % large:
            raise UserError(f"widths of neighbouring stages have to divide one another: {small} and {large} do not")
    stages = len(widths)
    return AutoencoderDC(
        in_channels=3,
        latent_channels=latent_channels,
        attention_head_dim=32,
        encoder_block_types=("ResBlock",) * stages,  # type: ignore[arg-type]
        decoder_block_types=("ResBlock",) * stages,  # type: ignore[arg-type]
        encoder_block_out_channels=tuple(widths),
        decoder_block_out_channels=tuple(widths),
        encoder_layers_per_block=tuple(layers),
        decoder_layers_per_block=tuple(layers),
        encoder_qkv_multiscales=((),) * stages,
        decoder_qkv_multiscales=((),) * stages,
        downsample_block_type="pixel_unshuffle",
        upsample_block_type="pixel_shuffle",
        scaling_factor=1.0,
    )


class LatentStatistics(Protocol):
    """Where mean and spread a channel are written down: the replica's config."""

    latents_mean: Sequence[float]
    latents_std: Sequence[float]


def encode_pictures(vae: nn.Module, statistics: LatentStatistics, pictures: torch.Tensor) -> torch.Tensor:
    """Return latents as the experts see them: scaled by the autoencoder's factor, then mean 0 and spread 1 a channel.

    Args:
        vae: an ``AutoencoderDC``.
        statistics: the replica's config; empty mean and spread stand for 0 and 1.
        pictures: in [-1, 1], (B, 3, height, width).

    Returns:
        (B, latent_channels, height / factor, width / factor).
    """
    latents = vae.encode(pictures).latent * vae.config.scaling_factor  # type: ignore[operator, union-attr]
    mean, std = _mean_and_std(statistics, latents)
    return (latents - mean) / std


def decode_latents(vae: nn.Module, statistics: LatentStatistics, latents: torch.Tensor) -> torch.Tensor:
    """Return pictures, about [-1, 1], of latents as the experts see them; undoes ``encode_pictures``."""
    mean, std = _mean_and_std(statistics, latents)
    latents = (latents * std + mean) / vae.config.scaling_factor  # type: ignore[operator, union-attr]
    return vae.decode(latents).sample  # type: ignore[operator]


def _mean_and_std(statistics: LatentStatistics, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    channels = latents.shape[1]
    mean = latents.new_tensor(list(statistics.latents_mean) or [0.0] * channels)
    std = latents.new_tensor(list(statistics.latents_std) or [1.0] * channels)
    return mean[:, None, None], std[:, None, None]
