"""Real models as configurations: which backbone, cut into how many experts, with which autoencoder.

A preset holds what it takes to build its parts without a download: on the meta device, where nothing is allocated, or
with random weights, straight in their dtype. Trained weights come from ``Preset.hub_id`` and ``autoencoder_hub_id``.

The numbers are those of the models' ``config.json``; ``Preset.backbone_parameters`` is the published count of their
files, which the tests hold the configurations to.

[D] K and M: the paper cuts 28 layers into 4 groups of 7. Presets keep K = 4 where it divides the layers (28, 32, 36).
SmolVLM-256M's 30 layers go into 3 groups of 10 or 5 of 6: 5 of 6, because 6 is nearer than 10 to the paper's 7.
[D] Autoencoder: the paper says DC-AE, 32 times down, 32 channels, but not which; the presets take the one that was
trained for text to image.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderDC
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from latteflow.errors import UserError
from latteflow.models.autoencoder import autoencoder_config
from latteflow.models.transformer import LatteFlowTransformer

_WEIGHT_STD = 0.02

_QWEN_TOKENS = {
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "image_token_id": 151655,
    "video_token_id": 151656,
}
_QWEN_TEXT = {
    "vocab_size": 151936,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
_MROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
_MROPE_INTERLEAVED = {
    "rope_type": "default",
    "rope_theta": 5e6,
    "mrope_section": [24, 20, 20],
    "mrope_interleaved": True,
}
_QWEN_PATCHES = {"in_channels": 3, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_heads": 16}


@dataclass(frozen=True)
class Preset:
    """A backbone at real size and how it is cut into experts."""

    name: str
    hub_id: str
    """Where the backbone's weights are."""
    config: Mapping[str, Any]
    """The backbone's transformers configuration, text and vision."""
    backbone_parameters: int
    """The published count, tied weights once."""
    num_groups: int
    """K, the number of experts."""
    autoencoder: str = "dc-ae-f32c32-sana-1.0"
    picture_size: int = 256
    """Pixels a side of what is drawn unless asked otherwise."""

    @property
    def num_layers(self) -> int:
        """L, the text layers."""
        return self.config["text_config"]["num_hidden_layers"]

    @property
    def group_size(self) -> int:
        """M, the layers of one expert."""
        return self.num_layers // self.num_groups


def _text(hidden: int, intermediate: int, layers: int, heads: int, key_value_heads: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
    }


def _qwen2_vl(text: dict[str, int], *, tied: bool, vocabulary: int = 151936) -> dict[str, Any]:
    rope = {"rope_parameters": _MROPE, "max_position_embeddings": 32768}
    vision = {"depth": 32, "embed_dim": 1280, "hidden_size": text["hidden_size"], "mlp_ratio": 4, "patch_size": 14}
    return {
        "model_type": "qwen2_vl",
        "text_config": {**_QWEN_TEXT, **text, **rope, "vocab_size": vocabulary, "tie_word_embeddings": tied},
        "vision_config": {**vision, **_QWEN_PATCHES, "hidden_act": "quick_gelu"},
        "tie_word_embeddings": tied,
        **_QWEN_TOKENS,
    }


def _qwen2_5_vl(text: dict[str, int], *, tied: bool, vocabulary: int = 151936) -> dict[str, Any]:
    rope = {"rope_parameters": _MROPE, "max_position_embeddings": 128000}
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": text["hidden_size"]}
    windows = {"patch_size": 14, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2}
    return {
        "model_type": "qwen2_5_vl",
        "text_config": {**_QWEN_TEXT, **text, **rope, "vocab_size": vocabulary, "tie_word_embeddings": tied},
        "vision_config": {**vision, **windows, **_QWEN_PATCHES, "hidden_act": "silu"},
        "tie_word_embeddings": tied,
        **_QWEN_TOKENS,
    }


