"""Shard files: safetensors that say what they are, whole or not there, the same bytes whenever they are written.

A shard stands under its name only when all of it is on the disk. Beside its tensors it holds one JSON text with what is
known of it, and a hash of both, so that a file which was changed since is found out.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

_ABOUT = "latteflow"  # one key alone: safetensors writes several in no fixed order


class ShardDamaged(Exception):
    """A shard is not what was written."""


def write_shard(file: Path, tensors: Mapping[str, torch.Tensor], about: Mapping[str, Any]) -> None:
    """Write a shard: under another name first, forced to the disk, then renamed.

    Raises:
        OSError: it cannot be written; nothing of it is left.
    """
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    text = json.dumps({"about": about, "sha256": _digest(tensors, about)}, sort_keys=True)

    def write(partial: Path) -> None:
        try:
            save_file(dict(tensors), partial, metadata={_ABOUT: text})
        except SafetensorError as error:  # which a full disk becomes
            raise OSError(f"{file} cannot be written: {error}") from error

    _atomically(file, write)


def write_json(file: Path, values: Any) -> None:
    """Write JSON as a shard is written: whole or not at all."""
    _atomically(file, lambda partial: partial.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n"))


def remove_partial(folder: Path) -> None:
    """Remove what runs that were killed have left half written."""
    for partial in folder.glob(".*.partial"):
        shutil.rmtree(partial, ignore_errors=True)


def open_shard(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return a shard's tensors, mapped into memory, and what it says of itself; its hash is not looked at.

    Raises:
        ShardDamaged: it is missing, cut short or no shard.
    """
    try:
        with safe_open(file, "pt") as shard:
            about = json.loads((shard.metadata() or {})[_ABOUT])["about"]
            return {name: shard.get_tensor(name) for name in shard.keys()}, about  # noqa: SIM118 - it is no dict
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ShardDamaged(f"{file} cannot be read: {reason}") from error


def verified_shard(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return what ``open_shard`` returns, every byte compared with the hash inside.

    Raises:
        ShardDamaged: it differs, or cannot be read.
    """
    tensors, about = open_shard(file)
    with safe_open(file, "pt") as shard:
        written = json.loads(shard.metadata()[_ABOUT])["sha256"]
    if _digest(tensors, about) != written:
        raise ShardDamaged(f"{file} is not what was written: its hash differs")
    return tensors, about


def packed(texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return texts as bytes, uint8, one after the other, and where each ends, int64 (number,).

    Mapped into memory, a million captions cost nothing until they are read.
    """
    encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
    ends = torch.tensor([len(text) for text in encoded], dtype=torch.int64).cumsum(0)
    return torch.frombuffer(bytearray(b"".join(encoded) or b"\0"), dtype=torch.uint8), ends


def unpacked(data: torch.Tensor, ends: torch.Tensor, number: int) -> str:
    """Return text ``number`` of what ``packed`` returned."""
    start = int(ends[number - 1]) if number else 0
    return data[start : int(ends[number])].numpy().tobytes().decode("utf-8", "surrogatepass")


def sha256_of(file: Path) -> str:
    """Return a file's hash, in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while block := content.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def tensors_sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return a hash of names, dtypes, shapes and values, in hexadecimal."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _digest(tensors: Mapping[str, torch.Tensor], about: Mapping[str, Any]) -> str:
    text = json.dumps(about, sort_keys=True)
    return hashlib.sha256(f"{tensors_sha256(tensors)} {text}".encode()).hexdigest()


def _atomically(file: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` write in a folder of its own, where libraries may leave files of their own, then rename."""
    folder = file.parent / f".{file.name}.{os.getpid()}.partial"
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / file.name
    try:
        partial.touch()
        readers = partial.stat().st_mode & 0o777
        write(partial)
        partial.chmod(readers)  # safetensors gives its files to their owner alone
        sync(partial)
        os.replace(partial, file)
        sync(file.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk.

    Raises:
        OSError: they cannot be brought there.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
