"""The InternVL family: Qwen2, Qwen3 or Llama layers, pictures cut into square tiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from latteflow.models.backbones.family import Family


class InternVL(Family):
    """InternVL3 (arXiv 2504.10479) in transformers' own format (the hub ids that end in ``-hf``)."""

    model_types = ("internvl",)
    text_types = ("qwen2", "qwen3", "llama")
    example = "OpenGVLab/InternVL3-1B-hf"
    placeholder = image_token = "<IMG_CONTEXT>"

    def tokens_per_tile(self, config: Any) -> int:
        """Return a tile's patches after downsampling."""
        height, width = config.vision_config.image_size
        patch_height, patch_width = config.vision_config.patch_size
        return int((height // patch_height) * (width // patch_width) * config.downsample_ratio**2)

    def pictures(
        self, image_processor: Any, images: Sequence[Sequence[Image.Image]], tokens_per_tile: int
    ) -> tuple[dict[str, torch.Tensor], list[str]]:
        """Return tiles; a picture is a run of tokens between its start and end."""
        flat = [image for group in images for image in group]
        # The image processor cuts nothing unless told; transformers' own processor always tells it.
        inputs = dict(image_processor(images=flat, crop_to_patches=True, return_tensors="pt"))
        tiles = torch.as_tensor(inputs.pop("num_patches")).tolist()
        return inputs, [f"<img>{self.image_token * (tokens_per_tile * number)}</img>" for number in tiles]
