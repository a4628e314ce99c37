"""Multimodal rotary positions (Qwen2-VL, arXiv 2409.12191, section 2.1): three axes share the frequencies.

Of the head's frequencies, from the fastest to the slowest, the first section turns with the time position, the next
with the height, the last with the width. For words the three positions are one: ordinary rotary embedding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def grid_positions(start: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return the positions of an image grid that follows a prompt. [D: the paper leaves the latents' positions open.]

    Args:
        start: int64 (B,), the first free position after each prompt.
        height: rows of tokens.
        width: columns of tokens.

    Returns:
        int64 (3, B, height * width): time, height and width position of each token, raster order.
    """
    rows = torch.arange(height, device=start.device).repeat_interleave(width)
    columns = torch.arange(width, device=start.device).repeat(height)
    return torch.stack([torch.zeros_like(rows), rows, columns])[:, None] + start[None, :, None]


def rotary_cos_sin(
    positions: torch.Tensor, *, head_dim: int, theta: float, sections: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosine and sine, float32 (B, N, head_dim), of positions (3, B, N).

    Args:
        positions: time, height and width positions.
        head_dim: width of an attention head.
        theta: base of the frequencies.
        sections: how many frequencies time, height and width take; they sum to ``head_dim / 2``.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64, device=positions.device).float() / head_dim
    angles = positions[..., None].float() * (1.0 / theta**exponent)
    parts = angles.split(list(sections), dim=-1)
    merged = torch.cat([part[axis] for axis, part in enumerate(parts)], dim=-1)
    both_halves = torch.cat([merged, merged], dim=-1)
    return both_halves.cos(), both_halves.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the heads x (B, heads, N, head_dim) by the angles of cos and sin (B, N, head_dim)."""
    left, right = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype)[:, None], sin.to(x.dtype)[:, None]
    return x * cos + torch.cat([-right, left], dim=-1) * sin
