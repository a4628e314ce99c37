"""Time, patches, grid places and a whole prompt as vectors."""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional

from latteflow.nn.norm import RMSNorm

_TIME_SCALE = 1000.0
"""t in [0, 1] is spread over the range that sinusoidal embeddings were designed for; nobody outside multiplies."""


def sinusoidal(x: torch.Tensor, size: int, *, longest: float = 10_000.0) -> torch.Tensor:
    """Return cosines and sines of x (...) at ``size / 2`` frequencies from 1 to 1 / longest: float32 (..., size)."""
    half = size // 2
    frequencies = torch.exp(-math.log(longest) * torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angles = x.float()[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimeEmbedding(nn.Module):
    """t in [0, 1] to a vector: sinusoids and a two-layer perceptron, as in DiT (arXiv 2212.09748)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.inner = nn.Linear(size, size)
        self.outer = nn.Linear(size, size)

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        """Map t (B,) to (B, size)."""
        waves = sinusoidal(_TIME_SCALE * t, self.size).to(self.inner.weight.dtype)
        return self.outer(functional.silu(self.inner(waves)))


class PatchEmbedding(nn.Module):
    """Latents to tokens: a linear map of each patch, plus a learned map of its place in the grid."""

    def __init__(self, channels: int, patch_size: int, hidden_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.patch = nn.Linear(channels * patch_size**2, hidden_size)
        self.place = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, latents: torch.Tensor, places: torch.Tensor | None = None) -> torch.Tensor:
        """Map latents (B, C, H, W) to tokens (B, N, hidden_size), raster order.

        Args:
            latents: of which H and W are multiples of the patch size.
            places: what ``places_of`` returned for this grid before.
        """
        if places is None:
            places = self.places_of(*(side // self.patch_size for side in latents.shape[-2:]))
        return self.patch(patchify(latents, self.patch_size)) + places

    def places_of(self, height: int, width: int) -> torch.Tensor:
        """Return what is added for the places of a grid of tokens, (height * width, hidden_size)."""
        return self.place(self._places(height, width, self.place.weight.device))

    def _places(self, height: int, width: int, device: torch.device) -> torch.Tensor:
        size = self.place.in_features // 2
        # A short longest wavelength: grids are tens of tokens wide, not thousands.
        rows = sinusoidal(torch.arange(height, device=device), size, longest=100.0)
        columns = sinusoidal(torch.arange(width, device=device), size, longest=100.0)
        grid = torch.cat([rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)], dim=-1)
        return rearrange(grid, "h w d -> (h w) d").to(self.place.weight.dtype)


class PooledContext(nn.Module):
    """A whole prompt as one vector: its words' mean value, normalised, and a two-layer perceptron.

    Attention has to find words among latents before it can learn from them; this path is open from the start. As a
    mean, it brings little beyond what each word brings, so a thing and a style seen apart go together. [D]
    """

    def __init__(self, value_size: int, inner_size: int, hidden_size: int, norm_eps: float) -> None:
        super().__init__()
        self.norm = RMSNorm(value_size, norm_eps)
        self.inner = nn.Linear(value_size, inner_size)
        self.outer = nn.Linear(inner_size, hidden_size)

    @torch.no_grad()
    def initialize(self) -> None:
        """Set it to its start: nothing is added."""
        nn.init.ones_(self.norm.weight)
        self.inner.reset_parameters()
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, values: torch.Tensor, words: torch.Tensor | None = None) -> torch.Tensor:
        """Map a backbone layer's values (B, key/value heads, T, head_dim) to (B, 1, hidden_size).

        Args:
            values: of the prompts' words.
            words: bool (B, T), false where there is padding; None where there is none.
        """
        of_words = rearrange(values.float(), "b h t d -> b t (h d)")
        share = torch.ones_like(of_words[..., :1]) if words is None else words[..., None].float()
        mean = (of_words * share).sum(dim=1, keepdim=True) / share.sum(dim=1, keepdim=True)
        return self.outer(functional.silu(self.inner(self.norm(mean.to(self.inner.weight.dtype)))))


def patchify(latents: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Cut latents (B, C, H, W) into patches (B, N, C · patch_size²), raster order."""
    return rearrange(latents, "b c (h p) (w q) -> b (h w) (c p q)", p=patch_size, q=patch_size)


def unpatchify(patches: torch.Tensor, patch_size: int, height: int, width: int) -> torch.Tensor:
    """Put patches (B, N, C · patch_size²) back into latents (B, C, height, width); undoes ``patchify``."""
    return rearrange(
        patches,
        "b (h w) (c p q) -> b c (h p) (w q)",
        p=patch_size,
        q=patch_size,
        h=height // patch_size,
        w=width // patch_size,
    )
