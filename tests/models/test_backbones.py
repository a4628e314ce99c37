"""Every family: the replica's layers are transformers' own layers, turned by transformers' own angles."""

import pytest
import torch
from torch import nn

from families import VARIANTS, build, shared_family, toy_config, toy_picture
from latteflow.models.backbones import family_of
from latteflow.models.context import compute_context
from latteflow.nn.rotary import axes_of_frequencies, rotary_cos_sin
from toys import seeded, toy_transformer

TOKENS = 9
MULTIMODAL = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


def layers_of(backbone):
    return family_of(backbone.config).text_model(backbone).layers


def word_positions(backbone, tokens=TOKENS):
    """Positions of a text as the backbone's rotary module takes them."""
    positions = torch.arange(tokens).expand(2, tokens)
    return positions.expand(3, 2, tokens) if backbone.config.model_type in MULTIMODAL else positions


def their_angles(backbone, positions, number):
    """Cosine and sine by the backbone's own rotary module, for its layer ``number``."""
    text = family_of(backbone.config).text_model(backbone)
    kind = {"layer_type": text.config.layer_types[number]} if backbone.config.model_type == "gemma3" else {}
    return text.rotary_emb(torch.zeros(1), positions, **kind)


def our_angles(replica, positions, number):
    """The same by the replica's configuration."""
    config = replica.config
    local = number in config.local_layers
    return rotary_cos_sin(
        positions if positions.ndim == 3 else positions[None],
        head_dim=config.head_dim,
        theta=config.local_rope_theta if local else config.rope_theta,
        axes=axes_of_frequencies(config.mrope_section, interleaved=config.mrope_interleaved),
        factor=1.0 if local else config.rope_factor,
    )


def hidden_states(backbone):
    return torch.randn(2, TOKENS, backbone.config.get_text_config().hidden_size, generator=seeded())


def causal(tokens=TOKENS):
    return torch.ones(tokens, tokens, dtype=torch.bool).tril()[None, None]


def neutral(replica):
    """The replica without what the paper adds: scales 1, no shift, output norms only where the backbone has them."""
    for layer in replica.layers:
        layer.modulation.bias.data.zero_()
        attention_scale, _, _, mlp_scale = layer.modulation.bias.data.chunk(4)
        attention_scale.fill_(1)
        mlp_scale.fill_(1)
        if replica.config.activation != "gelu_tanh":
            layer.attention_out_norm = layer.mlp_out_norm = nn.Identity()
    return replica


@pytest.mark.parametrize("variant", VARIANTS)
def test_turns_words_by_the_backbones_angles_bit_for_bit(variant):
    backbone, _ = shared_family(variant)
    replica = toy_transformer(backbone, shaken=False)
    positions = word_positions(backbone, 300)
    for number in range(len(layers_of(backbone))):
        for mine, theirs in zip(
            our_angles(replica, positions, number), their_angles(backbone, positions, number), strict=True
        ):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_linear_stretch_of_positions_is_the_backbones(variant):
    config = toy_config(variant)
    rope = config.get_text_config().rope_parameters
    rope.get("full_attention", rope).update(rope_type="linear", factor=3.0)
    backbone = build(config)
    replica = toy_transformer(backbone, shaken=False)
    assert replica.config.rope_factor == 3.0
    positions = word_positions(backbone, 300)
    for number in range(4):
        (cos, sin), theirs = our_angles(replica, positions, number), their_angles(backbone, positions, number)
        assert torch.equal(cos, theirs[0])
        assert torch.equal(sin, theirs[1])


