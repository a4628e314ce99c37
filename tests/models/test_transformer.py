"""The replica: who runs, who learns, what latents see, and what a saved one remembers."""

import json

import pytest
import torch
from torch import nn

import latteflow
from latteflow.errors import UserError
from latteflow.models.context import compute_context, concatenate
from latteflow.models.transformer import LatteFlowTransformer
from toys import seeded, shake, toy_backbone, toy_transformer

LAYERS = 4
DIVISORS = [1, 2, 4]


@pytest.fixture(scope="module")
def context(backbone, tokenizer):
    """Of three prompts of different lengths."""
    prompts = ["a red circle", "an emoji of a green square drawn in outline style", "no"]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="right")
    return compute_context(backbone, batch["input_ids"], batch["attention_mask"])


def noise(number=3, height=4, width=4):
    return torch.randn(number, 4, height, width, generator=seeded(7))


def layers_that_run(replica, x_t, t, context):
    seen = []
    hooks = [
        layer.register_forward_hook(lambda *_, number=number: seen.append(number))
        for number, layer in enumerate(replica.layers)
    ]
    v = replica(x_t, t, context)
    for hook in hooks:
        hook.remove()
    return seen, v


@pytest.mark.parametrize("groups", DIVISORS)
def test_exactly_one_group_runs_in_depth_order_and_it_alone_learns(backbone, context, groups):
    replica = toy_transformer(backbone, groups)
    size = LAYERS // groups
    for group in range(groups):
        for t in ((group + 0.001) / groups, (group + 0.999) / groups, group / groups):
            replica.zero_grad(set_to_none=True)
            seen, v = layers_that_run(replica, noise(), torch.full((3,), t), context)
            assert seen == list(range(group * size, (group + 1) * size))
            v.square().mean().backward()
            for number, layer in enumerate(replica.layers):
                gradients = [parameter.grad for parameter in layer.parameters()]
                if number in seen:
                    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)
                else:
                    assert all(gradient is None for gradient in gradients)
            assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in replica.io.parameters())


@pytest.mark.parametrize("groups", DIVISORS)
def test_a_batch_of_mixed_times_is_the_samples_alone_in_order(backbone, context, groups):
    replica = toy_transformer(backbone, groups)
    t = torch.tensor([0.9, 0.1, 0.6])
    together = replica(noise(), t, context)
    for i in range(3):
        one = torch.tensor([i])
        alone = replica(noise()[one], t[one], context.select(one))
        torch.testing.assert_close(together[one], alone, rtol=0, atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-2)


def test_a_batch_of_mixed_times_trains_each_group_on_its_samples(backbone, context):
    replica = toy_transformer(backbone, 2)
    v = replica(noise(), torch.tensor([0.9, 0.1, 0.6]), context)
    v[1].sum().backward()  # the one sample of group 0
    assert all(p.grad is not None for p in replica.layers[0].parameters())
    assert not any(p.grad.abs().sum() for p in replica.layers[2].parameters() if p.grad is not None)


def test_a_sample_goes_to_the_expert_that_is_named_whatever_its_t(backbone, context):
    replica = toy_transformer(backbone, 2)
    t, groups = torch.tensor([0.9, 0.1, 0.6]), torch.tensor([0, 1, 1])
    v = replica(noise(), t, context, groups=groups)
    for i, group in enumerate(groups.tolist()):
        one = torch.tensor([i])
        alone = replica.expert(group, noise()[one], t[one], context.select(one))
        torch.testing.assert_close(v[one], alone, rtol=0, atol=1e-5)
    assert not torch.allclose(v[1], replica(noise(), t, context)[1], atol=1e-2)


