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


def nudge(pictures: torch.Tensor, generator: torch.Generator, furthest: int = 3) -> torch.Tensor:
    """Return pictures moved by up to ``furthest`` whole pixels each way, on white: every pixel keeps its value.

    Strokes and shading tell a style, and resampling blurs them.
    """
    padded = functional.pad(pictures, (furthest,) * 4, value=1.0)
    moves = torch.randint(2 * furthest + 1, (len(pictures), 2), generator=generator).tolist()
    height, width = pictures.shape[-2:]
    return torch.stack(
        [
            picture[:, down : down + height, right : right + width]
            for picture, (down, right) in zip(padded, moves, strict=True)
        ]
    )


def soften(pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return pictures blurred more or less, half of them twice, with a little smooth noise off the white.

    What a decoder does to a picture, whatever decoder: its things and strokes stay, its last sharpness goes.
    """
    number, channels = pictures.shape[:2]
    binomial = torch.tensor([1.0, 2.0, 1.0]) / 4
    kernel = (binomial[:, None] * binomial).expand(channels, 1, 3, 3).to(pictures)

    def blurred(x: torch.Tensor) -> torch.Tensor:
        return functional.conv2d(functional.pad(x, (1, 1, 1, 1), mode="replicate"), kernel, groups=channels)

    draw = torch.rand(number, 3, generator=generator).to(pictures)[:, :, None, None, None]
    once = pictures + draw[:, 0] * (blurred(pictures) - pictures)
    twice = once + draw[:, 0] * (blurred(once) - once)
    soft = torch.where(draw[:, 1] < 0.5, once, twice)
    noise = blurred(torch.randn(pictures.shape, generator=generator).to(pictures)) * 0.12 * draw[:, 2]
    inked = (1 - pictures).abs().amax(dim=1, keepdim=True) > 0.05
    return (soft + noise * inked).clamp(-1, 1)


def distort(pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return pictures scaled, turned, moved and recoloured far more than ``augment`` does; never mirrored.

    Half of them lose a square of 8 to 24 pixels of 64, one in fifteen its colours: what is left is still to be named.

    Args:
        pictures: float in [-1, 1], (number, 3, height, width).
        generator: a CPU generator; all draws come from it.
    """
    number, _, height, width = pictures.shape
    draw = torch.rand(number, 10, generator=generator)
    scale, aspect = 0.75 + 0.5 * draw[:, 0], 1 + 0.3 * (draw[:, 1] - 0.5)
    angle = 0.7 * (draw[:, 2] - 0.5)
    affine = torch.zeros(number, 2, 3)
    affine[:, 0, 0], affine[:, 0, 1] = scale * aspect * angle.cos(), -scale * aspect * angle.sin()
    affine[:, 1, 0], affine[:, 1, 1] = scale / aspect * angle.sin(), scale / aspect * angle.cos()
    affine[:, :, 2] = 0.4 * (draw[:, 3:5] - 0.5)
    grid = functional.affine_grid(affine, list(pictures.shape), align_corners=False).to(pictures)
    ink = functional.grid_sample(1 - pictures, grid, align_corners=False)  # white is 0, so that padding is white
    mixing = torch.eye(3) + 0.1 * torch.randn(number, 3, 3, generator=generator)
    gain = (0.7 + 0.6 * draw[:, 5])[:, None, None]
    changed = 1 - torch.einsum("nij,njhw->nihw", (mixing * gain).to(pictures), ink)
    grey = (draw[:, 6] < 1 / 15)[:, None, None, None].to(pictures.device)
    changed = torch.where(grey, changed.mean(dim=1, keepdim=True), changed)
    hole = _squares(draw[:, 7:10], height, width) & (torch.rand(number, generator=generator) < 0.5)[:, None, None]
    colour = 0.5 * torch.randn(number, 3, 1, 1, generator=generator)
    return torch.where(hole[:, None].to(pictures.device), colour.to(pictures), changed).clamp(-1, 1)


def _squares(draw: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return masks (number, height, width) of squares: centre and side (an eighth to three) from (number, 3) draws."""
    half = (height / 8 + height / 4 * draw[:, 2])[:, None] / 2
    rows = (torch.arange(height) - draw[:, 0:1] * height).abs() < half
    columns = (torch.arange(width) - draw[:, 1:2] * width).abs() < half
    return rows[:, :, None] & columns[:, None, :]


def blend(
    pictures: torch.Tensor, generator: torch.Generator, share: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Lay another picture of the batch over about ``share`` of the pictures.

    Returns:
        The pictures; int64 (number,), which other each was blended with; float (number,), how much of its own is left
        (1 where nothing was done).
    """
    number = len(pictures)
    other = torch.randperm(number, generator=generator)
    # Kumaraswamy's a = b = 0.6: mostly one of the two, like the Beta distribution of mixup, from ordinary draws.
    own = 1 - (1 - torch.rand(number, generator=generator)) ** (1 / 0.6)
    own = own ** (1 / 0.6)
    own = torch.where(torch.rand(number, generator=generator) < share, own, 1.0)
    weight = own[:, None, None, None].to(pictures)
    return weight * pictures + (1 - weight) * pictures[other], other, own
