"""The Qwen2-VL family: three-axis rotary positions, pictures of any size in merged patches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from PIL import Image

from latteflow.models.backbones.family import Family


class Qwen2VL(Family):
    """Qwen2-VL (arXiv 2409.12191): Qwen2 layers with a bias on queries, keys and values."""

    model_types = ("qwen2_vl",)
    text_types = ("qwen2_vl_text",)
    example = "Qwen/Qwen2-VL-2B-Instruct"
    placeholder = image_token = "<|image_pad|>"
    token_types = "mm_token_type_ids"

    sections: ClassVar = (16, 24, 24)
    """transformers' own, where a configuration names none."""
    interleaved: ClassVar[bool] = False

    def rope_config(self, text: Any) -> dict[str, Any]:
        """Return base and sections."""
        return {
            **super().rope_config(text),
            "mrope_section": list(text.rope_parameters.get("mrope_section", self.sections)),
            "mrope_interleaved": self.interleaved,
        }

    def positions(
        self, backbone: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, pictures: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return three positions a token: a picture's follow its grid, words after it go on from its longer side."""
        if "image_grid_thw" not in pictures:
            positions, following = super().positions(backbone, input_ids, attention_mask, pictures)
            return positions.expand(3, *input_ids.shape), following
        positions, _ = backbone.model.get_rope_index(
            input_ids,
            mm_token_type_ids=pictures["mm_token_type_ids"],
            image_grid_thw=pictures["image_grid_thw"],
            attention_mask=attention_mask,
        )
        return positions, positions.amax(0).masked_fill(attention_mask == 0, -1).amax(-1) + 1

    def pictures(
        self, image_processor: Any, images: Sequence[Sequence[Image.Image]], tokens_per_tile: int
    ) -> tuple[dict[str, torch.Tensor], list[str]]:
        """Return patches and grids; a picture is as many tokens as it has merged patches."""
        inputs = dict(image_processor(images=[image for group in images for image in group], return_tensors="pt"))
        counts = inputs["image_grid_thw"].prod(-1) // image_processor.merge_size**2
        return inputs, [self.image_token * count for count in counts.tolist()]
