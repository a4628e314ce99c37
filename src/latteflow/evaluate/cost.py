"""What a model costs: parameters, floating-point operations by formula, bytes.

A multiply-add counts as two operations. Norms (those of queries and keys among them), activations and softmax are left
out: they are below one percent. A prompt of words does not pass through the vision tower, which is not counted.

Nothing here needs a weight: parts may be on the meta device, as ``models/presets.py`` builds them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from latteflow.errors import UserError
from latteflow.evaluate.memory import (
    LORA_RANK,
    context_token_bytes,
    inference_memory,
    lora_parameters,
    on_meta,
    training_memory,
)
from latteflow.models.flops import prefill_flops, step_flops
from latteflow.models.presets import Preset, build_autoencoder, build_backbone, build_transformer
from latteflow.models.quantization import quantization_of, stored_bytes
from latteflow.models.transformer import LatteFlowTransformer
from latteflow.pipeline import LatteFlowPipeline

PROMPT_TOKENS = 32
"""Of a preset's prompt: a chat template's two dozen, and a few words. [D]"""
TRAINING_BATCH = 32
"""Samples a step that a preset's training is reckoned with. [D]"""
_MOST_IMAGE_TOKENS = 16_384


@dataclass(frozen=True)
class Cost:
    """One model's cost at its own picture size."""

    parameters: dict[str, int]
    """By part: backbone, transformer, vae."""
    total_parameters: int
    frozen_parameters: int
    """Backbone and autoencoder."""
    trainable_parameters: int
    """The replica, all groups."""
    active_parameters: int
    """What one network call reads of the replica: one group's layers and what stands around them."""
    groups: int
    layers_per_step: int
    image_tokens: int
    prompt_tokens: int
    steps: int
    guided: bool
    flops_per_step: float
    """One network call for one picture, both sequences where guided."""
    flops_prefill: float
    """The prompt's context; the empty prompt's is kept across calls."""
    flops_decode: float
    flops_per_image: float
    context_bytes: int
    """Keys and values of one prompt."""
    weight_bytes: int
    """All weights as they are in memory, quantised ones with their scales."""
    dtype: str
    """Of the replica's activations, and of its weights unless they are quantised."""
    quantization: str | None
    """Of matrices of backbone and replica: "int8" or "fp8", None if there is none."""

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def cost_of(
    pipe: LatteFlowPipeline, *, steps: int = 40, guided: bool = True, prompt: str = "a slice of pizza, noto style"
) -> Cost:
    """Return the cost of drawing one picture of the model's own size.

    Args:
        pipe: the model.
        steps: network calls.
        guided: whether classifier-free guidance doubles the sequences.
        prompt: what is drawn; its length decides the prefill and a little of each step.
    """
    context = pipe.encode_prompt([prompt])
    return cost_of_parts(
        pipe.backbone,
        pipe.transformer,
        pipe.vae,
        prompt_tokens=int(context.mask.sum()),
        steps=steps,
        guided=guided,
    )


