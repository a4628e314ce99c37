"""The cost formulas against PyTorch's own counter and against counting parameters by hand."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import toys
from latteflow.evaluate.cost import active_parameters, cost_of, prefill_flops, step_flops


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
