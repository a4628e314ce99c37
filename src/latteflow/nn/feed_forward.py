"""The gated feed-forward of the Llama, Qwen and Gemma families."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from torch import nn
from torch.nn import functional

Activation = Literal["silu", "gelu_tanh"]

_ACTIVATIONS = {"silu": functional.silu, "gelu_tanh": partial(functional.gelu, approximate="tanh")}


class FeedForward(nn.Module):
    """down(activation(gate(x)) · up(x)); weights are named as in the backbones, so that they copy by name."""

    def __init__(self, hidden_size: int, intermediate_size: int, activation: Activation = "silu") -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.activation = _ACTIVATIONS[activation]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``x`` (..., hidden_size) to the same shape."""
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))