AS_ON_THE_HUB = {
    "qwen2_vl": {"rope_theta": 7e5, "rope_scaling": {"type": "mrope", "mrope_section": [2, 2, 2]}},
    "qwen2_5_vl": {"rope_theta": 7e5, "rope_scaling": {"type": "mrope", "mrope_section": [2, 2, 2]}},
    "qwen3_vl": {
        "rope_theta": 7e5,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [4, 2, 2], "rope_type": "default"},
    },
    "idefics3": {"rope_theta": 7e5, "rope_scaling": None},
    "smolvlm": {"rope_theta": 7e5, "rope_scaling": None},
    "internvl": {"rope_theta": 7e5, "rope_scaling": {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"}},
    "llava_onevision": {"rope_theta": 7e5, "rope_scaling": None},
    "gemma3": {
        "rope_theta": 7e5,
        "rope_local_base_freq": 3e4,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "layer_types": None,
        "sliding_window_pattern": 2,
    },
}


@pytest.mark.parametrize("variant", AS_ON_THE_HUB)
def test_reads_rotary_settings_as_older_configurations_write_them(variant):
    backbone = build(toy_config(variant, rope_parameters=None, **AS_ON_THE_HUB[variant]))
    replica = toy_transformer(backbone, shaken=False)
    assert replica.config.rope_theta == 7e5
    if variant == "gemma3":
        assert (list(replica.config.local_layers), replica.config.local_rope_theta) == ([0, 2], 3e4)
        assert replica.config.rope_factor == 8.0
    positions = word_positions(backbone, 300)
    for number in range(4):
        (cos, sin), theirs = our_angles(replica, positions, number), their_angles(backbone, positions, number)
        assert torch.equal(cos, theirs[0])
        assert torch.equal(sin, theirs[1])


@pytest.mark.parametrize("settings", [{}, {"mrope_interleaved": True}, {"mrope_interleaved": False}], ids=str)
@pytest.mark.parametrize("variant", MULTIMODAL)
def test_sections_that_a_configuration_leaves_out_are_transformers_own(variant, settings):
    config = toy_config(variant, hidden_size=256, num_attention_heads=2, num_hidden_layers=2, head_dim=128)
    config.vision_config.out_hidden_size = config.vision_config.hidden_size = 256
    config.get_text_config().rope_parameters = {"rope_type": "default", "rope_theta": 5e4, **settings}
    backbone = build(config)
    replica = toy_transformer(backbone, shaken=False)
    assert replica.config.head_dim == 128
    positions = torch.randint(300, (3, 2, TOKENS), generator=seeded())
    for mine, theirs in zip(our_angles(replica, positions, 0), their_angles(backbone, positions, 0), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("variant", MULTIMODAL)
def test_turns_by_three_axes_as_the_backbone_does(variant):
    backbone, _ = shared_family(variant)
    replica = toy_transformer(backbone, shaken=False)
    positions = torch.randint(300, (3, 2, TOKENS), generator=seeded())
    for mine, theirs in zip(our_angles(replica, positions, 0), their_angles(backbone, positions, 0), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("variant", VARIANTS)
def test_turns_latents_by_the_angles_of_tokens_that_follow_the_prompt(variant):
    """What each layer is given at a call, beside the backbone's module for that layer."""
    backbone, processor = shared_family(variant)
    replica = toy_transformer(backbone, 1)
    inputs = processor(["a red circle", "no"], padding_side="right")
    context = compute_context(backbone, inputs["input_ids"], inputs["attention_mask"])
    found = []
    for layer in replica.layers:
        layer.register_forward_pre_hook(lambda _, args, kwargs: found.append(kwargs["rotary"]), with_kwargs=True)
    replica(torch.randn(2, 4, 2, 3), torch.tensor([0.5, 0.5]), context)

    first = context.next_position[:, None]
    positions = first + torch.arange(6)
    if variant in MULTIMODAL:
        positions = torch.stack([first.expand(2, 6), first + torch.arange(6) // 3, first + torch.arange(6) % 3])
    for number, angles in enumerate(found):
        theirs = their_angles(backbone, positions, number)
        assert torch.equal(angles[0], theirs[0])
        assert torch.equal(angles[1], theirs[1])
    assert len(found) == len(layers_of(backbone))
    assert context.next_position[0] != context.next_position[1]


@pytest.mark.parametrize("mode", ["none", "logits", "probs"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_copied_attention_returns_what_the_backbones_layer_returns(variant, mode):
    backbone, _ = shared_family(variant)
    replica = toy_transformer(backbone, 4, shaken=False, residual_attention=mode)
    hidden, positions = hidden_states(backbone), word_positions(backbone)
    for number, (layer, copied) in enumerate(zip(layers_of(backbone), replica.layers, strict=True)):
        angles = their_angles(backbone, positions, number)
        normed = layer.input_layernorm(hidden)
        expected, _ = layer.self_attn(normed, attention_mask=causal(), position_embeddings=angles)
        ours = our_angles(replica, positions, number)
        assert torch.equal(copied.input_layernorm(hidden), normed)
        found, _ = copied.self_attn(copied.input_layernorm(hidden), rotary=ours, mask=causal())
        assert expected.abs().max() > 1e-2  # so that the tolerance says something
        # Softmax written out, and Gemma's scale inside the norm of the queries, round differently.
        if mode == "probs" or variant == "gemma3":
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        else:
            assert torch.equal(found, expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_copied_feed_forward_returns_what_the_backbones_layer_returns(variant):
    backbone, _ = shared_family(variant)
    replica, hidden = toy_transformer(backbone, shaken=False), hidden_states(backbone)
    for layer, copied in zip(layers_of(backbone), replica.layers, strict=True):
        norm = layer.pre_feedforward_layernorm if variant == "gemma3" else layer.post_attention_layernorm
        expected = layer.mlp(norm(hidden))
        assert torch.equal(copied.mlp(copied.post_attention_layernorm(hidden)), expected)
        if variant == "gemma3":
            assert torch.equal(copied.mlp_out_norm(expected), layer.post_feedforward_layernorm(expected))
            assert torch.equal(copied.attention_out_norm(hidden), layer.post_attention_layernorm(hidden))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_layer_without_the_papers_additions_is_the_backbones_layer(variant):
    backbone, _ = shared_family(variant)
    replica = neutral(toy_transformer(backbone, shaken=False, residual_attention="none"))
    hidden, positions = hidden_states(backbone), word_positions(backbone)
    for number, (layer, copied) in enumerate(zip(layers_of(backbone), replica.layers, strict=True)):
        expected = layer(hidden, attention_mask=causal(), position_embeddings=their_angles(backbone, positions, number))
        found, _ = copied(
            hidden, torch.randn(2, 16), rotary=our_angles(replica, positions, number), context=None, mask=causal()
        )
        assert (expected - hidden).abs().max() > 0.1
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 if variant != "gemma3" else 1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_two_layers_of_the_toy_are_alike(variant):
    backbone, _ = shared_family(variant)
    first, second, *_ = layers_of(backbone)
    for (name, one), other in zip(first.named_parameters(), second.parameters(), strict=True):
        assert not torch.equal(one, other), name  # otherwise the tests above could pass with any order
        assert (one - one.flatten()[0]).abs().max() > 0, name


@pytest.mark.parametrize("pictures", [0, 1])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_replicas_layers_read_on_as_the_backbone_does(variant, pictures):
    """All layers, the context, its positions and its mask at once: words read by the replica, behind the context."""
    backbone, processor = shared_family(variant)
    replica = neutral(toy_transformer(backbone, 1, shaken=False, residual_attention="none"))
    prompt = processor.chat_prompt("a red circle", pictures=pictures)
    inputs = dict(processor(prompt, [toy_picture(60, 30)] * pictures, padding_side="right"))
    ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask")
    more = processor("the green square")["input_ids"]
    context = compute_context(backbone, ids, mask, **(inputs if pictures else {}))

    whole = torch.cat([ids, more], dim=1)
    name = family_of(backbone.config).token_types
    if name is not None:
        inputs[name] = torch.cat([inputs[name], torch.zeros_like(more)], dim=1)
    expected = backbone(
        input_ids=whole, attention_mask=torch.ones_like(whole), output_hidden_states=True, **inputs
    ).hidden_states  # the last is after the final norm
    length, tokens = ids.shape[1], more.shape[1]
    x = expected[0][:, length:]
    positions = context.next_position[:, None] + torch.arange(tokens)
    visible = torch.cat([torch.ones(tokens, length, dtype=torch.bool), causal(tokens)[0, 0]], dim=1)[None, None]
    for number, layer in enumerate(replica.layers):
        angles = our_angles(replica, positions.expand(3, 1, tokens) if variant in MULTIMODAL else positions, number)
        x, _ = layer(x, torch.zeros(1, 16), rotary=angles, context=context.layer(number), mask=visible)
        if number + 1 < len(replica.layers):
            torch.testing.assert_close(x, expected[number + 1][:, length:], rtol=0, atol=2e-5)
    norm = family_of(backbone.config).text_model(backbone).norm
    torch.testing.assert_close(norm(x), expected[-1][:, length:], rtol=0, atol=2e-5)
