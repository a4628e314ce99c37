"""The Idefics3 and SmolVLM families: Llama layers, pictures cut into tiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

from latteflow.models.backbones.family import Family


class Idefics3(Family):
    """Idefics3 (arXiv 2408.12637) and SmolVLM (arXiv 2504.05299)."""

    model_types = ("idefics3", "smolvlm")
    text_types = ("llama",)
    example = "HuggingFaceTB/SmolVLM-256M-Instruct"
    placeholder = image_token = "<image>"

    def text_model(self, backbone: Any) -> Any:
        """Return the part that holds ``layers``."""
        return backbone.model.text_model

    def tokens_per_tile(self, config: Any) -> int:
        """Return a tile's patches after the pixel shuffle."""
        return (config.vision_config.image_size // config.vision_config.patch_size) ** 2 // config.scale_factor**2

    def pictures(
        self, image_processor: Any, images: Sequence[Sequence[Image.Image]], tokens_per_tile: int
    ) -> tuple[dict[str, torch.Tensor], list[str]]:
        """Return tiles and their masks; a picture is a row of tokens a tile, and one for the whole."""
        inputs = dict(
            image_processor(
                images=[list(group) for group in images if group], return_row_col_info=True, return_tensors="pt"
            )
        )
        rows, columns = ([number for group in inputs.pop(name) for number in group] for name in ("rows", "cols"))
        return inputs, [
            get_image_prompt_string(
                row,
                column,
                tokens_per_tile,
                fake_token_around_image="<fake_token_around_image>",
                image_token=self.image_token,
                global_image_token="<global-img>",
            )
            for row, column in zip(rows, columns, strict=True)
        ]
