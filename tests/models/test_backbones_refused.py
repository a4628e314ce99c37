"""Backbones whose layers a replica cannot be are refused, and the refusal says what it is."""

import pytest
import torch
import transformers
from torch import nn

from families import MODEL_TYPES, build, toy_config, toy_family
from latteflow.errors import UserError
from latteflow.models.backbones import FAMILIES, family_named, family_of
from latteflow.models.transformer import LatteFlowTransformer

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "pad_token_id": 0,
}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
DEEP = {"hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 40, "depth": 2, "num_heads": 2, "patch_size": 8}
DEEP |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}


def replica_of(config):
    with torch.device("meta"):
        backbone = transformers.AutoModelForImageTextToText.from_config(config)
    return LatteFlowTransformer.from_backbone(backbone, num_groups=2, latent_channels=4)


def moe():
    text = {**SIZES, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    rope = {**ROPE, "mrope_section": [4, 2, 2]}
    return transformers.Qwen3VLMoeConfig(text_config={**text, "rope_parameters": rope}, vision_config=DEEP)


def cross_attention():
    text = {**SIZES, "cross_attention_layers": [1, 3], "rope_parameters": ROPE}
    vision = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "num_global_layers": 1}
    vision |= {"attention_heads": 2, "image_size": 32, "patch_size": 8, "vision_output_dim": 64, "max_num_tiles": 1}
    vision |= {"supported_aspect_ratios": [[1, 1]], "intermediate_layers_indices": [0]}
    return transformers.MllamaConfig(text_config=text, vision_config=vision)


def linear_attention():
    layers = ["linear_attention"] * 3 + ["full_attention"]
    rope = {**ROPE, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.25}
    text = {**SIZES, "layer_types": layers, "rope_parameters": rope}
    vision = {k: v for k, v in DEEP.items() if k != "deepstack_visual_indexes"}
    return transformers.Qwen3_5Config(text_config=text, vision_config=vision)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (moe, "'qwen3_vl_moe' is not supported, as its text layers hold a mixture of experts"),
        (cross_attention, "'mllama' is not supported, as its text layers hold cross-attention"),
        (linear_attention, "'qwen3_5' is not supported, as its text layers hold linear attention"),
    ],
)
def test_another_model_is_refused_for_what_its_layers_hold(config, reason):
    with pytest.raises(UserError, match=rf"{reason}: qwen2_vl, .* are \(docs/backbones.md\)"):
        replica_of(config())


def test_another_model_of_ordinary_layers_is_refused_by_its_name():
    config = transformers.LlavaConfig(text_config={"model_type": "llama", **SIZES, "rope_parameters": ROPE})
    with pytest.raises(UserError, match=r"a backbone of type 'llava' is not supported: qwen2_vl, .* are"):
        family_of(config)


