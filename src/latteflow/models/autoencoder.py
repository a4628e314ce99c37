"""Pictures to latents and back: diffusers' ``AutoencoderDC``, and the one place where latents are scaled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Protocol

import torch
from diffusers import AutoencoderDC
from torch import nn

from latteflow.errors import UserError

_WIDTHS = (128, 256, 512, 512, 1024, 1024)
_MIXED_BLOCKS = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
_F32C32: dict[str, Any] = {
    "in_channels": 3,
    "latent_channels": 32,
    "attention_head_dim": 32,
    "encoder_block_types": _MIXED_BLOCKS,
    "decoder_block_types": _MIXED_BLOCKS,
    "encoder_block_out_channels": _WIDTHS,
    "decoder_block_out_channels": _WIDTHS,
    "decoder_norm_types": "rms_norm",
    "decoder_act_fns": "silu",
}
_SANA: dict[str, Any] = {
    **_F32C32,
    "encoder_layers_per_block": (2, 2, 2, 3, 3, 3),
    "decoder_layers_per_block": (3,) * 6,
    "encoder_qkv_multiscales": ((), (), (), (5,), (5,), (5,)),
    "decoder_qkv_multiscales": ((), (), (), (5,), (5,), (5,)),
    "downsample_block_type": "conv",
    "upsample_block_type": "interpolate",
    "scaling_factor": 0.41407,
}
_IMAGENET: dict[str, Any] = {
    **_F32C32,
    "encoder_layers_per_block": (0, 4, 8, 2, 2, 2),
    "decoder_layers_per_block": (0, 5, 10, 2, 2, 2),
    "encoder_qkv_multiscales": ((),) * 6,
    "decoder_qkv_multiscales": ((),) * 6,
    "decoder_norm_types": ("batch_norm",) * 3 + ("rms_norm",) * 3,
    "decoder_act_fns": ("relu",) * 3 + ("silu",) * 3,
    "downsample_block_type": "pixel_unshuffle",
    "upsample_block_type": "pixel_shuffle",
}

AUTOENCODERS: Mapping[str, Mapping[str, Any]] = {
    "dc-ae-f32c32-in-1.0": {**_IMAGENET, "scaling_factor": 0.3189},
    "dc-ae-f32c32-mix-1.0": {**_IMAGENET, "scaling_factor": 0.4552},
    "dc-ae-f32c32-sana-1.0": _SANA,
    "dc-ae-f32c32-sana-1.1": _SANA,
    "dc-ae-lite-f32c32-sana-1.1": {
        **_SANA,
        "decoder_block_types": "ResBlock",
        "decoder_layers_per_block": (0, 3, 5, 4, 4, 4),
        "decoder_qkv_multiscales": ((),) * 6,
        "decoder_conv_act_fn": "silu",
        "upsample_block_type": "pixel_shuffle",
    },
}
"""The published DC-AE that shrink 32 times into 32 channels, by name: whole arguments of ``AutoencoderDC``.

From the DC-AE authors' model zoo and diffusers' conversion script. Latents of one are nothing to another, but for the
three "sana", which share one encoder: a decoder of theirs may be put in place of another.
"""


def autoencoder_config(name: str) -> dict[str, Any]:
    """Return the arguments of ``AutoencoderDC`` for a published autoencoder, its own latent scale among them.

    Raises:
        UserError: there is no such name.
    """
    if name not in AUTOENCODERS:
        raise UserError(f"no autoencoder {name!r}: there are {', '.join(AUTOENCODERS)}")
    return dict(AUTOENCODERS[name])


def autoencoder_hub_id(name: str) -> str:
    """Return where the weights of a published autoencoder are, in diffusers' format.

    Raises:
        UserError: there is no such name.
    """
    autoencoder_config(name)
    return f"mit-han-lab/{name}-diffusers"


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
    return normalized_latents(statistics, latents)


def normalized_latents(statistics: LatentStatistics, scaled: torch.Tensor) -> torch.Tensor:
    """Return latents as the experts see them, of latents scaled by the autoencoder's factor."""
    mean, std = _mean_and_std(statistics, scaled)
    return (scaled - mean) / std


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
