"""What a training run would be, before anything is downloaded: sizes, operations, memory a device, days.

Nothing is measured here. A plan multiplies formulas by a device's published peak and an assumed share of it, and shows
every one of them, so that a reader can put in their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from latteflow.errors import UserError
from latteflow.evaluate.cost import active_parameters
from latteflow.evaluate.memory import lora_parameters, on_meta, training_memory
from latteflow.models.autoencoder import AUTOENCODERS, autoencoder_hub_id
from latteflow.models.flops import prefill_flops, step_flops
from latteflow.models.presets import Preset, build_autoencoder, build_backbone, build_transformer, preset, preset_names
from latteflow.train.recipe import GeneratorRecipe


@dataclass(frozen=True)
class Device:
    """An accelerator by its maker's data sheet."""

    name: str
    peak_flops: float
    """Dense bfloat16 operations a second."""
    memory_bytes: int


DEVICES = {
    device.name: device
    for device in (
        Device("a100-80gb", 312e12, 80 * 10**9),
        Device("h100-sxm", 989e12, 80 * 10**9),
        Device("h200", 989e12, 141 * 10**9),
        Device("b200", 2250e12, 180 * 10**9),
        Device("rtx-4090", 165e12, 24 * 10**9),
    )
}
"""Peaks without sparsity; with float32 accumulation where the makers tell them apart."""


@dataclass(frozen=True)
class Plan:
    """A run's figures; ``rows`` says them in words."""

    parameters: Mapping[str, int]
    """By part, and ``trainable``, ``active`` a sample."""
    image_tokens: int
    prompt_tokens: int
    samples: int
    flops_per_sample: Mapping[str, float]
    """Of ``replica`` (forward and backward), ``backbone`` (prompt) and ``autoencoder`` (encoder)."""
    device: Device
    devices: int
    mfu: float
    """Assumed, not measured."""
    samples_per_device: int
    """Of one forward pass."""
    memory_bytes: int
    """Peak a device, of tensors."""

    @property
    def total_flops(self) -> float:
        """Return the run's operations."""
        return self.samples * sum(self.flops_per_sample.values())

    @property
    def days(self) -> float:
        """Return the days that the run takes if the assumption holds."""
        return self.total_flops / (self.devices * self.device.peak_flops * self.mfu) / 86_400

    def rows(self) -> dict[str, str]:
        """Return the plan in words."""
        count = self.parameters
        parts = ", ".join(f"{name} {flops / 1e9:.1f} GFLOP" for name, flops in self.flops_per_sample.items() if flops)
        fits = "fits" if self.memory_bytes < self.device.memory_bytes else "DOES NOT FIT: more accumulation, or fsdp2"
        return {
            "parameters": ", ".join(f"{name} {count[name] / 1e6:,.0f}M" for name in ("backbone", "replica", "vae")),
            "trainable / active a sample": f"{count['trainable'] / 1e6:,.0f}M / {count['active'] / 1e6:,.0f}M",
            "tokens a sample": f"{self.image_tokens} of the picture, {self.prompt_tokens} of the prompt (assumed)",
            "samples": f"{self.samples:,}",
            "operations a sample": parts,
            "operations in all": f"{self.total_flops:.3g} FLOP",
            "memory a device": f"{self.memory_bytes / 1e9:.1f} GB of {self.device.memory_bytes / 1e9:.0f} GB at "
            f"{self.samples_per_device} samples a pass, by formula: {fits}",
            "days (estimate)": f"{self.days:.2f} on {self.devices} x {self.device.name}, if they reach {self.mfu:.0%} "
            f"of {self.device.peak_flops / 1e12:.0f} TFLOP/s (assumed, not measured)",
        }


