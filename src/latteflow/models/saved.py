"""Whether a saved pipeline is whole: what the libraries would fill in silently is refused here."""

from __future__ import annotations

from collections.abc import Container
from math import prod
from pathlib import Path

from safetensors import safe_open
from torch import nn

from latteflow.errors import UserError

_PARTS = ("backbone", "transformer", "vae")


def require_configs(folder: Path, given: Container[str] = ()) -> None:
    """Refuse a folder that lacks a part's configuration: transformers would build its default, 72B parameters.

    Args:
        folder: of a saved pipeline; anything else, such as a hub id, passes.
        given: parts that the caller brings along.

    Raises:
        UserError: a configuration is missing.
    """
    if not (folder / "model_index.json").is_file():
        return
    for name in _PARTS:
        if name not in given and not (folder / name / "config.json").is_file():
            raise UserError(f"{folder} is incomplete: it has no {name}/config.json")


def require_weights(folder: Path, backbone: nn.Module, transformer: nn.Module, vae: nn.Module) -> None:
    """Refuse loaded parts whose weights were not all in the files.

    diffusers leaves what it does not find without storage; transformers draws it at random, so that only the number of
    stored elements tells.

    Raises:
        UserError: weights are missing.
    """
    for name, part in (("transformer", transformer), ("vae", vae)):
        missing = [weight for weight, parameter in part.named_parameters() if parameter.is_meta]
        if missing:
            raise UserError(f"{folder}: the {name}'s files lack {len(missing)} of its weights, such as {missing[0]}")
    files = sorted((folder / "backbone").glob("*.safetensors"))
    quantized = hasattr(backbone.config, "quantization_config")  # holds fewer, packed, elements
    if files and not quantized:
        stored, needed = sum(map(_elements, files)), sum(parameter.numel() for parameter in backbone.parameters())
        if stored < needed:
            raise UserError(f"{folder}: the backbone's files hold {stored:,} of its {needed:,} weights")


def _elements(file: Path) -> int:
    with safe_open(file, framework="pt") as tensors:
        return sum(prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
