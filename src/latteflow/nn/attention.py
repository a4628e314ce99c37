"""Latents attend to the frozen context and to one another."""

from __future__ import annotations

import torch
from torch import nn

from latteflow.nn.norm import RMSNorm
from latteflow.nn.residual_attention import ResidualAttention, attend
from latteflow.nn.rotary import rotate


class Attention(nn.Module):
    """Grouped-query attention whose weights are named as in the backbones, so that they copy by name.

    Args:
        hidden_size: width of the stream.
        num_heads: query heads.
        num_key_value_heads: key and value heads; divides ``num_heads``.
        head_dim: width of a head.
        bias: whether queries, keys and values have a bias (Qwen2 does, Llama does not).
        qk_norm_eps: eps of a norm over every head's queries and keys (Qwen3, Gemma3); None for no such norm.
        mode: how the attention map is carried on to the next layer.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        *,
        bias: bool,
        qk_norm_eps: float | None = None,
        mode: ResidualAttention,
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.mode: ResidualAttention = mode
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, num_key_value_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, num_key_value_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=False)
        self.q_norm = nn.Identity() if qk_norm_eps is None else RMSNorm(head_dim, qk_norm_eps)
        self.k_norm = nn.Identity() if qk_norm_eps is None else RMSNorm(head_dim, qk_norm_eps)

    def forward(
        self,
        x: torch.Tensor,
        *,
        rotary: tuple[torch.Tensor, torch.Tensor],
        context: tuple[torch.Tensor, torch.Tensor] | None = None,
        mask: torch.Tensor | None = None,
        gate: torch.Tensor | None = None,
        previous_map: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend from x (B, N, hidden_size).

        Args:
            x: the normalised stream of latents.
            rotary: cosine and sine (B, N, head_dim) of the latents' positions.
            context: the backbone layer's own keys (rotated) and values, each (B, key/value heads, T, head_dim).
            mask: bool, broadcastable to (B, heads, N, T + N), true where a key may be seen.
            gate: g(t), (B, heads, 1, 1).
            previous_map: the map of the layer before, (B, heads, N, N).

        Returns:
            (B, N, hidden_size) and this layer's map, None where maps are not carried.
        """
        query, key, value = (
            project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, heads, N, head_dim)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = rotate(self.q_norm(query), *rotary), rotate(self.k_norm(key), *rotary)
        if context is not None:
            key = torch.cat([context[0].to(key.dtype), key], dim=2)
            value = torch.cat([context[1].to(value.dtype), value], dim=2)
        out, attention_map = attend(
            query,
            key,
            value,
            image_tokens=x.shape[1],
            mask=mask,
            mode=self.mode,
            gate=gate,
            previous_map=previous_map,
        )
        return self.o_proj(out.transpose(1, 2).flatten(2)), attention_map
