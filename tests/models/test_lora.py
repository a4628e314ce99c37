"""LoRA on the replica: what is adapted and trained, and that an adapter comes back, mixes, fuses and goes."""

import copy
import sys

import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file

from latteflow import LatteFlowPipeline, LatteFlowTransformer
from latteflow.errors import UserError
from latteflow.flow.objective import layerwise_flow_loss
from latteflow.flow.path import interpolate, target_velocity
from latteflow.models.context import compute_context
from latteflow.models.lora import LoraMixin, lora_config, lora_targets
from toys import seeded, toy_pipeline, toy_transformer

FROM_REPLICA = {"prefix": None, "use_safetensors": True}
SEVERAL = pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")  # PEFT, at every second one
BRANCHES = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]


@pytest.fixture(scope="module")
def context(backbone, tokenizer):
    batch = tokenizer(["a red circle", "no", "yes", "a blue triangle"], return_tensors="pt", padding=True)
    return compute_context(backbone, batch["input_ids"], batch["attention_mask"])


@pytest.fixture
def replica(backbone):
    return toy_transformer(backbone)


@torch.no_grad()
def output(replica, context):
    """The velocities of four samples, two of each group."""
    return replica(torch.randn(4, 4, 4, 4, generator=seeded(7)), torch.tensor([0.1, 0.4, 0.6, 0.9]), context)


def train(replica, context, steps=5, seed=0):
    """Make a few steps of the flow-matching objective on whatever is trainable; return the losses."""
    generator = seeded(seed)
    trained = [parameter for parameter in replica.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    x_1, x_0 = (torch.randn(4, 4, 4, 4, generator=generator) for _ in range(2))
    t, losses = torch.tensor([0.1, 0.4, 0.6, 0.9]), []
    for _ in range(steps):
        v = replica(interpolate(x_0, x_1, t), t, context)
        loss = layerwise_flow_loss(v, target_velocity(x_0, x_1), replica.group_of(t), 2).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def adapted(replica, context, name="default", seed=0, **settings):
    """Give the replica a trained adapter."""
    replica.add_adapter(lora_config(replica, 4, 8, **settings), name)
    train(replica, context, seed=seed)
    return replica


def base_weights(module):
    return {name.replace(".base_layer", ""): p for name, p in module.named_parameters() if "lora_" not in name}


# ---- which layers


def test_all_maps_of_attention_and_feed_forward_and_nothing_else(replica):
    names = lora_targets(replica)
    assert names == [f"layers.{number}.{branch}" for number in range(4) for branch in BRANCHES]
    assert all(isinstance(replica.get_submodule(name), torch.nn.Linear) for name in names)


@pytest.mark.parametrize(("groups", "layers"), [([1], [2, 3]), ([0], [0, 1]), ((1, 0, 1), [0, 1, 2, 3])])
def test_chosen_groups_alone(backbone, context, groups, layers):
    replica = toy_transformer(backbone)
    before = output(replica, context)
    adapted(replica, context, groups=groups)
    names = [name for name, _ in replica.named_parameters() if "lora_" in name]
    assert {int(name.split(".")[1]) for name in names} == set(layers)
    assert len(names) == 2 * len(layers) * len(BRANCHES)
    changed = (output(replica, context) - before).abs().amax(dim=(1, 2, 3)) > 1e-4
    assert changed.tolist() == [0 in layers] * 2 + [2 in layers] * 2


def test_a_layers_number_is_not_the_end_of_anothers(tokenizer):
    """PEFT matches names by their ends: layer 1's are not those of layer 11."""
    from toys import toy_backbone

    replica = toy_transformer(toy_backbone(tokenizer, num_layers=12), 12)
    replica.add_adapter(lora_config(replica, 2, groups=[1]))
    assert {name.split(".")[1] for name, _ in replica.named_parameters() if "lora_" in name} == {"1"}


@SEVERAL
def test_targets_are_seen_through_adapters(replica, context):
    names = lora_targets(replica)
    adapted(replica, context, groups=[0])
    assert lora_targets(replica) == names
    adapted(replica, context, "second")
    assert lora_targets(replica) == names


def test_groups_that_are_not_there(replica):
    for groups in ([2], [-1], []):
        with pytest.raises(UserError, match="groups have to be among 0 to 1"):
            lora_targets(replica, groups)


def test_the_scale_is_one_unless_said(replica):
    assert lora_config(replica, 4).lora_alpha == 4
    config = lora_config(replica, 4, 2.5, lora_dropout=0.1)
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 2.5, 0.1)


