"""The cost formulas against PyTorch's own counter and against counting parameters by hand."""

from __future__ import annotations

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import families
import toys
from latteflow.errors import UserError
from latteflow.evaluate.cost import (
    active_parameters,
    cost_of,
    cost_of_parts,
    decode_flops,
    prefill_flops,
    preset_figures,
    step_flops,
)
from latteflow.models.context import compute_context
from latteflow.models.presets import build_autoencoder, build_backbone, build_transformer, preset
from latteflow.models.transformer import LatteFlowTransformer


@pytest.mark.parametrize("num_groups", [1, 2, 4])
@pytest.mark.parametrize("patch_size", [1, 2])
def test_step_formula_is_what_the_counter_counts(num_groups, patch_size):
    # "probs" writes every product out; scaled_dot_product_attention has no formula on CPU in the counter.
    pipe = toys.toy_pipeline(num_groups, patch_size=patch_size, residual_attention="probs")
    context = pipe.encode_prompt(["a red square"])
    x_t = torch.randn(1, 4, 4, 4)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        pipe.transformer(x_t, torch.tensor([0.3]), context)
    tokens = (4 // patch_size) ** 2
    assert step_flops(pipe.transformer, tokens, int(context.mask.sum())) == counter.get_total_flops()


def test_prefill_formula_counts_every_matrix_product():
    pipe = toys.toy_pipeline()
    pipe.backbone.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        context = pipe.encode_prompt(["a red square"])
    assert prefill_flops(pipe.backbone, int(context.mask.sum())) == counter.get_total_flops()


def test_more_groups_mean_fewer_active_parameters():
    pipes = {k: toys.toy_pipeline(k) for k in (1, 2, 4)}
    active = {k: active_parameters(pipe.transformer) for k, pipe in pipes.items()}
    layers = {k: sum(p.numel() for p in pipe.transformer.layers.parameters()) for k, pipe in pipes.items()}
    around = sum(p.numel() for p in pipes[1].transformer.io.parameters())
    assert active[1] == layers[1] + around
    assert active[4] < active[2] < active[1]
    assert active[2] - around == layers[2] // 2


def test_cost_of_adds_up():
    pipe = toys.toy_pipeline()
    cost = cost_of(pipe, steps=8)
    assert cost.total_parameters == sum(
        p.numel() for part in ("backbone", "transformer", "vae") for p in getattr(pipe, part).parameters()
    )
    assert cost.frozen_parameters + cost.trainable_parameters == cost.total_parameters
    assert cost.flops_per_image == 8 * cost.flops_per_step + cost.flops_prefill + cost.flops_decode
    assert cost.flops_per_step == 2 * cost_of(pipe, steps=8, guided=False).flops_per_step
    assert cost.flops_decode > 0
    assert cost.weight_bytes == 4 * cost.total_parameters


def words(number=9):
    return torch.randint(90, 100, (1, number))


@pytest.mark.parametrize("variant", families.VARIANTS)
def test_step_formula_is_what_the_counter_counts_in_every_family(variant):
    # Heads wider than their share (Qwen3, Gemma3), norms of queries and keys, windows, one rotary axis or three.
    backbone, _ = families.shared_family(variant)
    replica = LatteFlowTransformer.from_backbone(backbone, num_groups=2, latent_channels=4, sample_size=4)
    context = compute_context(backbone, words(), torch.ones(1, 9, dtype=torch.int64))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        replica(torch.randn(1, 4, 4, 4), torch.tensor([0.7]), context)
    assert step_flops(replica, 16, 9) == counter.get_total_flops()


@pytest.mark.parametrize("variant", families.VARIANTS)
def test_prefill_formula_counts_every_matrix_product_in_every_family(variant):
    backbone = families.build(families.toy_config(variant))
    backbone.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        compute_context(backbone, words(), torch.ones(1, 9, dtype=torch.int64))
    assert prefill_flops(backbone, 9) == counter.get_total_flops()


def test_parts_of_the_meta_device_cost_what_live_ones_do():
    pipe = toys.toy_pipeline()
    cost = cost_of(pipe, steps=8)
    parts = [getattr(pipe, part).to("meta") for part in ("backbone", "transformer", "vae")]
    parts[0].tie_weights()  # moved there, tied weights are two
    assert cost_of_parts(*parts, prompt_tokens=cost.prompt_tokens, steps=8) == cost


def test_the_context_is_what_the_pipeline_keeps_of_the_prompt():
    pipe = toys.toy_pipeline()
    context = pipe.encode_prompt(["a red square"])
    assert cost_of(pipe, prompt="a red square").context_bytes == context.keys.nbytes + context.values.nbytes


def test_a_larger_picture_costs_its_tokens():
    pipe = toys.toy_pipeline()
    cost = cost_of_parts(pipe.backbone, pipe.transformer, pipe.vae, prompt_tokens=5, latent_side=8)
    assert cost.image_tokens == 64
    assert cost.flops_per_step == 2 * step_flops(pipe.transformer, 64, 5)
    assert cost.flops_decode == decode_flops(pipe.vae, 8)


@torch.no_grad()
def test_decoding_on_the_meta_device_counts_what_decoding_does():
    vae = toys.toy_vae()
    with FlopCounterMode(display=False) as counter:
        vae.decode(torch.randn(1, 4, 6, 6))
    assert decode_flops(vae, 6) == counter.get_total_flops()
    dc_ae = build_autoencoder("dc-ae-f32c32-in-1.0")
    assert decode_flops(dc_ae, 16) == pytest.approx(4 * decode_flops(dc_ae, 8))


def test_the_paper_s_arithmetic_comes_out():
    # One guided step of one picture is about 0.084 TFLOP, 40 of them 3.4 TFLOP, against four times that for Vanilla.
    known = preset("qwen2-vl-2b")
    backbone = build_backbone(known)
    experts, vanilla = (build_transformer(known, backbone, group_size=size) for size in (7, 28))
    assert 2 * step_flops(experts, 64, 20) == pytest.approx(0.084e12, rel=0.02)
    assert 40 * 2 * step_flops(experts, 64, 20) == pytest.approx(3.4e12, rel=0.01)
    assert step_flops(vanilla, 64, 20) == pytest.approx(4 * step_flops(experts, 64, 20), rel=0.01)


def test_a_preset_s_figures_are_those_of_its_parts():
    figures = preset_figures(preset("smolvlm-256m"), size=512, steps=20)
    assert json.loads(json.dumps(figures)) == figures
    assert figures["total_parameters"] == sum(figures["parameters"].values())
    assert figures["parameters"]["backbone"] == 256_484_928
    assert figures["frozen_parameters"] + figures["trainable_parameters"] == figures["total_parameters"]
    assert figures["active_parameters"] < figures["trainable_parameters"] / 4
    assert (figures["layers"], figures["groups"], figures["layers_per_step"]) == (30, 5, 6)
    assert (figures["picture_size_pixels"], figures["image_tokens"]) == (512, 256)
    assert figures["image_flops"] == 20 * figures["step_flops"] + figures["prefill_flops"] + figures["decode_flops"]
    assert figures["context_token_bytes"] == 2 * 30 * 3 * 64 * 2
    assert figures["inference_memory"]["weight_bytes"] > 2 * figures["total_parameters"]
    assert figures["lora_training_memory"]["peak_bytes"] < figures["full_training_memory"]["peak_bytes"]


@pytest.mark.parametrize("size", [0, -32, 100, 4128])
def test_a_size_that_cannot_be_drawn_is_refused(size):
    with pytest.raises(UserError, match=f"size {size} does not do: give a multiple of 32 up to 4096"):
        preset_figures(preset("smolvlm-256m"), size=size)
