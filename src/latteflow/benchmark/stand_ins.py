"""Shapes of models that no library has, with the attention and feed-forward of ``latteflow.nn``.

A stand-in runs the matrix products of its model at their shapes, and no more: fewer norms, no routing, no scheduler. So
it is, if anything, faster than the model itself. Only some of the layers are built, without the head; the report
multiplies.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn import functional

from latteflow.benchmark.case import Case, count, matrix_numbers
from latteflow.benchmark.weights import with_random_weights
from latteflow.nn.attention import Attention
from latteflow.nn.feed_forward import FeedForward
from latteflow.nn.norm import RMSNorm


@dataclass(frozen=True)
class Geometry:
    """A stand-in's sizes."""

    name: str
    what: str
    hidden: int
    intermediate: int
    layers: int
    layers_timed: int
    heads: int
    key_value_heads: int
    gated: bool
    """A gated feed-forward (three matrices), else a plain one (two)."""
    prompt_tokens: int
    prompt_cached: bool
    """Whether the prompt's keys and values are kept, or its tokens go through every layer at every step."""
    tokens: int
    out: int
    """Numbers a token that the head gives."""
    steps: int
    guided_steps: int
    """Of those, with two sequences; the others cost half."""
    resolution: int = 256


BAGEL_7B = Geometry(
    name="BAGEL-7B-shaped",
    what="stand-in: Qwen2.5-7B layers with query and key norms (the experts of latent tokens), prompt cached; "
    "2 sequences where t is above 0.4 of shift 3, one elsewhere; no FLUX VAE",
    hidden=3584,
    intermediate=18944,
    layers=28,
    layers_timed=2,
    heads=28,
    key_value_heads=4,
    gated=True,
    prompt_tokens=32,
    prompt_cached=True,
    tokens=256,
    out=64,
    steps=50,
    # t runs evenly from 1 to 0 before the shift, which takes s to 3 s / (1 + 2 s): above 0.4 where s > 2 / 11
    guided_steps=sum(3 * s / (1 + 2 * s) > 0.4 for s in (1 - number / 50 for number in range(50))),
)
SHOW_O = Geometry(
    name="Show-o-shaped",
    what="stand-in: phi-1.5 layers over prompt and picture, nothing cached, scores of 8,192 picture tokens; "
    "no MAGVIT-v2",
    hidden=2048,
    intermediate=8192,
    layers=24,
    layers_timed=6,
    heads=32,
    key_value_heads=32,
    gated=False,
    prompt_tokens=32,
    prompt_cached=False,
    tokens=256,
    out=8192,
    steps=50,
    guided_steps=50,
)


class _Plain(nn.Module):
    """down(gelu(up(x)))."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(hidden, intermediate), nn.Linear(intermediate, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(functional.gelu(self.up_proj(x), approximate="tanh"))


class _Layer(nn.Module):
    def __init__(self, of: Geometry) -> None:
        super().__init__()
        self.norm, self.mlp_norm = RMSNorm(of.hidden, 1e-6), RMSNorm(of.hidden, 1e-6)
        self.attention = Attention(
            of.hidden,
            of.heads,
            of.key_value_heads,
            of.hidden // of.heads,
            bias=True,
            qk_norm_eps=1e-6 if of.prompt_cached else None,
            mode="none",
        )
        self.mlp = FeedForward(of.hidden, of.intermediate) if of.gated else _Plain(of.hidden, of.intermediate)

    def forward(
        self,
        x: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        context: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> torch.Tensor:
        x = x + self.attention(self.norm(x), rotary=rotary, context=context)[0]
        return x + self.mlp(self.mlp_norm(x))


class StandIn(nn.Module):
    """A stack of layers, and a head where the stack is whole: a slice stands for layers alone.

    Args:
        of: the sizes; ``layers_timed`` are built.
    """

    def __init__(self, of: Geometry) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(of) for _ in range(of.layers_timed))
        self.head = nn.Linear(of.hidden, of.out) if of.layers_timed == of.layers else nn.Identity()

    def forward(
        self,
        x: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        context: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> torch.Tensor:
        """Map a stream (B, N, hidden) through all layers, then the head."""
        for layer in self.layers:
            x = layer(x, rotary, context)
        return self.head(x)


def stand_in_case(of: Geometry, device: torch.device, dtype: torch.dtype, *, whole: bool = False) -> Case:
    """Return a stand-in's denoising.

    Args:
        of: its sizes.
        device: where.
        dtype: of everything.
        whole: build every layer, not a slice.
    """
    of = replace(of, layers_timed=of.layers) if whole else of
    model = with_random_weights(lambda: StandIn(of), device, dtype)
    sequence = of.tokens + (0 if of.prompt_cached else of.prompt_tokens)
    head_dim, given = of.hidden // of.heads, {"device": device, "dtype": dtype}
    x = torch.randn(2, sequence, of.hidden, **given)
    rotary = (torch.randn(2, sequence, head_dim, **given), torch.randn(2, sequence, head_dim, **given))
    shape = (2, of.key_value_heads, of.prompt_tokens, head_dim)
    context = (torch.randn(shape, **given), torch.randn(shape, **given)) if of.prompt_cached else None

    def step(number: int) -> torch.Tensor:
        with torch.no_grad():
            return model(x, rotary, context)

    per_layer = count(model.layers[0])
    keys = of.tokens + of.prompt_tokens
    layer_flops = 2 * sequence * (matrix_numbers(model.layers[0]) + 2 * keys * of.hidden)
    head = 2 * sequence * matrix_numbers(model.head)
    parameters = per_layer * of.layers + count(model.head)
    return Case(
        name=of.name,
        what=of.what,
        resolution=of.resolution,
        tokens=of.tokens,
        steps=of.steps,
        passes=2,
        parameters=parameters,
        active_parameters=parameters,
        step_flops=2.0 * (of.layers * layer_flops + head),
        weight_bytes=parameters * dtype.itemsize,
        step=step,
        slice=of.layers_timed / of.layers,
        steps_worth=of.guided_steps + (of.steps - of.guided_steps) / 2,
        blocks=list(model.layers),
    )
