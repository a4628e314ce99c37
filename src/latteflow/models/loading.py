"""Parts from a folder or the hub: safetensors and JSON only, no code, no torchvision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderDC
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer, PreTrainedModel
from transformers.utils.hub import cached_file

from latteflow.errors import UserError
from latteflow.models.autoencoder import AUTOENCODERS, autoencoder_hub_id
from latteflow.models.backbones import family_of
from latteflow.models.processor import LatteFlowProcessor
from latteflow.models.saved import require_safe


def load_backbone(
    name: str,
    revision: str | None,
    dtype: torch.dtype,
    device: str | torch.device | None = None,
    quantization_config: Any = None,
) -> PreTrainedModel:
    """Load a vision-language model, its shards straight to ``dtype`` and ``device``.

    Args:
        name: a folder or hub id.
        revision: of the hub.
        dtype: of its weights in memory.
        device: left out, the CPU; anything else needs accelerate.
        quantization_config: transformers' own, to quantise while loading.

    Raises:
        UserError: there is none, its kind is not supported, or the folder is not safe.
    """
    folder = Path(name)
    if folder.is_dir():
        require_safe(folder)
        if not (folder / "config.json").is_file():
            raise UserError(
                f"{name} holds no config.json: a backbone's folder is what transformers' models are saved as"
            )
    config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    family_of(config)  # before gigabytes are loaded
    return AutoModelForImageTextToText.from_pretrained(
        name,
        config=config,
        revision=revision,
        dtype=dtype,
        use_safetensors=True,
        trust_remote_code=False,
        device_map=None if device is None else {"": torch.device(device)},
        quantization_config=quantization_config,
    )


def load_processor(name: str, config: Any, revision: str | None = None) -> LatteFlowProcessor:
    """Load what turns words and pictures into a backbone's inputs.

    Args:
        name: folder or hub id of the backbone.
        config: the backbone's.
        revision: of the hub.
    """
    source = {"revision": revision, "trust_remote_code": False}
    tokenizer = AutoTokenizer.from_pretrained(name, **source)
    image_processor = AutoImageProcessor.from_pretrained(name, backend="pil", **source)
    family = family_of(config)
    return LatteFlowProcessor(
        image_processor,
        tokenizer,
        chat_template=_chat_template(name, revision) or tokenizer.chat_template,
        family=config.model_type,
        tokens_per_tile=family.tokens_per_tile(config),
    )


def _chat_template(name: str, revision: str | None) -> str | None:
    """Return the processor's own template, which knows pictures where the tokenizer's may not."""
    for file in ("chat_template.jinja", "chat_template.json"):
        found = cached_file(
            name,
            file,
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if found is not None:
            words = Path(found).read_text(encoding="utf-8")
            return json.loads(words)["chat_template"] if file.endswith("json") else words
    return None


def load_autoencoder(name: str, dtype: torch.dtype, device: str | torch.device | None = None) -> AutoencoderDC:
    """Load a deep-compression autoencoder from a folder or the hub.

    Args:
        name: a folder, a hub id, or a published name of ``models/autoencoder.py``.
        dtype: of its weights in memory.
        device: left out, the CPU.

    Raises:
        UserError: the folder is not safe.
    """
    if Path(name).is_dir():
        require_safe(Path(name))
    place = autoencoder_hub_id(name) if name in AUTOENCODERS else name
    vae = AutoencoderDC.from_pretrained(place, dtype=dtype, use_safetensors=True)
    return vae.to(device=torch.device(device or "cpu"))  # type: ignore[return-value]