def _qwen3_vl(text: dict[str, int], *, tied: bool, large_tower: bool = False) -> dict[str, Any]:
    rope = {"rope_parameters": _MROPE_INTERLEAVED, "max_position_embeddings": 262144}
    tower = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]}
    if large_tower:
        tower = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "deepstack_visual_indexes": [8, 16, 24]}
    places = {"patch_size": 16, "num_position_embeddings": 2304, "out_hidden_size": text["hidden_size"]}
    own = {"head_dim": 128, "attention_bias": False, "tie_word_embeddings": tied}
    return {
        "model_type": "qwen3_vl",
        "text_config": {**_QWEN_TEXT, **text, **rope, **own},
        "vision_config": {**tower, **places, **_QWEN_PATCHES, "hidden_act": "gelu_pytorch_tanh"},
        "tie_word_embeddings": tied,
        **_QWEN_TOKENS,
    }


def _smolvlm(text: dict[str, int]) -> dict[str, Any]:
    """SmolVLM's first generation, which is an Idefics3: SmolLM2 layers behind SigLIP base at 512 pixels.

    Its files hold the output matrix beside the embedding, so that the two are not tied.
    """
    tower = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    return {
        "model_type": "idefics3",
        "text_config": {
            "model_type": "llama",
            **text,
            "head_dim": 64,
            "vocab_size": 49280,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 8192,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 2,
            "tie_word_embeddings": False,
        },
        "vision_config": {**tower, "image_size": 512, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh"},
        "scale_factor": 4,
        "image_token_id": 49190,
        "pad_token_id": 2,
        "tie_word_embeddings": False,
    }


_PRESETS: tuple[Preset, ...] = (
    Preset(
        "qwen2-vl-2b",
        "Qwen/Qwen2-VL-2B-Instruct",
        _qwen2_vl(_text(1536, 8960, 28, 12, 2), tied=True),
        backbone_parameters=2_208_985_600,
        num_groups=4,
    ),
    Preset(
        "qwen2-vl-7b",
        "Qwen/Qwen2-VL-7B-Instruct",
        _qwen2_vl(_text(3584, 18944, 28, 28, 4), tied=False, vocabulary=152064),
        backbone_parameters=8_291_375_616,
        num_groups=4,
    ),
    Preset(
        "qwen2.5-vl-3b",
        "Qwen/Qwen2.5-VL-3B-Instruct",
        _qwen2_5_vl(_text(2048, 11008, 36, 16, 2), tied=True),
        backbone_parameters=3_754_622_976,
        num_groups=4,
    ),
    Preset(
        "qwen2.5-vl-7b",
        "Qwen/Qwen2.5-VL-7B-Instruct",
        _qwen2_5_vl(_text(3584, 18944, 28, 28, 4), tied=False, vocabulary=152064),
        backbone_parameters=8_292_166_656,
        num_groups=4,
    ),
    Preset(
        "qwen3-vl-2b",
        "Qwen/Qwen3-VL-2B-Instruct",
        _qwen3_vl(_text(2048, 6144, 28, 16, 8), tied=True),
        backbone_parameters=2_127_532_032,
        num_groups=4,
    ),
    Preset(
        "qwen3-vl-4b",
        "Qwen/Qwen3-VL-4B-Instruct",
        _qwen3_vl(_text(2560, 9728, 36, 32, 8), tied=True),
        backbone_parameters=4_437_815_808,
        num_groups=4,
    ),
    Preset(
        "qwen3-vl-8b",
        "Qwen/Qwen3-VL-8B-Instruct",
        _qwen3_vl(_text(4096, 12288, 36, 32, 8), tied=False, large_tower=True),
        backbone_parameters=8_767_123_696,
        num_groups=4,
    ),
    Preset(
        "smolvlm-256m",
        "HuggingFaceTB/SmolVLM-256M-Instruct",
        _smolvlm(_text(576, 1536, 30, 9, 3)),
        backbone_parameters=256_484_928,
        num_groups=5,
    ),
    Preset(
        "smolvlm-500m",
        "HuggingFaceTB/SmolVLM-500M-Instruct",
        _smolvlm(_text(960, 2560, 32, 15, 5)),
        backbone_parameters=507_482_304,
        num_groups=4,
    ),
)


def preset_names() -> tuple[str, ...]:
    """Return the names that ``preset`` knows."""
    return tuple(preset.name for preset in _PRESETS)


def preset(name: str) -> Preset:
    """Return a preset by name.

    Raises:
        UserError: there is none of that name.
    """
    for known in _PRESETS:
        if known.name == name:
            return known
    raise UserError(f"no preset {name!r}: there are {', '.join(preset_names())}")


def backbone_config(preset: Preset) -> PreTrainedConfig:
    """Return the backbone's configuration as transformers' own class."""
    settings = dict(preset.config)
    return AutoConfig.for_model(settings.pop("model_type"), **settings)


def build_backbone(
    preset: Preset, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "meta"
) -> PreTrainedModel:
    """Return the backbone, frozen, without trained weights.

    Args:
        preset: which.
        dtype: of its weights. No copy in another dtype is made on the way.
        device: "meta" allocates nothing; elsewhere weights are drawn as transformers draws them (spread 0.02), from
            torch's global generator.
    """
    with torch.device("meta"):
        backbone = AutoModelForImageTextToText.from_config(backbone_config(preset), dtype=dtype)
    if torch.device(device).type != "meta":
        backbone.to_empty(device=device)
        backbone.tie_weights()  # emptied, tied weights are two
        backbone.init_weights()
    return backbone.requires_grad_(False).eval()


def build_transformer(
    preset: Preset,
    backbone: PreTrainedModel | None = None,
    *,
    group_size: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "meta",
    **settings: Any,
) -> LatteFlowTransformer:
    """Return the replica, untrained.

    Args:
        preset: which.
        backbone: copied from, in its dtype and on its device; left out, weights are drawn (spread 0.02).
        group_size: M, another than the preset's.
        dtype: of weights that are drawn.
        device: of weights that are drawn; "meta" allocates nothing.
        **settings: further arguments of ``LatteFlowTransformer``.

    Raises:
        UserError: M does not divide the layers.
    """
    layers, size = preset.num_layers, preset.group_size if group_size is None else group_size
    if size < 1 or layers % size:
        divisors = ", ".join(str(m) for m in range(1, layers + 1) if layers % m == 0)
        raise UserError(f"group_size has to divide the {layers} layers of {preset.name} ({divisors}): got {size}")
    autoencoder = autoencoder_config(preset.autoencoder)
    factor = 2 ** (len(autoencoder["encoder_block_out_channels"]) - 1)
    settings = {
        "num_groups": layers // size,
        "latent_channels": autoencoder["latent_channels"],
        "sample_size": preset.picture_size // factor,
        **settings,
    }
    copied = backbone is not None
    replica = LatteFlowTransformer.from_backbone(backbone or build_backbone(preset, dtype), **settings)
    if not copied and torch.device(device).type != "meta":
        _draw_weights(replica, device)
        replica.initialize_additions()
    return replica


def build_autoencoder(
    name: str, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "meta"
) -> AutoencoderDC:
    """Return a published autoencoder, frozen, without trained weights.

    Args:
        name: a key of ``AUTOENCODERS``.
        dtype: of its weights. No copy in another dtype is made on the way.
        device: "meta" allocates nothing; elsewhere weights are drawn (spread 0.02) from torch's global generator.

    Raises:
        UserError: there is no such name.
    """
    config = autoencoder_config(name)
    with torch.device("meta"):
        autoencoder = AutoencoderDC(**config)
    nn.Module.to(autoencoder, dtype)  # diffusers' own warns where nothing is to be warned of
    if torch.device(device).type != "meta":
        _draw_weights(autoencoder, device)
    return autoencoder.requires_grad_(False).eval()


@torch.no_grad()
def _draw_weights(model: nn.Module, device: torch.device | str) -> None:
    """Give a model of the meta device its storage: matrices and kernels at random, norms one, biases zero."""
    model.to_empty(device=device)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=_WEIGHT_STD)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
