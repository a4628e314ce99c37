"""Pictures as tensors: the backbone's patches, and augmentation that keeps left and right."""

from __future__ import annotations

import torch
from einops import rearrange
from torch.nn import functional


def patches_of(pictures: torch.Tensor, *, patch_size: int, merge_size: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what a Qwen2-VL image processor makes of pictures of one size, many at a time.

    Args:
        pictures: float in [-1, 1], (number, 3, height, width); both sides multiples of ``patch_size * merge_size``.
        patch_size: side of a patch in pixels.
        merge_size: side, in patches, of the square that becomes one token.

    Returns:
        ``pixel_values`` (number * patches, 3 * patch_size ** 2), patches of one square side by side, and
        ``image_grid_thw`` int64 (number, 3).
    """
    number, _, height, width = pictures.shape
    patches = rearrange(
        pictures,
        "n c (h mh p) (w mw q) -> (n h w mh mw) (c p q)",
        p=patch_size,
        q=patch_size,
        mh=merge_size,
        mw=merge_size,
    )
    grid = torch.tensor([1, height // patch_size, width // patch_size]).expand(number, 3)
    return patches, grid.to(pictures.device)


def augment(pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return pictures moved, scaled and slightly recoloured at random, on white; never mirrored.

    Args:
        pictures: float in [-1, 1], (number, 3, height, width).
        generator: a CPU generator; all draws come from it.
    """
    number = len(pictures)
    draw = torch.rand(number, 6, generator=generator)
    scale = 0.85 + 0.35 * draw[:, 0]  # of the sampling grid: above 1 the picture shrinks
    shift = (draw[:, 1:3] - 0.5) * 0.25
    affine = torch.zeros(number, 2, 3)
    affine[:, 0, 0] = affine[:, 1, 1] = scale
    affine[:, :, 2] = shift
    grid = functional.affine_grid(affine, list(pictures.shape), align_corners=False).to(pictures)
    ink = functional.grid_sample(1 - pictures, grid, align_corners=False)  # white is 0, so that padding is white
    gain = (0.85 + 0.3 * draw[:, 3:6])[:, :, None, None].to(pictures)
    return (1 - ink * gain).clamp(-1, 1)
