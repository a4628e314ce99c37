"""What a model costs: parameters, floating-point operations by formula, bytes.

A multiply-add counts as two operations. Norms, activations and softmax are left out: they are below one percent.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from latteflow.models.transformer import LatteFlowTransformer
from latteflow.pipeline import LatteFlowPipeline


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
    """All weights, in the dtype they are loaded in."""

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
    replica: LatteFlowTransformer = pipe.transformer
    config = replica.config
    context = pipe.encode_prompt([prompt])
    image_tokens, prompt_tokens = (config.sample_size // config.patch_size) ** 2, int(context.mask.sum())
    sequences = 2 if guided else 1
    step = sequences * step_flops(replica, image_tokens, prompt_tokens)
    prefill = prefill_flops(pipe.backbone, prompt_tokens)
    decode = _decode_flops(pipe)
    parts = {name: _count(getattr(pipe, name)) for name in ("backbone", "transformer", "vae")}
    modules = (pipe.backbone, replica, pipe.vae)
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
        context_bytes=context.keys.nbytes + context.values.nbytes,
        weight_bytes=sum(p.nbytes for module in modules for p in module.parameters()),
    )


def active_parameters(replica: LatteFlowTransformer) -> int:
    """Return the number of replica parameters that one network call reads (of the largest group)."""
    groups = [[replica.layers[i] for i in replica.layers_of(k)] for k in range(len(replica.intervals))]
    return max(sum(_count(layer) for layer in layers) for layers in groups) + _count(replica.io[0])


def step_flops(replica: LatteFlowTransformer, image_tokens: int, context_tokens: int) -> float:
    """Return the operations of one network call on one sequence, by formula.

    Every weight matrix but those that see the time embedding alone is used once a token; each layer's attention makes
    two products of every head's queries (N) with all keys (T + N).
    """
    config = replica.config
    width, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    key_values = config.num_key_value_heads * config.head_dim
    attention = 2 * width * heads + 2 * width * key_values
    feed_forward = 3 * width * config.intermediate_size
    layer = image_tokens * (attention + feed_forward)  # multiply-adds, as below
    layer += 2 * image_tokens * (image_tokens + context_tokens) * heads
    gates = 0 if config.residual_attention == "none" else config.num_attention_heads
    time = config.time_embedding_size
    modulation = 4 * width * time
    latent = config.latent_channels * config.patch_size**2
    around = image_tokens * (2 * latent * width + width * width) + 2 * time * time + 2 * width * time
    group = replica.group_size * (layer + modulation) + (replica.group_size - 1) * gates * time
    return 2.0 * (group + around)


def prefill_flops(backbone: nn.Module, tokens: int) -> float:
    """Return the operations of reading a prompt of so many tokens, with the scores of one next token, by formula."""
    text = backbone.config.get_text_config()  # type: ignore[union-attr, operator]
    width = text.hidden_size
    head_dim = getattr(text, "head_dim", None) or width // text.num_attention_heads
    heads, key_values = text.num_attention_heads * head_dim, text.num_key_value_heads * head_dim
    layer = tokens * (2 * width * heads + 2 * width * key_values + 3 * width * text.intermediate_size)
    return 2.0 * (text.num_hidden_layers * (layer + 2 * tokens * tokens * heads) + width * text.vocab_size)


@torch.no_grad()
def _decode_flops(pipe: LatteFlowPipeline) -> float:
    """Count the decoder's operations by running it once: convolutions have no short formula."""
    config = pipe.transformer.config
    latents = torch.zeros(
        1, config.latent_channels, config.sample_size, config.sample_size, dtype=pipe.vae.dtype, device=pipe.vae.device
    )
    with FlopCounterMode(display=False) as counter:
        pipe.vae.decode(latents)
    return float(counter.get_total_flops())


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