def test_the_group_is_the_intervals(backbone):
    replica = toy_transformer(backbone, 4, intervals=[0.0, 0.5, 0.7, 0.9, 1.0])
    assert [replica.group_of(t) for t in (0.0, 0.49, 0.5, 0.89, 0.9, 1.0)] == [0, 0, 1, 2, 3, 3]
    assert replica.group_of(torch.tensor([0.95, 0.1])).tolist() == [3, 0]
    assert [list(replica.layers_of(group)) for group in range(4)] == [[0], [1], [2], [3]]


@pytest.mark.parametrize("mode", ["none", "probs", "logits"])
def test_padded_prompts_give_the_velocity_that_they_give_alone(backbone, context, mode):
    replica = toy_transformer(backbone, 2, residual_attention=mode)
    t = torch.full((3,), 0.3)
    together = replica(noise(), t, context)
    for i in range(3):
        one = torch.tensor([i])
        length = int(context.next_position[i])
        alone = context.select(one)
        alone = type(alone)(alone.keys[..., :length, :], alone.values[..., :length, :], alone.mask[:, :length],
                            alone.next_position)  # fmt: skip
        torch.testing.assert_close(replica(noise()[one], t[one], alone), together[one], rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", ["none", "probs", "logits"])
def test_a_whole_prompt_may_be_added_to_every_token(backbone, context, mode, tmp_path):
    plain = toy_transformer(backbone, 2, residual_attention=mode)
    pooled = toy_transformer(backbone, 2, residual_attention=mode, pooled_context=8, shaken=False)
    added = pooled.state_dict().keys() - plain.state_dict().keys()
    assert {name.split(".")[2] for name in added} == {"pooled"}
    pooled.load_state_dict({**pooled.state_dict(), **plain.state_dict()})
    t = torch.tensor([0.9, 0.1, 0.6])
    assert torch.equal(pooled(noise(), t, context), plain(noise(), t, context))  # it starts from nothing

    shake(pooled, seeded(3))
    v = pooled(noise(), t, context)
    v.square().mean().backward()
    assert all(p.grad.abs().sum() > 0 for layer in pooled.layers for p in layer.pooled.parameters())
    pooled.save_pretrained(tmp_path)
    loaded = LatteFlowTransformer.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(noise(), t, context), v, rtol=0, atol=1e-6)
    other = type(context)(context.keys, 2 - context.values, context.mask, context.next_position)
    blind = toy_transformer(backbone, 2, residual_attention=mode, pooled_context=8)
    with torch.no_grad():
        for layer in blind.layers:  # deaf to what attention brings, so that words come this way alone
            layer.self_attn.o_proj.weight.zero_()
        assert not torch.allclose(blind(noise(), t, context), blind(noise(), t, other), atol=1e-3)


@pytest.mark.parametrize("pooled", [None, 8])
def test_padding_is_never_read(backbone, context, pooled):
    replica = toy_transformer(backbone, 2, pooled_context=pooled)
    other = concatenate([context])
    other.keys[~other.mask[:, None, None].expand(other.keys.shape[:-1])] = 99.0
    other.values[~other.mask[:, None, None].expand(other.keys.shape[:-1])] = 99.0
    t = torch.full((3,), 0.3)
    assert torch.equal(replica(noise(), t, other), replica(noise(), t, context))


@pytest.mark.parametrize("mode", ["none", "probs", "logits"])
def test_latents_see_words_and_one_another_and_the_time(backbone, context, mode):
    replica = toy_transformer(backbone, 2, residual_attention=mode)
    t = torch.full((3,), 0.3)
    v = replica(noise(), t, context)
    moved = noise()
    moved[:, :, 3, 3] += 1
    assert (replica(moved, t, context) - v)[:, :, 0, 0].abs().min() > 0
    assert not torch.allclose(replica(noise(), t, context.select(torch.tensor([1, 2, 0]))), v, atol=1e-4)
    assert not torch.allclose(replica(noise(), t + 0.1, context), v, atol=1e-4)


