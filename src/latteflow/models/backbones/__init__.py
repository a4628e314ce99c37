"""Backbones: one file a family of vision-language models."""

from __future__ import annotations

from typing import Any

from latteflow.errors import UserError
from latteflow.models.backbones.family import Family
from latteflow.models.backbones.gemma3 import Gemma3
from latteflow.models.backbones.idefics3 import Idefics3
from latteflow.models.backbones.internvl import InternVL
from latteflow.models.backbones.llava_onevision import LlavaOnevision
from latteflow.models.backbones.qwen2_5_vl import Qwen2_5VL
from latteflow.models.backbones.qwen2_vl import Qwen2VL
from latteflow.models.backbones.qwen3_vl import Qwen3VL

FAMILIES: tuple[Family, ...] = (
    Qwen2VL(),
    Qwen2_5VL(),
    Qwen3VL(),
    Idefics3(),
    InternVL(),
    LlavaOnevision(),
    Gemma3(),
)


def family_of(config: Any) -> Family:
    """Return the family of a backbone by its configuration.

    Raises:
        UserError: no family has it, or its text layers are of a kind that was not checked.
    """
    kind = getattr(config, "model_type", None)
    family = family_named(str(kind))
    text = config.get_text_config().model_type
    if text not in family.text_types:
        raise UserError(
            f"a {kind} backbone with {text!r} text layers is not supported: {', '.join(family.text_types)} are"
        )
    return family


def family_named(model_type: str) -> Family:
    """Return the family of a ``model_type``.

    Raises:
        UserError: there is none.
    """
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.model_types)
    raise UserError(f"a backbone of type {model_type!r} is not supported: {known} are (docs/backbones.md)")
