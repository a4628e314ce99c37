"""The memory formulas against what autograd keeps and what lives while a toy of each family works."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig

import families
import toys
from latteflow.evaluate import memory
from latteflow.evaluate.memory import (
    activation_bytes,
    context_token_bytes,
    decoder_bytes,
    inference_memory,
    lora_parameters,
    step_bytes,
    training_memory,
    weight_bytes,
)
from latteflow.models.context import Context, compute_context
from latteflow.models.presets import build_autoencoder, build_backbone, build_transformer, preset
from latteflow.models.transformer import LatteFlowTransformer

SIDE, WORDS, BATCH = 8, 20, 2
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FAMILIES = ("qwen2_vl", "qwen3_vl", "idefics3", "gemma3")


def replica_of(variant, dtype=torch.float32, **settings):
    """A family's toy replica, every weight away from its start."""
    backbone, _ = families.shared_family(variant)
    settings = {"num_groups": 1, "latent_channels": 4, "sample_size": SIDE, **settings}
    replica = LatteFlowTransformer.from_backbone(backbone, **settings)
    toys.shake(replica, toys.seeded(2))
    return torch.nn.Module.to(replica, dtype)


def context_of(replica, number=BATCH):
    config = replica.config
    shape = (number, config.num_layers, config.num_key_value_heads, WORDS, config.head_dim)
    keys = torch.randn(2, *shape, dtype=replica.dtype)
    mask = torch.ones(number, WORDS, dtype=torch.bool)
    return Context(keys[0], keys[1], mask, torch.full((number,), WORDS))


def kept_for_backward(replica):
    """Bytes that autograd keeps beside weights and context: of activations, and of autocast's copies of matrices."""
    context = context_of(replica)
    theirs = {tensor.untyped_storage().data_ptr() for tensor in (context.keys, context.values, *replica.parameters())}
    matrices = {tuple(sorted(p.shape)) for p in replica.parameters() if p.ndim == 2 and p.requires_grad}
    kept = {}

    def keep(tensor):
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    x_t, t = torch.randn(BATCH, 4, SIDE, SIDE), torch.full((BATCH,), 0.3)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        replica(x_t, t, context).float().square().mean().backward()
    ours = [tensor for place, tensor in kept.items() if place not in theirs]
    sizes = {
        copy: sum(
            tensor.untyped_storage().nbytes()
            for tensor in ours
            if (tuple(sorted(tensor.shape)) in matrices and tensor.dtype == torch.bfloat16) is copy
        )
        for copy in (True, False)
    }
    return sizes[False], sizes[True]


def matrices_of(replica):
    """Numbers in the matrices that autocast keeps a copy of: those whose input has a gradient."""
    first = ("time_embedding.inner", "patch_embedding")
    return sum(p.numel() for name, p in replica.named_parameters() if p.ndim > 1 and not any(f in name for f in first))


@pytest.mark.parametrize("mode", ["probs", "none"])
@pytest.mark.parametrize("variant", FAMILIES)
def test_saved_activations_are_what_autograd_keeps(variant, mode):
    replica = replica_of(variant, residual_attention=mode)
    kept, copies = kept_for_backward(replica)
    assert kept == pytest.approx(BATCH * activation_bytes(replica, SIDE**2, WORDS), rel=0.02)
    assert copies == pytest.approx(2 * matrices_of(replica), rel=0.02)


@pytest.mark.parametrize("mode", ["probs", "none"])
@pytest.mark.parametrize("variant", FAMILIES)
def test_saved_activations_under_lora_are_what_autograd_keeps(variant, mode):
    replica = replica_of(variant, torch.bfloat16, residual_attention=mode)
    expected, numbers = activation_bytes(replica, SIDE**2, WORDS, lora_rank=8), lora_parameters(replica, 8)
    replica.requires_grad_(False)
    replica.add_adapter(LoraConfig(r=8, target_modules=TARGETS, init_lora_weights=False))
    assert sum(p.numel() for p in replica.parameters() if p.requires_grad) == numbers
    kept, copies = kept_for_backward(replica)
    assert kept + copies == pytest.approx(BATCH * expected, rel=0.03)


