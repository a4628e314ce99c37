"""Rotary positions: of words and image grids, on one axis or on three that share the frequencies.

Multimodal rotary embedding (Qwen2-VL, arXiv 2409.12191, section 2.1) turns some of a head's frequencies with the time
position, some with the height, some with the width. For words the three positions are one: ordinary rotary embedding.
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


def raster_positions(start: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return the positions of a grid for a backbone with one axis, (1, B, height * width): one after the other. [D]"""
    return (torch.arange(height * width, device=start.device) + start[:, None])[None]


def axes_of_frequencies(sections: Sequence[int], *, interleaved: bool) -> list[int]:
    """Return which axis (0 time, 1 height, 2 width) turns each frequency, from the fastest to the slowest.

    Args:
        sections: how many frequencies time, height and width take.
        interleaved: in turns, as in Qwen3-VL, where time takes what the others leave; else one after the other, as in
            Qwen2-VL.
    """
    if not interleaved:
        return [axis for axis, length in enumerate(sections) for _ in range(length)]
    return [i % 3 if i < 3 * sections[i % 3] else 0 for i in range(sum(sections))]


def rotary_cos_sin(
    positions: torch.Tensor, *, head_dim: int, theta: float, axes: Sequence[int] = (), factor: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosine and sine, float32 (B, N, head_dim), of positions (axes, B, N).

    Args:
        positions: a position an axis.
        head_dim: width of an attention head.
        theta: base of the frequencies.
        axes: which axis turns each of the ``head_dim / 2`` frequencies; left out, the only one.
        factor: stretches the positions, as backbones for long prompts do ("linear" scaling).
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64, device=positions.device).float() / head_dim
    angles = positions[..., None].float() * (1.0 / theta**exponent / factor)
    if axes:
        index = torch.tensor(list(axes), device=angles.device).expand(1, *angles.shape[1:])
        merged = angles.gather(0, index)[0]
    else:
        (merged,) = angles
    both_halves = torch.cat([merged, merged], dim=-1)
    return both_halves.cos(), both_halves.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the heads x (B, heads, N, head_dim) by the angles of cos and sin (B, N, head_dim)."""
    left, right = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype)[:, None], sin.to(x.dtype)[:, None]
    return x * cos + torch.cat([-right, left], dim=-1) * sin
