"""Step checkpoints: complete or invisible, the latest computed, training state without pickle's reach.

``checkpoints/step-00000500/`` holds ``model`` and ``ema`` (safetensors), ``optimizer.pt`` (loaded ``weights_only``),
``state.json``, and ``manifest.json`` with the size and hash of each. A folder is written under a temporary name, forced
to the disk, and renamed when complete; older ones go only after the new one has been read back.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from pickle import PickleError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from latteflow.data.shards import sha256_of, sync
from latteflow.errors import UserError

_MANIFEST = "manifest.json"
_log = logging.getLogger(__name__)


class CheckpointDamaged(UserError):
    """A file of a checkpoint is not what was written."""


def checkpoint_folders(output: Path) -> list[Path]:
    """Return the complete checkpoints under ``output``, oldest first; whether their bytes are right is left open."""
    return [folder for folder in _step_folders(output) if (folder / _MANIFEST).is_file()]


def save_checkpoint(
    output: Path,
    step: int,
    *,
    model: dict[str, torch.Tensor],
    ema: dict[str, torch.Tensor],
    optimizer: dict[str, Any],
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Write the state after ``step`` steps; once it is verified, remove all but the newest ``keep`` complete ones.

    Raises:
        OSError: it cannot be written; nothing of it is left, and no older one is touched.
        CheckpointDamaged: it was written and reads back otherwise; no older one is touched.
    """
    folder = output / "checkpoints" / f"step-{step:08d}"
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        save_file({name: tensor.contiguous() for name, tensor in model.items()}, partial / "model.safetensors")
        save_file({name: tensor.contiguous() for name, tensor in ema.items()}, partial / "ema.safetensors")
        with (partial / "optimizer.pt").open("wb") as file:
            torch.save(optimizer, file)
        (partial / "state.json").write_text(json.dumps({"step": step, **state}, indent=1))
        _write_manifest(partial)
        shutil.rmtree(folder, ignore_errors=True)  # of a run that went on from an older one
        os.replace(partial, folder)
        sync(folder.parent)
    except (OSError, RuntimeError, SafetensorError) as error:  # the libraries wrap a full disk in their own
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"checkpoint {folder} cannot be written: {_reason(error)}") from error
    verify_checkpoint(folder)
    # What is newer is damaged, or the run would have gone on from there; what is incomplete, a killed process left.
    kept = [complete for complete in checkpoint_folders(output) if complete <= folder][-keep:]
    for old in {*_step_folders(output), *folder.parent.glob(".step-*.partial")} - {*kept}:
        shutil.rmtree(old, ignore_errors=True)
    return folder


def verify_checkpoint(folder: Path) -> None:
    """Compare every file with the manifest.

    Raises:
        CheckpointDamaged: one is missing, cut short or changed; it is named.
    """
    try:
        files = json.loads((folder / _MANIFEST).read_text())["files"]
        expected = [(folder / name, int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointDamaged(f"{folder / _MANIFEST} cannot be read: {_reason(error)}") from error
    for file, size, digest in expected:
        if not file.is_file():
            raise CheckpointDamaged(f"{file} is missing")
        if file.stat().st_size != size:
            raise CheckpointDamaged(f"{file} has {file.stat().st_size} bytes in place of {size}")
        if sha256_of(file) != digest:
            raise CheckpointDamaged(f"{file} is not what was written: its hash differs")


def newest_checkpoint(output: Path) -> Path | None:
    """Return the newest checkpoint whose every byte is right, warning of damaged ones; None where there is none at all.

    Raises:
        UserError: there are checkpoints, and none of them is whole: starting anew would hide it.
    """
    damage = ""
    for folder in reversed(_step_folders(output)):
        try:
            verify_checkpoint(folder)
        except CheckpointDamaged as error:
            damage = str(error)
            _log.warning("%s: going back to an older checkpoint", error)
        else:
            return folder
    if damage:
        raise UserError(f"no checkpoint of {output} is whole ({damage}): delete {output / 'checkpoints'} to start anew")
    return None


def load_checkpoint(folder: Path) -> tuple[int, dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, Any]]:
    """Return (step, model, ema, optimizer) of a checkpoint.

    Raises:
        UserError: a part is not what it should be.
    """
    try:
        step = json.loads((folder / "state.json").read_text())["step"]
        model = load_file(folder / "model.safetensors")
        ema = load_file(folder / "ema.safetensors")
        optimizer = torch.load(folder / "optimizer.pt", weights_only=True, map_location="cpu")
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, EOFError, PickleError, SafetensorError) as error:
        raise UserError(
            f"checkpoint {folder} cannot be read ({_reason(error)}): delete it to resume from the one before"
        ) from error
    return step, model, ema, optimizer


def _step_folders(output: Path) -> list[Path]:
    return sorted((output / "checkpoints").glob("step-*"))


def _write_manifest(folder: Path) -> None:
    """Force the folder's files to the disk and write down what they are, last of all."""
    files = {}
    for file in sorted(folder.iterdir()):
        sync(file)
        files[file.name] = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
    (folder / _MANIFEST).write_text(json.dumps({"files": files}, indent=1))
    sync(folder / _MANIFEST)
    sync(folder)


def _reason(error: Exception) -> str:
    told = error.__context__ if isinstance(error.__context__, OSError) else error  # torch hides what the disk said
    return (str(told).strip().splitlines() or [type(told).__name__])[0]