def test_reads_its_own_layers_slice_of_the_context(backbone, context):
    replica = toy_transformer(backbone, 2)
    v = [replica(noise(), torch.full((3,), t), context) for t in (0.2, 0.8)]
    other = concatenate([context])
    other.keys[:, 2:] += 1  # the layers of group 1
    changed = [replica(noise(), torch.full((3,), t), other) for t in (0.2, 0.8)]
    assert torch.equal(v[0], changed[0])
    assert not torch.allclose(v[1], changed[1], atol=1e-4)


def test_cached_context_gives_the_velocity_of_one_recomputed(backbone, tokenizer):
    replica = toy_transformer(backbone, 2)
    ids = tokenizer("a blue triangle", return_tensors="pt")["input_ids"]
    cached = compute_context(backbone, ids, torch.ones_like(ids))
    x = noise(1)
    for t in torch.linspace(0, 1, 5):
        v = replica(x, t[None], cached)
        assert torch.equal(v, replica(x, t[None], compute_context(backbone, ids, torch.ones_like(ids))))
        x = x + 0.2 * v


def test_words_never_see_latents(backbone, context):
    """The backbone has no part in a forward pass, and nothing that it computed is changed by one."""
    replica = toy_transformer(backbone, 2)
    calls = []
    hooks = [module.register_forward_hook(lambda *_: calls.append(1)) for module in backbone.modules()]
    before = concatenate([context])
    replica(noise(), torch.tensor([0.1, 0.5, 0.9]), context)
    for hook in hooks:
        hook.remove()
    assert calls == []
    assert torch.equal(before.keys, context.keys)
    assert torch.equal(before.values, context.values)
    assert not set(map(id, replica.parameters())) & set(map(id, backbone.parameters()))


def test_latents_follow_the_prompt_as_a_grid(backbone, context):
    """Other positions than those after the prompt give another velocity."""
    replica = toy_transformer(backbone, 2)
    t = torch.full((3,), 0.3)
    v = replica(noise(), t, context)
    late = type(context)(context.keys, context.values, context.mask, context.next_position + 5)
    assert not torch.allclose(replica(noise(), t, late), v, atol=1e-5)


def test_starts_at_velocity_zero_with_the_backbones_weights(backbone, context):
    replica = toy_transformer(backbone, 2, shaken=False)
    assert not replica(noise(), torch.tensor([0.1, 0.5, 0.9]), context).any()
    for source, copied in zip(backbone.model.language_model.layers, replica.layers, strict=True):
        assert torch.equal(source.self_attn.k_proj.bias, copied.self_attn.k_proj.bias)
        assert torch.equal(source.mlp.down_proj.weight, copied.mlp.down_proj.weight)


@pytest.mark.parametrize("mode", ["probs", "logits"])
def test_a_fresh_replica_is_the_one_without_residual_attention(backbone, context, mode):
    """Closed gates: the velocity does not depend on the mode until training opens them."""
    plain = toy_transformer(backbone, 1, residual_attention="none")
    gated = toy_transformer(backbone, 1, residual_attention=mode)
    missing, unexpected = gated.load_state_dict(plain.state_dict(), strict=False)
    assert missing
    assert all("gate" in name and "gate_proj" not in name for name in missing)
    assert not unexpected
    for layer in gated.layers[1:]:
        nn.init.zeros_(layer.gate.project.weight)
        nn.init.zeros_(layer.gate.project.bias)
    t = torch.tensor([0.1, 0.5, 0.9])
    torch.testing.assert_close(gated(noise(), t, context), plain(noise(), t, context), rtol=0, atol=1e-5)
    for layer in gated.layers[1:]:
        nn.init.ones_(layer.gate.project.bias)
    assert not torch.allclose(gated(noise(), t, context), plain(noise(), t, context), atol=1e-4)


def test_one_io_a_group_is_used_by_its_group_alone(backbone, context):
    replica = toy_transformer(backbone, 2, shared_io=False)
    replica(noise(), torch.full((3,), 0.7), context).square().mean().backward()
    assert all(p.grad is None for p in replica.io[0].parameters())
    assert all(p.grad is not None for p in replica.io[1].parameters())
    assert len(toy_transformer(backbone, 2).io) == 1


