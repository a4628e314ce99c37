"""The gated feed-forward of the Llama and Qwen families."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional


class FeedForward(nn.Module):
    """down(silu(gate(x)) · up(x)); weights are named as in the backbones, so that they copy by name."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``x`` (..., hidden_size) to the same shape."""
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
