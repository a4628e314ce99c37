"""The Qwen2.5-VL family: Qwen2-VL's layers and positions; what is new is in the vision tower."""

from __future__ import annotations

from latteflow.models.backbones.qwen2_vl import Qwen2VL


class Qwen2_5VL(Qwen2VL):
    """Qwen2.5-VL (arXiv 2502.13923)."""

    model_types = ("qwen2_5_vl",)
    text_types = ("qwen2_5_vl_text",)
    example = "Qwen/Qwen2.5-VL-3B-Instruct"