def plan_of(
    recipe: GeneratorRecipe, *, device: str = "h100-sxm", devices: int = 8, mfu: float = 0.4, prompt_tokens: int = 30
) -> Plan:
    """Return what a generator's recipe asks for, from presets on the meta device.

    Args:
        recipe: whose backbone and autoencoder are presets, by name or hub id.
        device: a key of ``DEVICES``.
        devices: how many.
        mfu: the share of their peak that they are assumed to reach.
        prompt_tokens: assumed length of a prompt in the chat template.

    Raises:
        UserError: a part is no preset, the device is not known, or the batch does not divide.
    """
    if device not in DEVICES:
        raise UserError(f"no device {device!r}: there are {', '.join(DEVICES)}")
    train, settings = recipe.train, recipe.generator
    per_pass, rest = divmod(train.batch_size, devices * train.gradient_accumulation_steps)
    if rest or not per_pass:
        raise UserError(
            f"batch_size {train.batch_size} does not divide among {devices} devices and "
            f"{train.gradient_accumulation_steps} accumulation steps"
        )
    backbone, replica, vae = _parts(recipe)
    size = recipe.data.size or 256
    tokens = (replica.config.sample_size // replica.config.patch_size) ** 2
    lora = None if settings.lora is None else settings.lora.rank
    memory = training_memory(backbone, replica, vae, prompt_tokens=prompt_tokens, batch_size=per_pass, lora_rank=lora)
    number = {name: sum(p.numel() for p in part.parameters()) for name, part in _named(backbone, replica, vae)}
    trainable = number["replica"] if lora is None else lora_parameters(replica, lora)
    passes = 4 if train.activation_checkpointing else 3
    from_latents = recipe.data.kind == "latents"
    return Plan(
        parameters={**number, "trainable": trainable, "active": active_parameters(replica)},
        image_tokens=tokens,
        prompt_tokens=prompt_tokens,
        samples=train.steps * train.batch_size,
        flops_per_sample={
            "replica": passes * step_flops(replica, tokens, prompt_tokens),
            "backbone": prefill_flops(backbone, prompt_tokens),
            "autoencoder": 0.0 if from_latents else encode_flops(vae, size),
        },
        device=DEVICES[device],
        devices=devices,
        mfu=mfu,
        samples_per_device=per_pass,
        memory_bytes=_memory_a_device(memory, train.strategy, devices, train.activation_checkpointing, replica),
    )


def _parts(recipe: GeneratorRecipe) -> tuple[Any, Any, Any]:
    settings = recipe.generator
    chosen, autoencoder = _preset_of(settings.backbone), _autoencoder_of(settings.autoencoder)
    if chosen.num_layers % settings.num_groups:
        raise UserError(f"num_groups has to divide the {chosen.num_layers} layers: got {settings.num_groups}")
    vae = build_autoencoder(autoencoder)
    replica = build_transformer(
        chosen,
        group_size=chosen.num_layers // settings.num_groups,
        dtype=torch.float32,
        intervals=settings.edges,
        residual_attention=settings.residual_attention,
        shared_io=settings.shared_io,
        patch_size=settings.patch_size,
        sample_size=(recipe.data.size or 256) // vae.spatial_compression_ratio,
        time_embedding_size=settings.time_embedding_size,
    )
    return build_backbone(chosen), replica, vae


def _preset_of(name: str) -> Preset:
    for known in map(preset, preset_names()):
        if name in (known.name, known.hub_id):
            return known
    raise UserError(f"a dry run knows the sizes of presets only, and {name!r} is none: {', '.join(preset_names())}")


def _autoencoder_of(name: str) -> str:
    for known in AUTOENCODERS:
        if name in (known, autoencoder_hub_id(known)):
            return known
    raise UserError(f"a dry run knows the sizes of {', '.join(AUTOENCODERS)} only: got {name!r}")


def _named(backbone: Any, replica: Any, vae: Any) -> list[tuple[str, Any]]:
    return [("backbone", backbone), ("replica", replica), ("vae", vae)]


@torch.no_grad()
def encode_flops(vae: Any, size: int) -> float:
    """Count the operations of encoding one picture of ``size`` pixels a side, on the meta device."""
    shadow, _ = on_meta(vae, size // vae.spatial_compression_ratio)
    with FlopCounterMode(display=False) as counter:
        shadow.encode(torch.zeros(1, 3, size, size, dtype=shadow.dtype, device="meta"))
    return float(counter.get_total_flops())


def _memory_a_device(memory: Any, strategy: str, devices: int, checkpointing: bool, replica: Any) -> int:
    """Return the peak a device: fsdp2 shares what a weight brings; checkpointing keeps a layer's input alone."""
    share = devices if strategy == "fsdp2" else 1
    spread = (memory.weight_bytes + memory.optimizer_bytes + memory.average_bytes) // share
    activations = memory.activation_bytes
    if checkpointing:
        activations = activations // replica.group_size * 2  # one layer's at a time, and every layer's input
    forward = activations + memory.autocast_bytes
    backward = memory.gradient_bytes // share + memory.update_bytes
    return memory.frozen_bytes + memory.context_bytes + spread + max(forward, backward)
