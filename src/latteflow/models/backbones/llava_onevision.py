"""The LLaVA-OneVision family: Qwen2 layers, pictures at the closest of many resolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor

from latteflow.errors import UserError
from latteflow.models.backbones.family import Family

_COUNTED = {"vision_aspect_ratio": "anyres_max_9", "vision_feature_select_strategy": "full"}
"""What the released models have: the count of a picture's tokens depends on it."""


class _TokenCount(LlavaOnevisionProcessor):
    """transformers' own count of a picture's tokens, without its video processor, which needs torchvision."""

    def __init__(self, image_processor: Any, tokens_per_tile: int) -> None:
        self.image_processor = image_processor
        self.num_image_tokens = tokens_per_tile
        self.vision_feature_select_strategy = _COUNTED["vision_feature_select_strategy"]
        self.vision_aspect_ratio = _COUNTED["vision_aspect_ratio"]
        self.image_token = LlavaOnevision.image_token


class LlavaOnevision(Family):
    """LLaVA-OneVision (arXiv 2408.03326).

    A picture alone in its conversation is seen at high resolution, several pictures at the base resolution.
    """

    model_types = ("llava_onevision",)
    text_types = ("qwen2",)
    example = "llava-hf/llava-onevision-qwen2-0.5b-ov-hf"
    placeholder = image_token = "<image>"
    pictures_are_independent = False

    def tokens_per_tile(self, config: Any) -> int:
        """Return the patches of the vision tower's own resolution.

        Raises:
            UserError: the model counts a picture's tokens in a way that was not checked.
        """
        for name, value in _COUNTED.items():
            found = getattr(config, name)
            if found != value:
                raise UserError(f"{name} {found!r} is not supported: {value!r} is")
        return (config.vision_config.image_size // config.vision_config.patch_size) ** 2

    def pictures(
        self, image_processor: Any, images: Sequence[Sequence[Image.Image]], tokens_per_tile: int
    ) -> tuple[dict[str, torch.Tensor], list[str]]:
        """Return tiles, the pictures' sizes and their number a prompt."""
        nested = [list(group) for group in images if group]
        inputs = dict(image_processor(images=nested, return_tensors="pt"))
        count = _TokenCount(image_processor, tokens_per_tile)
        number = sum(len(group) for group in nested)
        return inputs, [count.replace_image_token(inputs, index) for index in range(number)]