def test_logits_keep_about_what_probs_do():
    kept, _ = kept_for_backward(replica_of("qwen2_vl", residual_attention="logits"))
    assert kept == pytest.approx(BATCH * activation_bytes(replica_of("qwen2_vl"), SIDE**2, WORDS), rel=0.25)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("variant", "mode", "within"),
    [*((variant, "probs", 0.06) for variant in FAMILIES), ("qwen2_vl", "none", 0.16)],
)
@torch.no_grad()
def test_a_step_holds_what_the_formula_says(variant, mode, within, dtype):
    replica = replica_of(variant, dtype, residual_attention=mode)
    context, x_t, t = context_of(replica), torch.randn(BATCH, 4, SIDE, SIDE, dtype=dtype), torch.full((BATCH,), 0.3)
    with memory._LiveBytes() as live:
        replica(x_t, t, context)
    assert live.peak == pytest.approx(step_bytes(replica, SIDE**2, WORDS, sequences=BATCH), rel=within)


def test_live_bytes_follow_what_is_made_and_let_go():
    before = torch.zeros(1000)
    with memory._LiveBytes() as live:
        view = before[:10]
        assert live.now == 0  # what was there before is not ours, nor is a view of it
        one = view + 1  # 40 bytes
        two = torch.zeros(100)  # 400
        same = two.view(10, 10)
        assert live.now == 440
        del two
        assert live.now == 440
        del same
        assert live.now == 40
        one.add_(1)
        assert live.now == 40
    assert live.peak == 440


def test_a_convolution_holds_its_input_and_output_twice():
    picture, kernel = torch.zeros(1, 2, 8, 8), torch.zeros(3, 2, 3, 3)
    with memory._LiveBytes() as live:
        torch.conv2d(picture, kernel, padding=1)
    output = 3 * 64 * 4
    assert live.now == 0
    assert live.peak == output + picture.nbytes + output


def test_the_decoder_s_peak_goes_with_the_pixels_and_the_dtype():
    vae = build_autoencoder("dc-ae-f32c32-sana-1.0")
    peaks = {side: decoder_bytes(vae, side) for side in (8, 16)}
    assert peaks[16] == pytest.approx(4 * peaks[8], rel=1e-3)
    assert decoder_bytes(vae, 8, images=3) == pytest.approx(3 * peaks[8], rel=1e-3)
    wide = build_autoencoder("dc-ae-f32c32-sana-1.0", torch.float32)
    assert decoder_bytes(wide, 8) == 2 * peaks[8]
    # 128 channels at 256x256, six and a half times: the last stage's first convolution, its input and output twice.
    assert peaks[8] == pytest.approx(6.5 * 128 * 256 * 256 * 2, rel=0.01)


@torch.no_grad()
def test_the_decoder_s_peak_is_that_of_a_live_one():
    vae = toys.toy_vae()
    latents = torch.zeros(1, 4, 4, 4)
    with memory._LiveBytes() as live:
        vae.decode(latents)
    assert decoder_bytes(vae, 4) == pytest.approx(live.peak, rel=0.01)


@pytest.mark.parametrize("variant", families.VARIANTS)
def test_a_token_of_the_context_is_what_the_cache_holds_of_it(variant):
    backbone, _ = families.shared_family(variant)
    ids = torch.randint(90, 100, (3, 7))
    context = compute_context(backbone, ids, torch.ones_like(ids))
    replica = replica_of(variant)
    assert 21 * context_token_bytes(replica, backbone.dtype) == context.keys.nbytes + context.values.nbytes


