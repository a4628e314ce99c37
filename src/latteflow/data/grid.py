"""Pictures side by side."""

from __future__ import annotations

import torch
from einops import rearrange
from PIL import Image


def picture_grid(pictures: torch.Tensor, *, columns: int) -> Image.Image:
    """Return one image of many, row by row.

    Args:
        pictures: float, (number, 3, height, width), in [-1, 1] (clamped).
        columns: pictures a row; the last row is filled with white.
    """
    missing = -len(pictures) % columns
    blank = torch.ones(missing, *pictures.shape[1:])
    pictures = torch.cat([pictures.detach().float().cpu(), blank])
    grid = rearrange(pictures, "(row column) c h w -> (row h) (column w) c", column=columns)
    return Image.fromarray(((grid.clamp(-1, 1) + 1) * 127.5).round().byte().numpy())
