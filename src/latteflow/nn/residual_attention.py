"""Timestep-conditioned residual attention: A^l <- A^l + g^l(t) · A^{l-1}, the paper's third idea.

A^l is the image-to-image block of layer l's attention map, all heads; g^l(t) is one number a head, from the time
embedding; the first layer of a group has no predecessor. The map that is handed on is the accumulated one. [D]

Two readings of "attention map" are offered, the paper being silent:

- ``probs``  the map after softmax, normalised over context and latents together;
- ``logits`` the scaled scores before softmax, so that A^{l-1} acts as an additive bias.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn
from torch.nn import functional

ResidualAttention = Literal["probs", "logits", "none"]


class ResidualGate(nn.Module):
    """g(t) = tanh(W · time embedding), one number a head in (-1, 1); W starts at zero, so that the gate does. [D]"""

    def __init__(self, time_size: int, num_heads: int) -> None:
        super().__init__()
        self.project = nn.Linear(time_size, num_heads)

    def forward(self, time: torch.Tensor) -> torch.Tensor:
        """Map the time embedding (B, time_size) to gates (B, heads, 1, 1)."""
        return torch.tanh(self.project(functional.silu(time)))[:, :, None, None]


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    image_tokens: int,
    mask: torch.Tensor | None,
    mode: ResidualAttention,
    gate: torch.Tensor | None,
    previous_map: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend from latents to context and latents, the image block helped by the layer before.

    Args:
        query: (B, heads, N, D).
        key: (B, key/value heads, T + N, D), context first.
        value: like ``key``.
        image_tokens: N, how many of the keys, at the end, are latents.
        mask: bool, broadcastable to (B, heads, N, T + N), true where a key may be seen; None lets all be seen.
        mode: how the map is carried on.
        gate: g(t), (B, heads, 1, 1); None in the first layer of a group.
        previous_map: A^{l-1}, (B, heads, N, N); None in the first layer of a group.

    Returns:
        The heads' outputs (B, heads, N, D) and the accumulated map A^l, None where ``mode`` is "none".
    """
    if mode == "none":
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True), None
    if mode == "logits":
        return _attend_with_logits(query, key, value, image_tokens, mask, gate, previous_map)
    return _attend_with_probs(query, key, value, image_tokens, mask, gate, previous_map)


def _attend_with_probs(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    image_tokens: int,
    mask: torch.Tensor | None,
    gate: torch.Tensor | None,
    previous_map: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = _scores(query, key)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    probs = scores.softmax(dim=-1)
    if gate is not None and previous_map is not None:
        image_map = probs[..., -image_tokens:] + gate * previous_map
        probs = torch.cat([probs[..., :-image_tokens], image_map], dim=-1)
    return _per_key_head(probs.to(value.dtype), value), probs[..., -image_tokens:]


def _attend_with_logits(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    image_tokens: int,
    mask: torch.Tensor | None,
    gate: torch.Tensor | None,
    previous_map: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    image_map = _scores(query, key[:, :, -image_tokens:])
    bias = torch.zeros(*image_map.shape[:-1], key.shape[2], dtype=query.dtype, device=query.device)
    if gate is not None and previous_map is not None:
        carried = gate * previous_map
        image_map = image_map + carried
        bias[..., -image_tokens:] = carried.to(query.dtype)
    if mask is not None:
        bias = bias.masked_fill(~mask, float("-inf"))
    out = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, enable_gqa=True)
    return out, image_map


def _scores(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Scaled scores in float32: softmax in half precision loses the tail that the gate adds to."""
    return _per_key_head(query, key.transpose(-1, -2)).float() * query.shape[-1] ** -0.5


def _per_key_head(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Multiply x (B, heads, N, I) by y (B, key/value heads, I, J), one of ``y`` for several heads of ``x`` in a row.

    The heads that share a key head are stacked: one product a key head, and no copy of a key for every query head.
    """
    # Plain reshapes: between the products of a small model, reading an einops pattern takes as long as a kernel.
    product = x.unflatten(1, (y.shape[1], -1)).flatten(2, 3) @ y
    return product.unflatten(2, (-1, x.shape[2])).flatten(1, 2)
