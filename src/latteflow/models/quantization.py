"""Quantised weights: int8 or float8 matrices with one scale a row, through torchao and diffusers' own quantisers.

Weights alone are quantised, and each is cast to the activations' dtype when it is multiplied with: memory is what is
saved. The libraries do the work; what is here names the two kinds, and refuses what they would get wrong.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from latteflow.errors import UserError

if TYPE_CHECKING:
    from diffusers import PipelineQuantizationConfig

QUANTIZATIONS = ("int8", "fp8")
"""Signed 8-bit integers, and float8 with 4 bits of exponent and 3 of mantissa."""
_PLAIN_PARTS = ["io"]
"""Of the replica, 3.4M of 1,358M weights beside Qwen2-VL-2B: latents come in and velocities go out here. [D]"""
_KINDS = {"Int8Tensor": "int8", "Float8Tensor": "fp8"}


def quantization_config(name: str) -> PipelineQuantizationConfig:
    """Return what ``LatteFlowPipeline.from_pretrained`` takes as ``quantization_config``.

    The matrices of the replica's layers and of the backbone are quantised as they are loaded; the rest of the replica,
    embeddings, the matrix that is tied to them, and the autoencoder, are not.

    Args:
        name: "int8" or "fp8".

    Raises:
        UserError: the name is another, or torchao is not installed.
    """
    if name not in QUANTIZATIONS:
        raise UserError(f"there is no quantization {name!r}: give {' or '.join(QUANTIZATIONS)}")
    _require_torchao()
    from diffusers import PipelineQuantizationConfig, TorchAoConfig
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig
    from transformers import TorchAoConfig as BackboneConfig

    # Left alone, torchao would change inductor's settings for the whole process.
    kind = (Int8WeightOnlyConfig if name == "int8" else Float8WeightOnlyConfig)(set_inductor_config=False)
    replica = TorchAoConfig(kind, modules_to_not_convert=list(_PLAIN_PARTS))
    parts: dict[str, Any] = {"transformer": replica, "backbone": BackboneConfig(kind)}
    return PipelineQuantizationConfig(quant_mapping=parts)


def quantization_of(*parts: nn.Module) -> str | None:
    """Return how matrices of some parts are quantised, "int8" or "fp8" (else torchao's own word), None if none is."""
    packed = {type(weight).__name__ for part in parts for weight in part.parameters() if _is_packed(weight)}
    return ", ".join(sorted(_KINDS.get(kind, kind) for kind in packed)) or None


def stored_bytes(tensor: torch.Tensor) -> int:
    """Return what a tensor holds in memory; ``nbytes`` of a quantised one are those of the plain one it stands for."""
    if not _is_packed(tensor):
        return tensor.nbytes
    names, _ = tensor.__tensor_flatten__()  # type: ignore[operator]
    return sum(stored_bytes(getattr(tensor, name)) for name in names)


def _is_packed(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "__tensor_flatten__")


def is_quantized(folder: Path) -> bool:
    """Say whether the files of a part, a folder with ``config.json``, hold quantised weights."""
    try:
        return "quantization_config" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # whoever loads it says what is wrong
        return False


def quantized_settings(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments of ``from_pretrained`` that fit a saved pipeline whose weights may be quantised.

    Quantised weights keep the dtype that they were quantised in, and fail, or compute in two, beside parts of another.

    Args:
        folder: of the saved pipeline.
        settings: the caller's arguments; without ``dtype`` they get the one of the quantised weights, if there are any.

    Raises:
        UserError: the weights are quantised, and torchao is missing, or the caller asks for another dtype or to
            quantise them again.
    """
    parts = [folder / name for name in ("transformer", "backbone") if name not in settings]
    dtypes = {dtype for part in parts if is_quantized(part) for dtype in _torchao_dtypes(part)}
    if not dtypes:
        return dict(settings)
    _require_torchao()
    if settings.get("quantization_config") is not None:
        raise UserError(f"{folder} holds quantised weights: load it without quantization_config (--quantize)")
    (dtype,) = dtypes if len(dtypes) == 1 else (None,)
    asked = settings.get("dtype", dtype)
    if dtype is None or asked != dtype:
        kinds = " and ".join(sorted(str(one).removeprefix("torch.") for one in dtypes))
        raise UserError(f"{folder} was quantised in {kinds}: give that as dtype (--dtype), or leave it out")
    return {**settings, "dtype": dtype}


def _torchao_dtypes(part: Path) -> set[torch.dtype]:
    """Return the dtypes that a part's weights were quantised in; torchao notes each in the file's header."""
    found = set()
    for file in sorted(part.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                notes = (tensors.metadata() or {}).values()
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file} cannot be read: {error}") from error
        for note in notes:
            if '"_tensor_data_names"' in note:
                dtype = getattr(torch, str(json.loads(note).get("_data", {}).get("dtype", {}).get("_data")), None)
                if isinstance(dtype, torch.dtype):
                    found.add(dtype)
    return found


def _require_torchao() -> None:
    if find_spec("torchao") is None:
        raise UserError('quantised weights need torchao: pip install "latteflow[quantize]"')