def test_text_layers_that_were_not_checked_are_refused():
    config = toy_config("internvl", model_type="mistral", sliding_window=None)
    with pytest.raises(
        UserError, match="a internvl backbone with 'mistral' text layers is not supported: qwen2, qwen3"
    ):
        replica_of(config)
    experts = {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    with pytest.raises(UserError, match=r"'qwen3_moe' text layers is not supported, .* a mixture of experts: qwen2"):
        replica_of(toy_config("internvl", **experts))


@pytest.mark.parametrize("variant", ["internvl", "internvl/qwen3", "llava_onevision", "qwen2_vl", "qwen2_5_vl"])
def test_a_sliding_window_where_the_family_has_none_is_refused(variant):
    config = toy_config(variant, use_sliding_window=True, sliding_window=16, max_window_layers=2)
    with pytest.raises(UserError, match="within a sliding window are not supported"):
        replica_of(config)


@pytest.mark.parametrize("kind", ["yarn", "llama3", "longrope"])
@pytest.mark.parametrize("variant", MODEL_TYPES)
def test_an_unknown_stretch_of_positions_is_refused(variant, kind):
    more = {"factor": 4.0, "original_max_position_embeddings": 256, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope = {**ROPE, **more, "rope_type": kind, "long_factor": [1.0] * 6, "short_factor": [1.0] * 6}
    if variant == "gemma3":
        rope = {"sliding_attention": ROPE, "full_attention": rope}
    elif "qwen" in variant:
        rope["mrope_section"] = [4, 2, 2] if variant == "qwen3_vl" else [2, 2, 2]
    config = toy_config(variant)
    backbone = build(config)
    config.get_text_config().rope_parameters = rope
    with pytest.raises(UserError, match=f"rotary positions of type '{kind}' are not supported: default, mrope, linear"):
        LatteFlowTransformer.from_backbone(backbone, num_groups=2, latent_channels=4)


@pytest.mark.parametrize("variant", MODEL_TYPES)
def test_heads_that_turn_in_part_are_refused(variant):
    backbone, _ = toy_family(variant)
    rope = backbone.config.get_text_config().rope_parameters
    rope.get("sliding_attention", rope)["partial_rotary_factor"] = 0.5
    with pytest.raises(UserError, match="partial_rotary_factor"):
        LatteFlowTransformer.from_backbone(backbone, num_groups=2, latent_channels=4)


@pytest.mark.parametrize(
    ("variant", "text", "reason"),
    [
        ("idefics3", {"mlp_bias": True}, "'mlp' of the backbone's layers is not supported: .*gate_proj.bias"),
        ("smolvlm", {"attention_bias": True}, "'self_attn' of the backbone's layers .*o_proj.bias"),
        ("gemma3", {"attention_bias": True}, "'self_attn' of the backbone's layers .*o_proj.bias"),
        ("qwen3_vl", {"attention_bias": True}, "'self_attn' of the backbone's layers .*o_proj.bias"),
        ("qwen2_vl", {"hidden_act": "relu"}, "activation 'relu' of the backbone's feed-forward is not supported"),
        ("gemma3", {"hidden_activation": "gelu"}, "activation 'gelu' of the backbone's feed-forward"),
    ],
)
def test_weights_and_functions_that_a_replica_lacks_are_refused(variant, text, reason):
    backbone = build(toy_config(variant, **text))
    with pytest.raises(UserError, match=reason):
        LatteFlowTransformer.from_backbone(backbone, num_groups=2, latent_channels=4)


@pytest.mark.parametrize(
    ("name", "value"), [("vision_aspect_ratio", "anyres_max_4"), ("vision_feature_select_strategy", "default")]
)
def test_a_count_of_tokens_that_was_not_checked_is_refused(name, value):
    config = toy_config("llava_onevision")
    setattr(config, name, value)
    with pytest.raises(UserError, match=f"{name} '{value}' is not supported"):
        family_of(config).tokens_per_tile(config)


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ("cross_attn", "layer 2 of the backbone is a cross-attention layer: not supported"),
        ("linear_attn", "layer 2 of the backbone is a linear attention layer"),
        ("mamba", "layer 2 of the backbone is a state-space layer"),
        ("block_sparse_moe", "layer 2 of the backbone is a mixture-of-experts layer"),
        ("adapter", "layer 2 of the backbone is a part 'adapter' that the replica has no counterpart of"),
    ],
)
@pytest.mark.parametrize("variant", MODEL_TYPES)
def test_a_layer_with_one_part_more_is_refused(variant, part, reason):
    """Whatever a configuration says: the layers themselves are looked at."""
    backbone, _ = toy_family(variant)
    setattr(family_of(backbone.config).text_model(backbone).layers[2], part, nn.Linear(2, 2))
    with pytest.raises(UserError, match=reason):
        LatteFlowTransformer.from_backbone(backbone, num_groups=2, latent_channels=4)


@pytest.mark.parametrize("variant", MODEL_TYPES)
def test_a_layer_with_one_part_less_or_with_experts_is_refused(variant):
    backbone, _ = toy_family(variant)
    layers = family_of(backbone.config).text_model(backbone).layers
    layers[1].mlp.experts = nn.ModuleList()
    with pytest.raises(UserError, match="layer 1 of the backbone is a mixture-of-experts layer"):
        LatteFlowTransformer.from_backbone(backbone, num_groups=2, latent_channels=4)
    del layers[1].mlp.experts, layers[0].post_attention_layernorm
    with pytest.raises(UserError, match="layer 0 of the backbone has no 'post_attention_layernorm'"):
        LatteFlowTransformer.from_backbone(backbone, num_groups=2, latent_channels=4)


def test_every_model_type_has_one_family_and_one_toy():
    types = [name for family in FAMILIES for name in family.model_types]
    assert sorted(types) == sorted(MODEL_TYPES)
    for name in types:
        assert name in family_named(name).model_types
