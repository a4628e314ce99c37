"""The Gemma3 family: sandwich norms as the replica's own, five of six layers attend within a window."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import nn

from latteflow.models.backbones.family import Family, rope_arguments


class Gemma3(Family):
    """Gemma3 (arXiv 2503.19786), the sizes that see (4B and up).

    Its output norms become the replica's. Its norms multiply by one plus their weight; the replica's by the weight. Its
    queries are scaled by a number of their own; the replica's by the head's width, so that the norm of the queries
    takes up the difference.
    """

    model_types = ("gemma3",)
    text_types = ("gemma3_text",)
    example = "google/gemma-3-4b-it"
    placeholder = "<start_of_image>"
    image_token = "<image_soft_token>"
    token_types = "token_type_ids"
    parts: ClassVar = {
        "input_layernorm": "input_layernorm",
        "self_attn": "self_attn",
        "post_attention_layernorm": "attention_out_norm",
        "pre_feedforward_layernorm": "post_attention_layernorm",
        "mlp": "mlp",
        "post_feedforward_layernorm": "mlp_out_norm",
    }

    def rope_config(self, text: Any) -> dict[str, Any]:
        """Return two bases: layers that see everything, and layers that see a window."""
        local = rope_arguments(text.rope_parameters["sliding_attention"])
        return {
            **rope_arguments(text.rope_parameters["full_attention"]),
            "mrope_section": [],
            "local_rope_theta": local["rope_theta"],
            "local_layers": [i for i, kind in enumerate(text.layer_types) if kind == "sliding_attention"],
        }

    def longest_prompt(self, text: Any) -> int | None:
        """Return what the cache of a sliding layer keeps."""
        return text.sliding_window - 1

    @torch.no_grad()
    def copy_layer(self, source: nn.Module, target: Any, text: Any) -> None:
        """Start a replica's layer from the backbone's, in the replica's conventions."""
        super().copy_layer(source, target, text)
        for ours in self.parts.values():
            part = getattr(target, ours)
            for norm in (part.q_norm, part.k_norm) if ours == "self_attn" else (part,) if "norm" in ours else ():
                norm.weight += 1
        attention = target.self_attn
        attention.q_norm.weight *= text.query_pre_attn_scalar**-0.5 * attention.head_dim**0.5

    def pictures(
        self, image_processor: Any, images: Sequence[Sequence[Image.Image]], tokens_per_tile: int
    ) -> tuple[dict[str, torch.Tensor], list[str]]:
        """Return one square a picture, all of the same number of tokens."""
        flat = [image for group in images for image in group]
        inputs = dict(image_processor(images=flat, return_tensors="pt", do_pan_and_scan=False))
        inputs.pop("num_crops", None)
        words = f"\n\n{self.placeholder}{self.image_token * tokens_per_tile}<end_of_image>\n\n"
        return inputs, [words] * len(flat)

    def tokens_per_tile(self, config: Any) -> int:
        """Return the tokens of a picture."""
        return config.mm_tokens_per_image
