"""A replica layer: its copied parts are the backbone layer's, its additions stand around them as in the paper."""

import pytest
import torch
from torch.nn import functional

from latteflow.models.backbones import family_of
from latteflow.nn.rotary import axes_of_frequencies, rotary_cos_sin
from toys import seeded, toy_transformer

MODES = ["none", "logits", "probs"]
TOKENS = 9
EPS = 1e-5  # Qwen2-VL's


def text_input(backbone):
    """Hidden states of a text, its rotary angles in both libraries' forms, and the causal mask."""
    hidden = torch.randn(2, TOKENS, 32, generator=seeded())
    positions = torch.arange(TOKENS).expand(3, 2, TOKENS)
    theirs = backbone.model.language_model.rotary_emb(hidden, positions)
    ours = rotary_cos_sin(positions, head_dim=16, theta=1e4, axes=axes_of_frequencies((2, 3, 3), interleaved=False))
    causal = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()[None, None]
    return hidden, theirs, ours, causal


@pytest.mark.parametrize("mode", MODES)
def test_copied_attention_returns_what_the_backbones_layer_returns(backbone, mode):
    hidden, theirs, ours, causal = text_input(backbone)
    replica = toy_transformer(backbone, 4, shaken=False, residual_attention=mode)
    for layer, copied in zip(family_of(backbone.config).text_model(backbone).layers, replica.layers, strict=True):
        normed = layer.input_layernorm(hidden)
        expected, _ = layer.self_attn(normed, attention_mask=causal, position_embeddings=theirs)
        found, _ = copied.self_attn(copied.input_layernorm(hidden), rotary=ours, mask=causal)
        if mode == "probs":  # softmax written out rounds differently from the fused kernel
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        else:
            assert torch.equal(found, expected)


def test_copied_feed_forward_returns_what_the_backbones_layer_returns(backbone):
    hidden, *_ = text_input(backbone)
    replica = toy_transformer(backbone, shaken=False)
    for layer, copied in zip(family_of(backbone.config).text_model(backbone).layers, replica.layers, strict=True):
        expected = layer.mlp(layer.post_attention_layernorm(hidden))
        assert torch.equal(copied.mlp(copied.post_attention_layernorm(hidden)), expected)


def test_different_layers_were_copied_from_different_layers(backbone):
    weights = [layer.self_attn.q_proj.weight for layer in family_of(backbone.config).text_model(backbone).layers]
    assert not torch.equal(weights[0], weights[1])  # otherwise the tests above could pass with any order


def test_a_fresh_layer_adds_normalised_branches_at_the_initial_scale_at_every_time(backbone):
    replica = toy_transformer(backbone, 1, shaken=False, initial_scale=0.25)
    layer = replica.layers[0]
    hidden, _, ours, _ = text_input(backbone)
    outputs = [layer(hidden, time, rotary=ours, context=None)[0] for time in (torch.zeros(2, 16), torch.randn(2, 16))]
    assert torch.equal(outputs[0], outputs[1])

    attended, _ = layer.self_attn(layer.input_layernorm(hidden), rotary=ours)
    x = hidden + 0.25 * functional.rms_norm(attended, (32,), eps=EPS)
    x = x + 0.25 * functional.rms_norm(layer.mlp(layer.post_attention_layernorm(x)), (32,), eps=EPS)
    torch.testing.assert_close(outputs[0], x, rtol=1e-5, atol=1e-6)


def test_a_layer_is_the_papers_figure_written_out(backbone):
    """RMS, attention, RMS, scale(t), residual; RMS, scale and shift(t), feed-forward, RMS, scale(t), residual."""
    layer = toy_transformer(backbone, 1).layers[0]
    hidden, _, ours, _ = text_input(backbone)
    time = torch.randn(2, 16, generator=seeded(5))
    a, shift, scale, b = layer.modulation(functional.silu(time))[:, None].chunk(4, dim=-1)

    def rms(x, norm):
        return norm.weight * x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt()

    attended, _ = layer.self_attn(rms(hidden, layer.input_layernorm), rotary=ours)
    x = hidden + a * rms(attended, layer.attention_out_norm)
    fed = layer.mlp(rms(x, layer.post_attention_layernorm) * (1 + scale) + shift)
    expected = x + b * rms(fed, layer.mlp_out_norm)
    torch.testing.assert_close(layer(hidden, time, rotary=ours, context=None)[0], expected, rtol=1e-5, atol=1e-5)
    other = layer(hidden, time + 1, rotary=ours, context=None)[0]
    assert not torch.allclose(other, expected, atol=1e-2)


@pytest.mark.parametrize(("mode", "groups"), [("probs", 2), ("logits", 2), ("probs", 4), ("none", 2)])
def test_only_layers_with_a_predecessor_in_their_group_have_a_gate(backbone, mode, groups):
    replica = toy_transformer(backbone, groups, residual_attention=mode)
    size = 4 // groups
    gated = [layer.gate is not None for layer in replica.layers]
    assert gated == [mode != "none" and number % size != 0 for number in range(4)]


def test_all_norms_have_the_backbones_eps(backbone):
    layer = toy_transformer(backbone, 1).layers[0]
    norms = (layer.input_layernorm, layer.attention_out_norm, layer.post_attention_layernorm, layer.mlp_out_norm)
    assert (
        {norm.eps for norm in norms}
        == {family_of(backbone.config).text_model(backbone).layers[0].input_layernorm.variance_epsilon}
        == {EPS}
    )