# ---- training


def test_only_the_adapter_learns(replica, backbone, context):
    base = {name: parameter.clone() for name, parameter in base_weights(replica).items()}
    frozen = {name: weight.clone() for name, weight in backbone.state_dict().items()}
    before = output(replica, context)
    replica.add_adapter(lora_config(replica, 4))
    assert torch.equal(output(replica, context), before)  # starts from nothing
    losses = train(replica, context)
    assert losses[-1] < losses[0]
    for name, parameter in replica.named_parameters():
        assert parameter.requires_grad == ("lora_" in name), name
        assert (parameter.grad is not None) == ("lora_" in name), name
    after = base_weights(replica)
    assert set(after) == set(base)
    assert all(torch.equal(after[name], weight) for name, weight in base.items())
    assert all(torch.equal(backbone.state_dict()[name], weight) for name, weight in frozen.items())
    assert not torch.allclose(output(replica, context), before, atol=1e-3)


# ---- saving and loading


def test_a_saved_adapter_loads_into_a_fresh_replica(backbone, context, tmp_path):
    replica = adapted(toy_transformer(backbone), context, groups=[1])
    expected = output(replica, context)
    replica.save_lora_adapter(tmp_path)
    assert [file.suffix for file in tmp_path.iterdir()] == [".safetensors"]
    fresh = toy_transformer(backbone)
    assert not torch.allclose(output(fresh, context), expected, atol=1e-3)
    fresh.load_lora_adapter(tmp_path, adapter_name="again", **FROM_REPLICA)
    assert torch.equal(output(fresh, context), expected)
    assert fresh.peft_config["again"].lora_alpha == 8
    fresh.unload_lora()
    assert torch.equal(output(fresh, context), output(toy_transformer(backbone), context))


# ---- fusing


def test_fused_is_unfused_and_back(replica, context):
    plain = output(replica, context)
    adapted(replica, context)
    expected = output(replica, context)
    weights = {name: parameter.clone() for name, parameter in base_weights(replica).items()}
    replica.fuse_lora()
    assert not torch.equal(base_weights(replica)["layers.0.mlp.up_proj.weight"], weights["layers.0.mlp.up_proj.weight"])
    torch.testing.assert_close(output(replica, context), expected, rtol=0, atol=1e-5)
    replica.unfuse_lora()
    for name, parameter in base_weights(replica).items():
        torch.testing.assert_close(parameter, weights[name], rtol=0, atol=1e-6)
    torch.testing.assert_close(output(replica, context), expected, rtol=0, atol=1e-5)
    replica.unload_lora()
    torch.testing.assert_close(output(replica, context), plain, rtol=0, atol=1e-5)


def test_a_fused_adapter_is_part_of_what_is_saved(replica, context, tmp_path):
    names = set(replica.state_dict())
    adapted(replica, context)
    expected = output(replica, context)
    replica.fuse_lora()
    replica.unload_lora()
    replica.save_pretrained(tmp_path)
    assert set(load_file(next(tmp_path.glob("*.safetensors")))) == names
    again = LatteFlowTransformer.from_pretrained(tmp_path)
    torch.testing.assert_close(output(again, context), expected, rtol=0, atol=1e-5)


# ---- several


@SEVERAL
def test_two_adapters_are_mixed_by_weight(backbone, context, tmp_path):
    alone = []
    for seed, name in enumerate(["one", "other"]):
        replica = adapted(toy_transformer(backbone), context, seed=seed)
        alone.append(output(replica, context))
        replica.save_lora_adapter(tmp_path / name)
    both = toy_transformer(backbone)
    plain = output(both, context)
    for name in ("one", "other"):
        both.load_lora_adapter(tmp_path / name, adapter_name=name, **FROM_REPLICA)
    for weights, expected in (([1.0, 0.0], alone[0]), ([0.0, 1.0], alone[1]), ([0.0, 0.0], plain)):
        both.set_adapters(["one", "other"], weights)
        torch.testing.assert_close(output(both, context), expected, rtol=0, atol=1e-5)

    # The mixture is what its weights say, to the last linear map.
    both.set_adapters(["one", "other"], [0.7, 0.2])
    mixed, layer = toy_transformer(backbone), "layers.{}.{}"
    for number in range(4):
        for branch in BRANCHES:
            name = layer.format(number, branch)
            wrapped = both.get_submodule(name)
            change = sum(
                scale * 2.0 * wrapped.lora_B[adapter].weight @ wrapped.lora_A[adapter].weight
                for adapter, scale in (("one", 0.7), ("other", 0.2))
            )
            with torch.no_grad():
                mixed.get_submodule(name).weight += change
    torch.testing.assert_close(output(both, context), output(mixed, context), rtol=0, atol=1e-5)


