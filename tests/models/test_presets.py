"""Real models as configurations: their counts against published ones, nothing allocated on the meta device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText

from latteflow.errors import UserError
from latteflow.models import autoencoder
from latteflow.models.autoencoder import AUTOENCODERS, autoencoder_config, autoencoder_hub_id
from latteflow.models.backbones import family_of
from latteflow.models.context import compute_context
from latteflow.models.presets import (
    Preset,
    backbone_config,
    build_autoencoder,
    build_backbone,
    build_transformer,
    preset,
    preset_names,
)

PUBLISHED = {
    "qwen2-vl-2b": 2_208_985_600,
    "qwen2-vl-7b": 8_291_375_616,
    "qwen2.5-vl-3b": 3_754_622_976,
    "qwen2.5-vl-7b": 8_292_166_656,
    "qwen3-vl-2b": 2_127_532_032,
    "qwen3-vl-4b": 4_437_815_808,
    "qwen3-vl-8b": 8_767_123_696,
    "smolvlm-256m": 256_484_928,
    "smolvlm-500m": 507_482_304,
}
"""Parameters in the models' files on the hub, as published with them: 2.21B, 8.29B, 3.75B and so on."""
NAMES = tuple(PUBLISHED)
ONE_A_FAMILY = ("qwen2-vl-2b", "qwen2.5-vl-3b", "qwen3-vl-2b", "smolvlm-256m")
SMALL_TEXT = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "vocab_size": 160}
SMALL_VISION = {
    "qwen2_vl": {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2},
    "qwen2_5_vl": {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 40,
        "out_hidden_size": 64,
        "num_heads": 2,
        "fullatt_block_indexes": [1],
    },
    "qwen3_vl": {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 40,
        "out_hidden_size": 64,
        "num_heads": 2,
        "deepstack_visual_indexes": [0, 1],
    },
    "idefics3": {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2},
}


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def tensors(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


def small(name: str) -> Preset:
    """A preset with its family's settings at a thousandth of the size."""
    known = preset(name)
    model_type = known.config["model_type"]
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    text: dict[str, Any] = {**known.config["text_config"], **SMALL_TEXT, **heads, **ends, "head_dim": 16}
    if "mrope_section" in text["rope_parameters"]:
        text["rope_parameters"] = {**text["rope_parameters"], "mrope_section": [4, 2, 2]}
    tokens = {key: 100 + i for i, key in enumerate(known.config) if key.endswith("_token_id") and key != "pad_token_id"}
    vision = {**known.config["vision_config"], **SMALL_VISION[model_type]}
    return replace(known, config={**known.config, **tokens, "text_config": text, "vision_config": vision}, num_groups=2)


def layer_parameters(config: Any, *, modulated: bool) -> int:
    """A decoder layer's numbers by hand; ``modulated`` adds what the replica's layers have, but for gates."""
    text = config.get_text_config()
    width, head = text.hidden_size, getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads, key_values = text.num_attention_heads * head, text.num_key_value_heads * head
    numbers = 2 * width * heads + 2 * width * key_values + 3 * width * text.intermediate_size + 2 * width
    if config.model_type in ("qwen2_vl", "qwen2_5_vl"):
        numbers += heads + 2 * key_values  # biases
    if config.model_type == "qwen3_vl":
        numbers += 2 * head  # norms of queries and keys
    if modulated:
        numbers += 2 * width + 4 * width * 256 + 4 * width
    return numbers


def test_the_names_are_the_promised_ones():
    assert preset_names() == NAMES
    assert [preset(name).name for name in NAMES] == list(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_backbone_has_the_published_number_of_parameters_and_no_storage(name):
    known = preset(name)
    backbone = build_backbone(known)
    assert count(backbone) == PUBLISHED[name] == known.backbone_parameters
    assert all(tensor.is_meta for tensor in tensors(backbone))
    assert {p.dtype for p in backbone.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in backbone.parameters())
    layers = family_of(backbone.config).text_model(backbone).layers
    assert len(layers) == known.num_layers
    assert count(layers) == known.num_layers * layer_parameters(backbone.config, modulated=False)


@pytest.mark.parametrize("name", NAMES)
def test_the_replica_has_the_numbers_of_the_closed_form_and_no_storage(name):
    known = preset(name)
    assert known.num_groups * known.group_size == known.num_layers
    replica = build_transformer(known)
    assert all(tensor.is_meta for tensor in tensors(replica))
    assert {p.dtype for p in replica.parameters()} == {torch.bfloat16}
    assert (replica.config.num_groups, replica.group_size) == (known.num_groups, known.group_size)
    assert replica.config.sample_size == 8
    config = replica.config
    gates = (known.num_layers - known.num_groups) * (256 + 1) * config.num_attention_heads
    layers = known.num_layers * layer_parameters(backbone_config(known), modulated=True)
    assert count(replica.layers) == layers + gates


def test_the_paper_s_numbers_come_out():
    # 46.8M a layer, 328M a group of 7, without what the paper adds around them (known from its config alone).
    layer = layer_parameters(backbone_config(preset("qwen2-vl-2b")), modulated=False)
    assert round(layer / 1e6, 1) == 46.8
    assert round(7 * layer / 1e6) == 328


def test_layers_are_cut_as_decided():
    cut = {name: (preset(name).num_groups, preset(name).group_size) for name in NAMES}
    assert cut["qwen2-vl-2b"] == (4, 7)
    assert cut["qwen2.5-vl-3b"] == (4, 9)
    assert cut["smolvlm-256m"] == (5, 6)
    assert cut["smolvlm-500m"] == (4, 8)


def test_an_unknown_preset_is_refused_with_the_names():
    with pytest.raises(UserError, match=r"no preset 'qwen9': there are qwen2-vl-2b, .*smolvlm-500m"):
        preset("qwen9")


@pytest.mark.parametrize("size", [0, -7, 5, 56])
def test_a_group_that_does_not_divide_the_layers_is_refused(size):
    with pytest.raises(UserError, match=r"28 layers of qwen2-vl-2b \(1, 2, 4, 7, 14, 28\)"):
        build_transformer(preset("qwen2-vl-2b"), group_size=size)


def test_another_group_size_cuts_the_same_layers():
    known = preset("smolvlm-256m")
    backbone = build_backbone(known)
    cut = {size: build_transformer(known, backbone, group_size=size) for size in (3, 10, 30)}
    assert {size: replica.config.num_groups for size, replica in cut.items()} == {3: 10, 10: 3, 30: 1}


@pytest.mark.parametrize("name", ONE_A_FAMILY)
def test_random_weights_are_drawn_in_their_dtype_and_run(name):
    torch.manual_seed(0)
    known = small(name)
    backbone = build_backbone(known, device="cpu")
    assert not any(tensor.is_meta for tensor in tensors(backbone))
    assert {p.dtype for p in backbone.parameters()} == {torch.bfloat16}
    matrix = family_of(backbone.config).text_model(backbone).layers[1].mlp.up_proj.weight.float()
    assert abs(matrix.mean()) < 0.002
    assert 0.018 < matrix.std() < 0.022
    assert (backbone.get_input_embeddings().weight is backbone.lm_head.weight) == known.config["tie_word_embeddings"]

    ids = torch.randint(3, 90, (2, 9))
    context = compute_context(backbone, ids, torch.ones_like(ids))
    assert context.keys.dtype == torch.bfloat16
    assert context.keys.isfinite().all()
    replica = build_transformer(known, backbone, sample_size=4)
    assert torch.equal(replica.layers[3].mlp.up_proj.weight, backbone_layer(backbone, 3).mlp.up_proj.weight)
    nn.init.normal_(replica.io[0].head.weight)
    velocity = replica(torch.randn(2, 32, 4, 4).bfloat16(), torch.tensor([0.1, 0.9]), context)
    assert velocity.isfinite().all()


def backbone_layer(backbone, number):
    return family_of(backbone.config).text_model(backbone).layers[number]


@pytest.mark.parametrize("name", ONE_A_FAMILY)
def test_buffers_are_those_of_a_model_built_in_the_ordinary_way(name):
    known = small(name)
    built = dict(build_backbone(known, device="cpu").named_buffers())
    ordinary = dict(AutoModelForImageTextToText.from_config(backbone_config(known)).named_buffers())
    assert built.keys() == ordinary.keys()
    for key, buffer in ordinary.items():
        assert built[key].dtype == buffer.dtype
        assert torch.equal(built[key], buffer), key


def test_a_replica_without_a_backbone_s_weights_starts_as_one_with_them():
    torch.manual_seed(0)
    known = small("qwen2-vl-2b")
    replica = build_transformer(known, device="cpu", dtype=torch.float32)
    assert {p.dtype for p in replica.parameters()} == {torch.float32}
    copied = build_transformer(known, build_backbone(known, torch.float32, "cpu"))
    for (key, ours), theirs in zip(replica.state_dict().items(), copied.state_dict().values(), strict=True):
        assert ours.shape == theirs.shape
        if "modulation" in key or "gate." in key or "norm" in key or "head" in key:
            assert torch.equal(ours, theirs), key
    assert 0.018 < replica.layers[2].mlp.down_proj.weight.std() < 0.022


def test_the_autoencoders_are_the_published_ones():
    numbers = {name: count(build_autoencoder(name)) for name in AUTOENCODERS}
    assert numbers == {
        "dc-ae-f32c32-in-1.0": 323_356_460,
        "dc-ae-f32c32-mix-1.0": 323_356_460,
        "dc-ae-f32c32-sana-1.0": 312_250_275,  # the published count of SANA's file
        "dc-ae-f32c32-sana-1.1": 312_250_275,
        "dc-ae-lite-f32c32-sana-1.1": 421_181_228,
    }
    scales = {name: config["scaling_factor"] for name, config in AUTOENCODERS.items()}
    assert scales == {
        "dc-ae-f32c32-in-1.0": 0.3189,
        "dc-ae-f32c32-mix-1.0": 0.4552,
        "dc-ae-f32c32-sana-1.0": 0.41407,
        "dc-ae-f32c32-sana-1.1": 0.41407,
        "dc-ae-lite-f32c32-sana-1.1": 0.41407,
    }
    assert all(preset(name).autoencoder in AUTOENCODERS for name in NAMES)


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_an_autoencoder_of_the_meta_device_shrinks_32_times_into_32_channels(name):
    vae = build_autoencoder(name)
    assert all(tensor.is_meta for tensor in tensors(vae))
    assert {p.dtype for p in vae.parameters()} == {torch.bfloat16}
    pictures = torch.zeros(1, 3, 64, 96, dtype=torch.bfloat16, device="meta")
    latents = vae.encode(pictures).latent
    assert latents.shape == (1, 32, 2, 3)
    assert vae.decode(latents).sample.shape == pictures.shape
    assert autoencoder_hub_id(name) == f"mit-han-lab/{name}-diffusers"


def test_the_sana_autoencoders_share_their_encoder():
    encoders = [
        {key: shape.shape for key, shape in build_autoencoder(name).encoder.state_dict().items()}
        for name in AUTOENCODERS
        if "sana" in name
    ]
    assert encoders[0] == encoders[1] == encoders[2]


def test_an_autoencoder_with_random_weights_runs(monkeypatch):
    narrow = {"encoder_block_out_channels": (32, 64), "decoder_block_out_channels": (32, 64)}
    stages = {
        "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
        "decoder_block_types": ("ResBlock", "EfficientViTBlock"),
        "encoder_layers_per_block": (1, 1),
        "decoder_layers_per_block": (1, 1),
        "encoder_qkv_multiscales": ((), (5,)),
        "decoder_qkv_multiscales": ((), (5,)),
        "decoder_norm_types": ("batch_norm", "rms_norm"),
        "decoder_act_fns": ("relu", "silu"),
        "latent_channels": 4,
    }
    settings = {**autoencoder_config("dc-ae-f32c32-in-1.0"), **narrow, **stages}
    monkeypatch.setattr(autoencoder, "AUTOENCODERS", {"narrow": settings})
    torch.manual_seed(0)
    vae = build_autoencoder("narrow", torch.float32, "cpu")
    norm = next(module for module in vae.modules() if isinstance(module, nn.BatchNorm2d))
    assert norm.running_mean.abs().sum() == 0
    assert torch.equal(norm.running_var, torch.ones_like(norm.running_var))
    picture = vae.decode(vae.encode(torch.randn(1, 3, 16, 16)).latent).sample
    assert picture.isfinite().all()
    assert picture.std() > 0


def test_an_unknown_autoencoder_is_refused_with_the_names():
    for refuse in (autoencoder_config, autoencoder_hub_id, build_autoencoder):
        with pytest.raises(UserError, match=r"no autoencoder 'vae': there are dc-ae-f32c32-in-1\.0, "):
            refuse("vae")