def cost_of_parts(
    backbone: Any,
    replica: LatteFlowTransformer,
    vae: Any,
    *,
    prompt_tokens: int,
    latent_side: int | None = None,
    steps: int = 40,
    guided: bool = True,
) -> Cost:
    """Return the cost of drawing one picture with parts on any device, the meta device among them.

    Args:
        backbone: the vision-language model, of any family.
        replica: the experts.
        vae: an ``AutoencoderDC``.
        prompt_tokens: length of the prompt.
        latent_side: side of the latents; left out, the replica's own.
        steps: network calls.
        guided: whether classifier-free guidance doubles the sequences.
    """
    config = replica.config
    side = config.sample_size if latent_side is None else latent_side
    image_tokens = (side // config.patch_size) ** 2
    step = (2 if guided else 1) * step_flops(replica, image_tokens, prompt_tokens)
    prefill, decode = prefill_flops(backbone, prompt_tokens), decode_flops(vae, side)
    modules = {"backbone": backbone, "transformer": replica, "vae": vae}
    parts = {name: _count(module) for name, module in modules.items()}
    return Cost(
        parameters=parts,
        total_parameters=sum(parts.values()),
        frozen_parameters=parts["backbone"] + parts["vae"],
        trainable_parameters=parts["transformer"],
        active_parameters=active_parameters(replica),
        groups=config.num_groups,
        layers_per_step=replica.group_size,
        image_tokens=image_tokens,
        prompt_tokens=prompt_tokens,
        steps=steps,
        guided=guided,
        flops_per_step=step,
        flops_prefill=prefill,
        flops_decode=decode,
        flops_per_image=steps * step + prefill + decode,
        context_bytes=prompt_tokens * context_token_bytes(replica, backbone.dtype),
        weight_bytes=sum(stored_bytes(p) for module in modules.values() for p in module.parameters()),
        dtype=str(replica.dtype).removeprefix("torch."),
        quantization=quantization_of(*modules.values()),
    )


def preset_figures(
    preset: Preset,
    *,
    size: int | None = None,
    steps: int = 40,
    prompt_tokens: int = PROMPT_TOKENS,
    batch_size: int = TRAINING_BATCH,
) -> dict[str, Any]:
    """Return what a preset costs, in bfloat16 and guided, without allocating its weights: plain JSON values.

    Args:
        preset: which.
        size: pixels a side; left out, the preset's.
        steps: network calls a picture.
        prompt_tokens: length of the prompt.
        batch_size: samples a training step.

    Raises:
        UserError: a size that is no multiple of the autoencoder's factor, or of too many tokens.
    """
    size = preset.picture_size if size is None else size
    vae = build_autoencoder(preset.autoencoder)
    factor = vae.spatial_compression_ratio
    if size < factor or size % factor or (size // factor) ** 2 > _MOST_IMAGE_TOKENS:
        most = int(_MOST_IMAGE_TOKENS**0.5) * factor
        raise UserError(f"size {size} does not do: give a multiple of {factor} up to {most}")
    backbone = build_backbone(preset)
    replica = build_transformer(preset, backbone, sample_size=size // factor)
    parts = (backbone, replica, vae)
    cost = cost_of_parts(*parts, prompt_tokens=prompt_tokens, steps=steps)
    full, lora = (
        training_memory(*parts, prompt_tokens=prompt_tokens, batch_size=batch_size, lora_rank=rank)
        for rank in (None, LORA_RANK)
    )
    return {
        "preset": preset.name,
        "hub_id": preset.hub_id,
        "autoencoder": preset.autoencoder,
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "picture_size_pixels": size,
        "layers": preset.num_layers,
        **{name: getattr(cost, name) for name in _SAME_IN_PRESETS},
        "lora_rank": LORA_RANK,
        "lora_parameters": lora_parameters(replica, LORA_RANK),
        "step_flops": cost.flops_per_step,
        "prefill_flops": cost.flops_prefill,
        "decode_flops": cost.flops_decode,
        "image_flops": cost.flops_per_image,
        "context_token_bytes": context_token_bytes(replica, backbone.dtype),
        "inference_memory": inference_memory(*parts, prompt_tokens=prompt_tokens).as_dict(),
        "training_batch": batch_size,
        "full_training_memory": full.as_dict(),
        "lora_training_memory": lora.as_dict(),
    }


_SAME_IN_PRESETS = (
    "groups",
    "layers_per_step",
    "image_tokens",
    "prompt_tokens",
    "steps",
    "guided",
    "parameters",
    "total_parameters",
    "frozen_parameters",
    "trainable_parameters",
    "active_parameters",
)


def active_parameters(replica: LatteFlowTransformer) -> int:
    """Return the number of replica parameters that one network call reads (of the largest group)."""
    groups = [[replica.layers[i] for i in replica.layers_of(k)] for k in range(len(replica.intervals))]
    return max(sum(_count(layer) for layer in layers) for layers in groups) + _count(replica.io[0])


@torch.no_grad()
def decode_flops(vae: Any, latent_side: int) -> float:
    """Count the operations of decoding one picture on the meta device: convolutions have no short formula.

    Args:
        vae: an ``AutoencoderDC``; a twin without weights is run in its place.
        latent_side: side of the latents.
    """
    shadow, latents = on_meta(vae, latent_side)
    with FlopCounterMode(display=False) as counter:
        shadow.decode(latents)
    return float(counter.get_total_flops())


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