def test_weights_count_in_their_own_dtype_and_tied_ones_once():
    backbone = build_backbone(preset("qwen2-vl-2b"))
    numbers = preset("qwen2-vl-2b").backbone_parameters
    assert 2 * numbers < weight_bytes(backbone) < 2 * numbers + 10_000  # and the angles, in float32
    assert weight_bytes(build_autoencoder("dc-ae-f32c32-sana-1.0", torch.float32)) == 4 * 312_250_275


@pytest.fixture(scope="module")
def parts():
    known = preset("smolvlm-256m")
    backbone = build_backbone(known)
    return backbone, build_transformer(known, backbone), build_autoencoder(known.autoencoder)


def test_drawing_needs_weights_context_and_the_most_demanding_moment(parts):
    need = inference_memory(*parts, prompt_tokens=32)
    assert need.weight_bytes == sum(weight_bytes(part) for part in parts)
    assert need.context_bytes == 2 * 2 * 32 * 2 * 30 * 3 * 64 * 2
    assert need.peak_bytes == need.weight_bytes + need.context_bytes + need.decoder_bytes
    # SmolVLM: 49280 words, width 576, inside 1536
    assert need.prefill_bytes == 32 * (2 * 576 + 3 * 1536) * 2 + 49280 * (2 + 4) + 49280 * 576 * 2
    alone = inference_memory(*parts, prompt_tokens=32, guided=False)
    assert (2 * alone.context_bytes, 2 * alone.step_bytes) == (need.context_bytes, need.step_bytes)
    assert inference_memory(*parts, prompt_tokens=32, images=4).step_bytes == 4 * need.step_bytes
    assert inference_memory(*parts, prompt_tokens=32, latent_side=16).decoder_bytes > 3.9 * need.decoder_bytes


def test_training_everything_keeps_sixteen_bytes_a_weight_and_four_of_gradients(parts):
    numbers = sum(p.numel() for p in parts[1].parameters())
    need = training_memory(*parts, prompt_tokens=32, batch_size=1)
    assert need.trainable_parameters == numbers
    assert need.weight_bytes + need.optimizer_bytes + need.average_bytes == 16 * numbers
    assert need.gradient_bytes == 4 * numbers
    assert need.frozen_bytes == weight_bytes(parts[0]) + weight_bytes(parts[2])
    stays = need.frozen_bytes + 16 * numbers + need.context_bytes
    assert need.peak_bytes == stays + need.gradient_bytes + need.update_bytes  # one sample keeps less than that
    many = training_memory(*parts, prompt_tokens=32, batch_size=64)
    assert many.activation_bytes == 64 * need.activation_sample_bytes
    stays += many.context_bytes - need.context_bytes
    assert many.peak_bytes == stays + many.activation_bytes + many.autocast_bytes


def test_lora_trains_the_adapters_and_keeps_the_rest_once(parts):
    replica = parts[1]
    full = training_memory(*parts, prompt_tokens=32, batch_size=8)
    lora = training_memory(*parts, prompt_tokens=32, batch_size=8, lora_rank=16)
    # SmolVLM: width 576, inside 1536, keys and values 192
    assert lora_parameters(replica, 16) == 30 * 16 * (4 * 576 + 2 * (576 + 192) + 3 * (576 + 1536))
    assert lora.trainable_parameters == lora_parameters(replica, 16)
    assert lora.weight_bytes == weight_bytes(replica) + 4 * lora.trainable_parameters
    assert lora.activation_sample_bytes < full.activation_sample_bytes
    assert lora.peak_bytes < full.peak_bytes / 2


def test_terms_are_json_whose_names_say_their_unit(parts):
    needs = (
        inference_memory(*parts, prompt_tokens=32),
        training_memory(*parts, prompt_tokens=32, batch_size=1, lora_rank=4),
    )
    for need in needs:
        terms = need.as_dict()
        assert json.loads(json.dumps(terms)) == terms
        assert next(iter(terms)) == "peak_bytes"
        assert all(name.endswith(("_bytes", "_parameters")) for name in terms)