@pytest.mark.parametrize("patch", [1, 2])
def test_draws_any_grid(backbone, context, patch):
    replica = toy_transformer(backbone, 2, patch_size=patch)
    x = noise(3, 6, 2)
    assert replica(x, torch.tensor([0.1, 0.5, 0.9]), context).shape == x.shape


@pytest.mark.parametrize(
    "settings",
    [
        {"num_groups": 2},
        {"num_groups": 4, "intervals": [0.0, 0.11, 0.5, 0.87, 1.0], "residual_attention": "logits"},
        {"num_groups": 2, "shared_io": False, "patch_size": 2, "latents_mean": [0.1] * 4, "latents_std": [2.0] * 4},
    ],
)
def test_saved_and_loaded_is_the_same(backbone, context, tmp_path, settings):
    replica = toy_transformer(backbone, **settings)
    replica.save_pretrained(tmp_path)
    loaded = LatteFlowTransformer.from_pretrained(tmp_path)
    assert loaded.intervals == replica.intervals
    for name in ("num_groups", "residual_attention", "shared_io", "patch_size", "mrope_section", "latents_mean"):
        assert list_or_self(loaded.config[name]) == list_or_self(replica.config[name])
    assert loaded.state_dict().keys() == replica.state_dict().keys()
    for name, tensor in replica.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    t = torch.tensor([0.05, 0.45, 0.95])
    # Weights mapped from a file lie at other addresses, and matrix products round by alignment: not the same bits.
    torch.testing.assert_close(loaded(noise(), t, context), replica(noise(), t, context), rtol=0, atol=2e-6)
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "LatteFlowTransformer"


def list_or_self(value):
    return list(value) if isinstance(value, (list, tuple)) else value


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_groups": 3}, "num_groups has to divide the 4 layers: got 3"),
        ({"num_groups": 0}, "0"),
        ({"num_groups": 2, "intervals": [0.0, 0.2, 0.5, 1.0]}, "2 groups need 3 edges"),
        ({"num_groups": 2, "intervals": [0.0, 0.5]}, "interval edges"),
        ({"num_groups": 2, "intervals": [0.0, 0.7, 0.5]}, "interval edges"),
        ({"num_groups": 2, "mrope_section": [1, 1, 1]}, "mrope_section"),
        ({"num_groups": 2, "residual_attention": "both"}, "probs, logits or none: got 'both'"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(backbone, settings, message):
    with pytest.raises(UserError, match=message):
        toy_transformer(backbone, **settings)


def test_a_backbone_of_another_family_is_refused():
    class Other(nn.Module):
        class config:
            model_type = "llava"

    with pytest.raises(UserError, match="'llava' is not supported: qwen2_vl"):
        LatteFlowTransformer.from_backbone(Other(), num_groups=2)


def test_the_replica_of_a_half_precision_backbone_holds_its_values(tokenizer):
    backbone = toy_backbone(tokenizer).to(torch.bfloat16)
    replica = toy_transformer(backbone, 2, shaken=False)
    weight = backbone.model.language_model.layers[1].mlp.up_proj.weight
    assert torch.equal(replica.layers[1].mlp.up_proj.weight, weight.float())


def test_runs_in_bfloat16(backbone, context):
    replica = toy_transformer(backbone, 2)
    t = torch.tensor([0.1, 0.5, 0.9])
    expected = replica(noise(), t, context)
    half = replica.to(torch.bfloat16)(noise().bfloat16(), t, context.to(torch.bfloat16))
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=0, atol=0.1)
    assert expected.abs().max() > 0.5  # so that the tolerance says something


def test_the_package_offers_its_two_classes():
    assert latteflow.LatteFlowTransformer is LatteFlowTransformer
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = latteflow.Nothing