def test_disabling_gives_the_base_back(replica, context):
    plain = output(replica, context)
    adapted(replica, context)
    expected = output(replica, context)
    replica.disable_adapters()
    assert torch.equal(output(replica, context), plain)
    replica.enable_adapters()
    assert torch.equal(output(replica, context), expected)


# ---- the pipeline's methods


def toy():
    pipe = LatteFlowPipeline(**toy_pipeline().components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe():
    return toy()


def drawn(pipe):
    return pipe("a red circle", num_inference_steps=4, generator=seeded(), output_type="pt").images


def test_a_pipeline_saves_and_loads_adapters_as_diffusers_do(pipe, context, tmp_path):
    plain = drawn(pipe)
    adapted(pipe.transformer, context)
    expected = drawn(pipe)
    LatteFlowPipeline.save_lora_weights(
        tmp_path,
        get_peft_model_state_dict(pipe.transformer),
        transformer_lora_adapter_metadata=pipe.transformer.peft_config["default"].to_dict(),
    )
    names = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert all(name.startswith("transformer.layers.") for name in names)

    fresh = toy()
    for source in (tmp_path, tmp_path / "pytorch_lora_weights.safetensors"):
        fresh.load_lora_weights(source, adapter_name="toy")
        assert fresh.get_active_adapters() == ["toy"]
        assert torch.equal(drawn(fresh), expected)
        fresh.unload_lora_weights()
        assert torch.equal(drawn(fresh), plain)
    fresh.load_lora_weights(dict(names))  # without its configuration, alpha is taken to be the rank
    assert not torch.allclose(drawn(fresh), expected, atol=1e-3)
    fresh.set_adapters("default_0", 2.0)
    torch.testing.assert_close(drawn(fresh), expected, rtol=0, atol=1e-5)


def test_a_pipeline_fuses(pipe, context, tmp_path):
    adapted(pipe.transformer, context)
    expected = drawn(pipe)
    pipe.fuse_lora()
    assert pipe.fused_loras == {"default"}
    torch.testing.assert_close(drawn(pipe), expected, rtol=0, atol=1e-5)
    pipe.unfuse_lora()
    assert pipe.num_fused_loras == 0
    pipe.fuse_lora(lora_scale=1.0)
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path)
    torch.testing.assert_close(drawn(LatteFlowPipeline.from_pretrained(tmp_path)), expected, rtol=0, atol=1e-5)


def test_files_without_an_adapter_of_the_replica_are_refused(pipe, context, tmp_path):
    adapted(copy.deepcopy(pipe.transformer), context).save_lora_adapter(tmp_path)
    with pytest.raises(UserError, match=r"load_lora_adapter\(folder, prefix=None, use_safetensors=True\)"):
        pipe.load_lora_weights(tmp_path)
    with pytest.raises(UserError, match="no weights to save"):
        pipe.save_lora_weights(tmp_path, {})


def test_pickles_are_refused(pipe, tmp_path):
    torch.save({"transformer.layers.0.mlp.up_proj.lora_A.weight": torch.zeros(2, 32)}, tmp_path / "lora.bin")
    with pytest.raises(UserError, match="safetensors"):
        pipe.load_lora_weights(tmp_path, weight_name="lora.bin")
    with pytest.raises(UserError, match="safetensors"):
        pipe.load_lora_weights(tmp_path)


def test_without_peft_it_is_said_what_to_install(pipe, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert isinstance(pipe, LoraMixin)
    for call in (lambda: lora_config(pipe.transformer), lambda: pipe.load_lora_weights(tmp_path)):
        with pytest.raises(UserError, match=r"latteflow\[train\]"):
            call()


def test_a_replica_saved_with_adapters_around_it_is_refused(context, tmp_path):
    pipe = toy_pipeline()
    adapted(pipe.transformer, context)
    pipe.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="the transformer's files lack"):
        LatteFlowPipeline.from_pretrained(tmp_path)
