"""Root-mean-square normalisation and modulation by the time embedding."""

from __future__ import annotations

import torch
from torch import nn


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight, over the last axis, in float32 as the backbones compute it.

    ``torch.nn.RMSNorm`` rounds differently; a replica has to return the backbone's bits.
    """

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise ``x`` (..., size)."""
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)

    def extra_repr(self) -> str:
        """Say the size and eps."""
        return f"{self.weight.shape[0]}, eps={self.eps}"


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return x · (1 + scale) + shift, for x (B, N, D) and shift, scale that go with it, such as (B, 1, D)."""
    return x * (1 + scale) + shift
