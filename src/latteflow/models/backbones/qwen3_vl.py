"""The Qwen3-VL family: normalised queries and keys, interleaved rotary sections, deepstack."""

from __future__ import annotations

from latteflow.models.backbones.qwen2_vl import Qwen2VL


class Qwen3VL(Qwen2VL):
    """Qwen3-VL (arXiv 2511.21631).

    Deepstack adds features of the vision tower to the first text layers' hidden states where a picture stands. It
    does nothing for words; with pictures in the prompt it is in the cache that the context is read from.
    """

    model_types = ("qwen3_vl",)
    text_types = ("qwen3_vl_text",)
    example = "Qwen/Qwen3-VL-2B-Instruct"
    sections = (24, 20, 20)
    interleaved = True
