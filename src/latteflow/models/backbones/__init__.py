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


_HOLD = {
    "cross_attention_layers": "cross-attention",
    "num_experts": "a mixture of experts",
    "num_local_experts": "a mixture of experts",
    "n_routed_experts": "a mixture of experts",
}
"""What text layers hold where a configuration has one of these."""


def family_of(config: Any) -> Family:
    """Return the family of a backbone by its configuration.

    Raises:
        UserError: no family has it, or its text layers are of a kind that was not checked.
    """
    kind = str(getattr(config, "model_type", None))
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    reason = _reason(text)
    family = family_named(kind, reason)
    if text.model_type not in family.text_types:
        raise UserError(
            f"a {kind} backbone with {text.model_type!r} text layers is not supported{reason}: "
            f"{', '.join(family.text_types)} are"
        )
    return family


def family_named(model_type: str, reason: str = "") -> Family:
    """Return the family of a ``model_type``.

    Args:
        model_type: of the backbone's configuration.
        reason: goes into the refusal, if there is one.

    Raises:
        UserError: there is none.
    """
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.model_types)
    raise UserError(f"a backbone of type {model_type!r} is not supported{reason}: {known} are (docs/backbones.md)")


def _reason(text: Any) -> str:
    """Return what its text layers hold that no replica can be, as a clause; empty if the configuration is silent."""
    held = [what for name, what in _HOLD.items() if getattr(text, name, None)]
    held += ["linear attention" for kind in getattr(text, "layer_types", None) or () if "linear" in kind]
    return f", as its text layers hold {held[0]}" if held else ""
