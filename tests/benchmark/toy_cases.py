"""Every model of `latteflow benchmark` at a size that takes milliseconds."""

from __future__ import annotations

from dataclasses import replace

import torch

from latteflow.benchmark import ours, peers, stand_ins
from latteflow.models.presets import Preset

CPU = torch.device("cpu")

PRESET = Preset(
    name="toy",
    hub_id="nobody/toy",
    config={
        "model_type": "qwen2_vl",
        "text_config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "vocab_size": 64,
            "rms_norm_eps": 1e-6,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "max_position_embeddings": 256,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        },
        "vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 8},
        "vision_start_token_id": 60,
        "vision_end_token_id": 61,
        "image_token_id": 62,
        "video_token_id": 63,
    },
    backbone_parameters=0,
    num_groups=2,
)
JANUS = {
    "text_config": {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 128,
    },
    "vision_config": {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
        "num_image_tokens": 16,
        "projection_dim": 32,
    },
    "vq_config": {
        "projection_dim": 32,
        "image_token_embed_dim": 32,
        "num_embeddings": 64,
        "base_channels": 32,
        "channel_multiplier": [1, 1],
        "latent_channels": 32,
        "num_hidden_layers": 1,
        "num_res_blocks": 1,
    },
}
DIT = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 2,
    "sample_size": 8,
    "out_channels": 8,
    "num_embeds_ada_norm": 10,
}
VAE = {**peers.SD_VAE, "block_out_channels": (32, 32, 32, 32), "layers_per_block": 1}
SANA = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 8,
    "cross_attention_dim": 16,
    "num_layers": 2,
    "caption_channels": 24,
    "sample_size": 8,
}


def small(of):
    """A stand-in's geometry, layers narrowed and a quarter of them timed."""
    sizes = {"hidden": 32, "intermediate": 48, "layers": 4, "heads": 4, "key_value_heads": 2, "tokens": 16, "out": 8}
    return replace(of, layers_timed=1, **sizes)


def our_case(groups=2):
    return ours.latteflow_case(ours.regrouped(ours.build_vanilla(PRESET, CPU, torch.float32), groups), steps=10)


def case_of(name):
    """A toy by the short name that `latteflow.benchmark.paper` has for it."""
    match name:
        case "k4":
            return our_case(2)
        case "k1":
            return our_case(1)
        case "janus":
            return peers.janus_case(CPU, torch.float32, geometry=JANUS)
        case "dit":
            return peers.dit_case(CPU, torch.float32, geometry=DIT, autoencoder=VAE, steps=5)
        case "sana":
            return peers.sana_case(CPU, torch.float32, geometry=SANA, autoencoder=None, steps=4)
        case "show-o":
            return stand_ins.stand_in_case(small(stand_ins.SHOW_O), CPU, torch.float32)
        case "bagel":
            return stand_ins.stand_in_case(small(stand_ins.BAGEL_7B), CPU, torch.float32)
    raise KeyError(name)
