"""What may change speed and memory alone: checkpointed activations, compiled layers, accumulated gradients."""

from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file

from latteflow.errors import UserError
from latteflow.train.build import build_stage
from latteflow.train.checkpoint import checkpoint_folders
from latteflow.train.loop import train
from latteflow.train.recipe import Recipe
from latteflow.train.samples import step_samples
from toys import seeded, shake, toy_recipe


@pytest.fixture
def build(tmp_path, toy_set, parts):
    """Return the function that makes a generator's recipe and stage."""

    def built(name="run", generator=None, **settings):
        settings = {"steps": 4, "preview_every": 99, "log_every": 1, "checkpoint_every": 99, **settings}
        recipe = toy_recipe("generator", tmp_path / name, toy_set, parts=parts, **settings)
        recipe["generator"] |= generator or {}
        recipe = TypeAdapter(Recipe).validate_python(recipe)
        return recipe, build_stage(recipe)

    return built


def trained(built):
    """Train, and return the losses and the weights of the last checkpoint."""
    losses = []
    recipe, stage = built
    train(recipe, stage, watch=lambda progress: losses.append(progress.loss))
    return losses, load_file(checkpoint_folders(Path(recipe.output))[-1] / "model.safetensors")


def gradients_and_saved_bytes(stage):
    """Take one forward and backward pass; return the gradients, and what was kept for the backward pass."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    (samples,) = step_samples(0, number=stage.number, batch_size=12, seed=0)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss, _ = stage.loss(stage.model, samples, stage.read(samples))
    loss.backward()
    return {name: p.grad for name, p in stage.model.named_parameters()}, sum(kept.values())


@pytest.mark.parametrize("residual_attention", ["probs", "logits", "none"])
def test_activations_computed_again_give_the_same_gradients_and_are_not_kept(build, residual_attention):
    _, stage = build(generator={"num_groups": 1, "residual_attention": residual_attention})
    stage.to(torch.device("cpu"))
    shake(stage.model, seeded())
    plain, kept = gradients_and_saved_bytes(stage)
    stage.model.zero_grad()
    stage.model.enable_gradient_checkpointing()
    found, kept_less = gradients_and_saved_bytes(stage)
    assert kept_less < 0.6 * kept
    for name, gradient in plain.items():
        assert gradient.abs().sum() > 0, name
        assert torch.equal(found[name], gradient), name


def test_activation_checkpointing_changes_nothing_that_is_learned(build):
    plain = trained(build("plain"))
    recipe, stage = build("saving", activation_checkpointing=True)
    runs = []
    run = type(stage.model.layers[0]).forward

    def counted(*given, **named):
        runs.append(torch.is_grad_enabled())
        return run(*given, **named)

    for layer in stage.model.layers:
        layer.forward = counted.__get__(layer)
    found = trained((recipe, stage))
    assert runs.count(True) == 4 * 4 * 2  # four steps of four layers, each forward and again
    assert found[0] == plain[0]
    for name, tensor in plain[1].items():
        assert torch.equal(found[1][name], tensor), name


@pytest.mark.parametrize("stage", ["autoencoder", "backbone"])
def test_activation_checkpointing_of_a_stage_that_cannot_is_refused(tmp_path, toy_set, stage):
    recipe = toy_recipe(stage, tmp_path, toy_set, activation_checkpointing=True)
    recipe = TypeAdapter(Recipe).validate_python(recipe)
    with pytest.raises(UserError, match=r"train\.activation_checkpointing: a \w+ cannot; set it to false"):
        train(recipe, build_stage(recipe))


@pytest.mark.parametrize("shared_io", [True, False])
def test_accumulated_gradients_of_the_generator_are_those_of_the_batch(build, shared_io):
    """Nine samples in parts of three, so that parts differ in how many samples of a group they have."""
    generator = {"shared_io": shared_io, "num_groups": 2}
    settings = {"batch_size": 9, "learning_rate": 3e-4}
    whole = trained(build("whole", generator, **settings))
    pieces = trained(build("pieces", generator, gradient_accumulation_steps=3, **settings))
    assert pieces[0] == pytest.approx(whole[0], rel=1e-6)
    for name, tensor in whole[1].items():
        torch.testing.assert_close(pieces[1][name], tensor, rtol=0, atol=1e-6, msg=name)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # torch.compile about torch
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_layers_learn_the_same(build):
    """Two steps, and no pictures between them: every other shape is compiled anew."""
    plain, compiled = (
        build(name, learning_rate=3e-4, steps=2, compile=name == "compiled") for name in ("plain", "compiled")
    )
    for _, stage in (plain, compiled):
        stage.preview, stage.validate = lambda: None, dict
    expected = trained(plain)
    frames = torch._dynamo.utils.counters["frames"]
    frames.clear()
    found = trained(compiled)
    assert frames["ok"] > 0
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    for name, tensor in expected[1].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=0, atol=1e-5, msg=name)
