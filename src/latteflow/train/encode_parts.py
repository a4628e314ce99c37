"""The frozen parts that encoding needs, from wherever a recipe may name them, and what tells them apart from others."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderDC
from safetensors import SafetensorError

from latteflow.data.contexts import backbone_identity
from latteflow.data.latents import autoencoder_identity
from latteflow.errors import UserError
from latteflow.models.autoencoder import AUTOENCODERS, autoencoder_hub_id
from latteflow.models.embedded import resolve_model
from latteflow.models.loading import load_backbone, load_processor
from latteflow.models.processor import LatteFlowProcessor
from latteflow.models.saved import require_safe


def load_encoder(name: str, revision: str | None = None) -> tuple[AutoencoderDC, dict[str, Any]]:
    """Load a frozen autoencoder in float32.

    Args:
        name: its folder, a saved pipeline's folder, a hub id, a published name or an embedded model.
        revision: of the hub.

    Returns:
        The autoencoder, and its identity for the manifest.

    Raises:
        UserError: there is none, or it cannot be loaded.
    """
    where = _part_of(autoencoder_hub_id(name) if name in AUTOENCODERS else name, "vae")
    with _named("autoencoder", name):
        vae = AutoencoderDC.from_pretrained(
            where, revision=revision, dtype=torch.float32, use_safetensors=True
        ).requires_grad_(False)
    vae = vae.eval()
    return vae, autoencoder_identity(vae, name, revision)


def load_prompter(name: str, revision: str | None = None) -> tuple[Any, LatteFlowProcessor, dict[str, Any]]:
    """Load a frozen backbone in float32 and its processor.

    Args:
        name: its folder, a saved pipeline's folder, a hub id or an embedded model.
        revision: of the hub.

    Returns:
        Backbone, processor, and the backbone's identity for the manifest.

    Raises:
        UserError: there is none, or it cannot be loaded.
    """
    where = _part_of(name, "backbone")
    with _named("backbone", name):
        backbone: Any = load_backbone(where, revision, torch.float32).requires_grad_(False).eval()
        processor = _processor(_part_of(name, "processor"), backbone.config, revision)
    return backbone, processor, backbone_identity(backbone, processor, name, revision)


def device_named(device: str) -> torch.device:
    """Return a device; ``auto`` is a GPU where there is one.

    Raises:
        UserError: it is not there.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"no device {device!r} on this machine: leave encode.device out, or take cpu")
    return torch.device(device)


def _part_of(name: str, part: str) -> str:
    """Return the folder of a saved pipeline's part, or ``name`` itself where it is the part."""
    folder = Path(resolve_model(name))
    if folder.is_dir():
        require_safe(folder)
    return str(folder / part) if (folder / "model_index.json").is_file() else name


def _processor(where: str, config: Any, revision: str | None) -> LatteFlowProcessor:
    settings = Path(where) / "processor_config.json"
    if settings.is_file() and json.loads(settings.read_text())["processor_class"] == LatteFlowProcessor.__name__:
        return LatteFlowProcessor.from_pretrained(where)
    return load_processor(where, config, revision)


@contextmanager
def _named(part: str, name: str) -> Iterator[None]:
    """Name the part where its files cannot be read."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        if isinstance(error, UserError):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{part} {name!r} cannot be loaded ({reason}): give a folder or hub id that holds one"
        ) from error
