"""The Qwen2-VL family: which numbers a replica takes from it, and which weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from latteflow.errors import UserError

COPIED = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
"""The parts of a layer that backbone and replica have in common, by name."""


def replica_config(backbone: nn.Module) -> dict[str, Any]:
    """Return the replica's arguments that this backbone decides.

    Raises:
        UserError: the backbone is not a Qwen2-VL.
    """
    config = backbone.config  # type: ignore[union-attr]
    if getattr(config, "model_type", None) != "qwen2_vl":
        raise UserError(f"backbone of type {getattr(config, 'model_type', None)!r}: only qwen2_vl is supported so far")
    text = config.get_text_config()  # type: ignore[operator]
    rope = text.rope_parameters
    return {
        "num_layers": text.num_hidden_layers,
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "num_attention_heads": text.num_attention_heads,
        "num_key_value_heads": text.num_key_value_heads,
        "head_dim": text.hidden_size // text.num_attention_heads,
        "attention_bias": True,
        "norm_eps": text.rms_norm_eps,
        "rope_theta": rope["rope_theta"],
        "mrope_section": list(rope["mrope_section"]),
    }


def text_layers(backbone: nn.Module) -> nn.ModuleList:
    """Return the backbone's text layers, in depth order."""
    return backbone.model.language_model.layers  # type: ignore[union-attr, return-value]


@torch.no_grad()
def copy_layers(backbone: nn.Module, replica_layers: Sequence[nn.Module] | nn.ModuleList) -> None:
    """Copy the backbone's layers into a replica's, part by part."""
    for source, target in zip(text_layers(backbone), replica_layers, strict=True):
        for part in COPIED:
            state = getattr(source, part).state_dict()
            getattr(target, part).load_state_dict(state, strict=True)
