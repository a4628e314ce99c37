"""Whether a saved pipeline is whole: what the libraries would fill in silently is refused here."""

from __future__ import annotations

import json
from collections.abc import Container, Mapping
from math import prod
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn

from latteflow.errors import UserError
from latteflow.models.quantization import QUANTIZATIONS, is_quantized, quantization_of

_PARTS = ("backbone", "transformer", "vae")
_UNSAFE = (".py", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
"""Code, and formats that can hold code."""
_BESIDE_WEIGHTS = ("._weight_scale", "._weight_zero_point")
"""What torchao saves of a quantised matrix beside its elements."""


def refuse_code(settings: Mapping[str, Any]) -> None:
    """Refuse arguments that would run somebody's code.

    Raises:
        UserError: one is set.
    """
    for name in ("trust_remote_code", "custom_pipeline"):
        if settings.get(name):
            raise UserError(f"{name} is not supported: latteflow runs no code that comes with a model")


def require_safe(folder: Path) -> None:
    """Refuse a model's folder that holds code or pickles, or a configuration that asks for code.

    Raises:
        UserError: it does; the message says what to do.
    """
    for file in sorted(folder.rglob("*")):
        if file.suffix in _UNSAFE:
            raise UserError(
                f"{file} is not safe to have in a model's folder: latteflow loads safetensors and JSON only. If the "
                "weights are in a pickle, convert them (load with the library that wrote them, save_pretrained); "
                "otherwise move the file away"
            )
        if file.suffix == ".json" and file.name.endswith("config.json") and "auto_map" in _json_of(file):
            raise UserError(f"{file} asks for code that comes with the model (auto_map): latteflow runs none")


def backbone_reference(folder: Path) -> tuple[str, str | None] | None:
    """Return name and revision of the backbone of a pipeline that was saved without it, else None."""
    index, config = folder / "model_index.json", folder / "transformer" / "config.json"
    if not index.is_file() or _json_of(index).get("backbone") != [None, None]:
        return None
    replica = _json_of(config) if config.is_file() else {}
    if not replica.get("backbone_name"):
        raise UserError(f"{folder} was saved without its backbone, and does not name it: pass backbone=...")
    return replica["backbone_name"], replica.get("backbone_revision")


def _json_of(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not JSON: {error}") from error
    return value if isinstance(value, dict) else {}


def require_configs(folder: Path, given: Container[str] = ()) -> None:
    """Refuse a folder that lacks a part's configuration: transformers would build its default, 72B parameters.

    Args:
        folder: of a saved pipeline; anything else, such as a hub id, passes.
        given: parts that the caller brings along.

    Raises:
        UserError: a configuration is missing, or there is code or a pickle.
    """
    if not (folder / "model_index.json").is_file():
        return
    require_safe(folder)
    for name in _PARTS:
        if name not in given and not (folder / name / "config.json").is_file():
            raise UserError(f"{folder} is incomplete: it has no {name}/config.json")


def require_weights(folder: Path, backbone: nn.Module | None, transformer: nn.Module, vae: nn.Module) -> None:
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
    if backbone is None:
        return
    files = sorted((folder / "backbone").glob("*.safetensors"))
    # Quantised in another way than ours, several weights may share an element.
    if files and (not is_quantized(folder / "backbone") or quantization_of(backbone) in QUANTIZATIONS):
        stored, needed = sum(map(_elements, files)), sum(parameter.numel() for parameter in backbone.parameters())
        if stored < needed:
            raise UserError(f"{folder}: the backbone's files hold {stored:,} of its {needed:,} weights")


def _elements(file: Path) -> int:
    with safe_open(file, framework="pt") as tensors:
        names = [name for name in tensors.keys() if not name.endswith(_BESIDE_WEIGHTS)]  # noqa: SIM118
        return sum(prod(tensors.get_slice(name).get_shape()) for name in names)
