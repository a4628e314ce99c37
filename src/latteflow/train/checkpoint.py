"""Step checkpoints: complete or invisible, the latest computed, training state without pickle's reach.

``checkpoints/step-00000500/`` holds ``model``, ``ema`` (safetensors), ``optimizer.pt`` (loaded ``weights_only``) and
``state.json``. A folder is written under a temporary name and renamed when complete.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from pickle import PickleError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from latteflow.errors import UserError

_PARTS = ("model.safetensors", "ema.safetensors", "optimizer.pt", "state.json")


def checkpoint_folders(output: Path) -> list[Path]:
    """Return the complete checkpoints under ``output``, oldest first."""
    folders = sorted((output / "checkpoints").glob("step-*"))
    return [folder for folder in folders if all((folder / part).is_file() for part in _PARTS)]


def save_checkpoint(
    output: Path,
    step: int,
    *,
    model: dict[str, torch.Tensor],
    ema: dict[str, torch.Tensor],
    optimizer: dict[str, Any],
    recipe: dict[str, Any],
    keep: int,
) -> Path:
    """Write the state after ``step`` steps and remove all but the newest ``keep`` checkpoints."""
    folder = output / "checkpoints" / f"step-{step:08d}"
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in model.items()}, partial / "model.safetensors")
    save_file({name: tensor.contiguous() for name, tensor in ema.items()}, partial / "ema.safetensors")
    torch.save(optimizer, partial / "optimizer.pt")
    (partial / "state.json").write_text(json.dumps({"step": step, "recipe": recipe}, indent=1))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    for old in checkpoint_folders(output)[:-keep]:
        shutil.rmtree(old)
    return folder


def load_checkpoint(folder: Path) -> tuple[int, dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, Any]]:
    """Return (step, model, ema, optimizer) of a checkpoint.

    Raises:
        UserError: a part is truncated or not what it should be.
    """
    try:
        step = json.loads((folder / "state.json").read_text())["step"]
        model = load_file(folder / "model.safetensors")
        ema = load_file(folder / "ema.safetensors")
        optimizer = torch.load(folder / "optimizer.pt", weights_only=True, map_location="cpu")
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, EOFError, PickleError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"checkpoint {folder} cannot be read ({reason}): delete it to resume from the one before"
        ) from error
    return step, model, ema, optimizer
