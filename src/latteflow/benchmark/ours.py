"""LaTtE-Flow at a preset's size, cut into any number of experts that share one set of weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
from torch import nn

from latteflow.benchmark.case import Case, count
from latteflow.benchmark.weights import with_random_weights
from latteflow.evaluate.cost import PROMPT_TOKENS, active_parameters
from latteflow.flow.guidance import Guidance
from latteflow.models.autoencoder import decode_latents
from latteflow.models.context import Context, compute_context, concatenate
from latteflow.models.flops import step_flops
from latteflow.models.guided import GuidedVelocity
from latteflow.models.presets import Preset, build_autoencoder, build_backbone, build_transformer
from latteflow.models.transformer import LatteFlowTransformer

EMPTY_PROMPT_TOKENS = 24
"""Of the unconditional prompt: a chat template alone. [D]"""
GUIDANCE = 4.0


def build_vanilla(preset: Preset, device: torch.device, dtype: torch.dtype) -> LatteFlowTransformer:
    """Return a preset's replica in one group (K = 1): every layer at every step."""
    return with_random_weights(
        lambda: build_transformer(preset, group_size=preset.num_layers, dtype=dtype, device=device), device, dtype
    )


def regrouped(vanilla: LatteFlowTransformer, groups: int) -> LatteFlowTransformer:
    """Return the same layers cut into ``groups`` experts; the weights are those of ``vanilla``, not copies."""
    if groups == 1:
        return vanilla
    with torch.device("meta"):
        replica = LatteFlowTransformer.from_config({**vanilla.config, "num_groups": groups, "intervals": None})
    # The first layer of a group has no gate: those gates of vanilla's are left over.
    left_out = replica.load_state_dict(vanilla.state_dict(), strict=False, assign=True)
    if left_out.missing_keys:
        raise ValueError(f"these weights are missing: {left_out.missing_keys}")
    return replica.requires_grad_(False).eval()


def random_context(replica: LatteFlowTransformer, *, pictures: int = 1) -> Context:
    """Return a context of random numbers as guidance takes it: the empty prompt's half first, shorter by a few words.

    Args:
        replica: whose layers read it.
        pictures: drawn at once.
    """
    config = replica.config
    shape = (2 * pictures, config.num_layers, config.num_key_value_heads, PROMPT_TOKENS, config.head_dim)
    keys, values = (torch.randn(shape, dtype=torch.float32) for _ in range(2))
    lengths = torch.tensor([EMPTY_PROMPT_TOKENS] * pictures + [PROMPT_TOKENS] * pictures)
    mask = torch.arange(PROMPT_TOKENS)[None] < lengths[:, None]
    return Context(keys, values, mask, lengths).to(replica.device, replica.dtype)


def sampling_step(
    replica: LatteFlowTransformer, *, steps: int, side: int, pictures: int = 1, context: Context | None = None
) -> Callable[[int], torch.Tensor]:
    """Return a function that makes one guided Euler step, as ``LatteFlowPipeline`` makes it.

    Successive numbers go to times far apart, so that a few steps visit every expert.

    Args:
        replica: the experts.
        steps: of the path.
        side: of the latents.
        pictures: drawn at once.
        context: left out, a random one.
    """
    times = [number / steps for number in range(steps)]
    context = random_context(replica, pictures=pictures) if context is None else context
    velocity = GuidedVelocity(replica, context, times, Guidance(GUIDANCE))
    x = torch.randn(pictures, replica.config.latent_channels, side, side).to(replica.device)
    stride = next(number for number in range(max(1, round(0.56 * steps)), steps + 1) if gcd(number, steps) == 1)

    def step(number: int) -> torch.Tensor:
        with torch.no_grad():
            return x + velocity(x, times[number * stride % steps]) / steps

    for number in range(steps):  # what t does to each group is computed once a picture: not in the step
        velocity.cache.moment(replica, replica.intervals.group_of(times[number]), times[number], x.device)
    return step


def latteflow_case(
    replica: LatteFlowTransformer, *, steps: int = 40, resolution: int = 256, factor: int = 32, pictures: int = 1
) -> Case:
    """Return the denoising of ``pictures`` at once with a replica.

    Args:
        replica: cut into any number of experts.
        steps: of a picture.
        resolution: pixels a side.
        factor: pixels a side of one latent.
        pictures: drawn at once.
    """
    side, config = resolution // factor, replica.config
    tokens, active = (side // config.patch_size) ** 2, active_parameters(replica)
    vanilla = " (Vanilla, LMFusion-shaped)" if config.num_groups == 1 else ""
    return Case(
        name=f"LaTtE-Flow, K = {config.num_groups}{vanilla}",
        what="LatteFlowTransformer with residual attention (probs), as LatteFlowPipeline calls it",
        resolution=resolution,
        tokens=tokens,
        steps=steps,
        passes=2,
        parameters=count(replica),
        active_parameters=active,
        step_flops=pictures
        * (step_flops(replica, tokens, PROMPT_TOKENS) + step_flops(replica, tokens, EMPTY_PROMPT_TOKENS)),
        weight_bytes=active * replica.dtype.itemsize,
        step=sampling_step(replica, steps=steps, side=side, pictures=pictures),
        blocks=list(replica.layers),
    )


@dataclass
class WholePicture:
    """Prompt, every step and the decoder, of parts with random weights."""

    preset: Preset
    groups: int
    device: torch.device
    dtype: torch.dtype
    steps: int = 40

    def case(self) -> Case:
        """Build the parts; the case's steps read the context that its prefill made last."""
        given: dict[str, Any] = {"device": self.device, "dtype": self.dtype}
        replica = regrouped(build_vanilla(self.preset, **given), self.groups)
        backbone = with_random_weights(lambda: build_backbone(self.preset, self.dtype, self.device), **given)
        vae = random_autoencoder(self.preset.autoencoder, **given)
        case = latteflow_case(
            replica, steps=self.steps, resolution=self.preset.picture_size, factor=vae.spatial_compression_ratio
        )
        side = self.preset.picture_size // vae.spatial_compression_ratio
        latents = torch.randn(1, replica.config.latent_channels, side, side).to(**given)

        def prefill() -> None:
            halves = [self._read(backbone, tokens) for tokens in (EMPTY_PROMPT_TOKENS, PROMPT_TOKENS)]
            case.step = sampling_step(replica, steps=self.steps, side=side, context=concatenate(halves))

        def decode() -> torch.Tensor:
            with torch.no_grad():
                return decode_latents(vae, replica.config, latents)

        case.prefill, case.decode = prefill, decode
        return case

    def _read(self, backbone: nn.Module, tokens: int) -> Context:
        words = torch.arange(3, 3 + tokens, device=self.device)[None]
        return compute_context(backbone, words, torch.ones_like(words))


def random_autoencoder(name: str, device: torch.device, dtype: torch.dtype) -> Any:
    """Return a published DC-AE with random weights."""
    return with_random_weights(lambda: build_autoencoder(name, dtype, device), device, dtype)
