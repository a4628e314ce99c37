"""Groups trained by themselves, and merged: to the bit what one run of all groups leaves."""

import json
import shutil

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load_file, save_file

from latteflow.errors import UserError
from latteflow.pipeline import LatteFlowPipeline
from latteflow.train.build import build_stage
from latteflow.train.checkpoint import checkpoint_folders
from latteflow.train.guard import TrainingDiverged
from latteflow.train.loop import train
from latteflow.train.merge import merge_runs
from latteflow.train.recipe import Recipe
from toys import toy_recipe

STEPS = 5


@pytest.fixture(scope="module")
def run(tmp_path_factory, toy_set, parts):
    """Train all groups, or some; returns the function that does, which returns the stage and the output folder."""

    def trained(groups=None, *, num_groups=2, before=lambda stage: None, **settings):
        output = tmp_path_factory.mktemp("run")
        settings = {"steps": STEPS, "preview_every": 99, "log_every": 1, "checkpoint_every": 99, **settings}
        recipe = toy_recipe("generator", output, toy_set, parts=parts, **settings)
        recipe["generator"] |= {"num_groups": num_groups, "shared_io": False, "groups": groups}
        recipe = TypeAdapter(Recipe).validate_python(recipe)
        stage = build_stage(recipe)
        before(stage)
        train(recipe, stage)
        return stage, output

    return trained


def state(stage, output):
    """Trained weights, their averages, the optimizer's state of each by name, and the schedule's."""
    (folder,) = checkpoint_folders(output)
    found = {f"model/{name}": tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    found |= {f"ema/{name}": tensor for name, tensor in load_file(folder / "ema.safetensors").items()}
    saved = torch.load(folder / "optimizer.pt", weights_only=True)
    trained = [(name, p.ndim) for name, p in stage.model.named_parameters() if p.requires_grad]
    decayed_first = [name for name, ndim in trained if ndim >= 2] + [name for name, ndim in trained if ndim < 2]
    for number, entries in saved["optimizer"]["state"].items():
        found |= {f"{key}/{decayed_first[number]}": tensor for key, tensor in entries.items()}
    return found, saved["schedule"]


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def assert_apart_is_together(run, num_groups, tmp_path, **settings):
    """Train together, and each group by itself; compare all that training leaves, and the merged pipeline."""
    joint, output = run(num_groups=num_groups, **settings)
    expected, schedule = state(joint, output)
    found, finals = {}, []
    for group in range(num_groups):
        alone, folder = run([group], num_groups=num_groups, **settings)
        mine, its_schedule = state(alone, folder)
        assert its_schedule == schedule
        assert not found.keys() & mine.keys()
        found |= mine
        finals.append(folder)
    assert_same(found, expected)
    merged = merge_runs(finals, tmp_path / "merged")
    for file in (output / "final").rglob("*"):
        if file.is_file() and file.name != "recipe.json":
            assert (merged / file.relative_to(output / "final")).read_bytes() == file.read_bytes(), file
    return expected


@pytest.mark.parametrize(
    ("num_groups", "settings"),
    [
        pytest.param(2, {}, id="plain"),
        pytest.param(4, {}, id="6 samples for 4 groups"),
        pytest.param(4, {"batch_size": 3}, id="steps without samples of some group"),
        pytest.param(2, {"batch_size": 9, "gradient_accumulation_steps": 3}, id="accumulated"),
        pytest.param(2, {"gradient_clip": 1e-3, "batch_size": 5}, id="clipped"),
        pytest.param(2, {"mixed_precision": "bf16"}, id="bfloat16"),
    ],
)
def test_groups_trained_apart_are_those_trained_together(run, tmp_path, num_groups, settings):
    expected = assert_apart_is_together(run, num_groups, tmp_path, **settings)
    steps = {int(tensor) for name, tensor in expected.items() if name.startswith("step/")}
    assert steps == {STEPS} if settings.get("batch_size") != 3 else len(steps) > 1
    if "gradient_clip" in settings:  # it did clip: the moments would be larger
        moments = [t for name, t in expected.items() if name.startswith("exp_avg/layers.0.")]
        assert torch.cat([m.flatten() for m in moments]).norm() < 1.01e-3


def poison(group, *steps):
    """Return what makes a gradient of the group's NaN in the given steps, counted from 1; the loss stays a number."""

    def before(stage):
        calls = []
        weight = stage.model.layers[stage.model.layers_of(group)[0]].mlp.up_proj.weight

        def hook(gradient):
            calls.append(gradient)
            return gradient * float("nan") if len(calls) in steps else gradient

        if weight.requires_grad:
            weight.register_hook(hook)

    return before


def both(*poisons):
    return lambda stage: [poisoned(stage) for poisoned in poisons]


def test_an_update_that_is_no_number_is_left_out_of_its_group_alone(run, tmp_path):
    """Group 0 in steps 2 and 3, group 1 in steps 3 and 4: two in a row each, three in a row in all."""
    before = both(poison(0, 2, 3), poison(1, 3, 4))
    expected = assert_apart_is_together(run, 2, tmp_path, before=before, nonfinite="skip", nonfinite_patience=2)
    steps = {int(tensor) for name, tensor in expected.items() if name.startswith("step/")}
    assert steps == {STEPS - 2}
    whole, output = run(before=poison(0, 2), nonfinite="skip")
    steps = {name: int(tensor) for name, tensor in state(whole, output)[0].items() if name.startswith("step/")}
    assert steps["step/layers.0.self_attn.q_proj.weight"] == steps["step/io.0.head.weight"] == STEPS - 1
    assert steps["step/layers.2.self_attn.q_proj.weight"] == steps["step/io.1.head.weight"] == STEPS
    (file,) = (output / "nonfinite").iterdir()
    assert file.name == "step-00000002-group-0-process-0.json"
    told = json.loads(file.read_text())
    assert told["set"] == "group-0"
    assert [len(part["t"]) for part in told["parts"]] == [6]


def test_a_loss_that_is_no_number_is_held_against_its_own_group_alone(run):
    """Also where another group has no samples in the step, hence no loss of its own."""

    def before(stage):
        inputs = stage.feed.inputs

        def with_nan(samples, data, prompt_dropout):
            x_1, context = inputs(samples, data, prompt_dropout)
            groups = stage._groups(samples.batch_size, samples.seed, samples.step)[samples.places]
            x_1[groups == 0] = float("nan")
            return x_1, context

        stage.feed.inputs = with_nan

    stage, output = run(num_groups=4, batch_size=3, before=before, nonfinite="skip", nonfinite_patience=STEPS)
    assert {file.name[14:21] for file in (output / "nonfinite").iterdir()} == {"group-0"}
    saved = load_file(checkpoint_folders(output)[0] / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in saved.values())
    trained = state(stage, output)[0]
    assert "step/io.0.head.weight" not in trained
    assert all(f"step/io.{group}.head.weight" in trained for group in (1, 2, 3))


def test_a_group_that_fails_too_often_stops_the_run_and_is_named(run):
    with pytest.raises(TrainingDiverged, match=r"step 4: the loss of group-1 is .* gradient's norm nan.* 3 times in a"):
        run(before=poison(1, 2, 3, 4), nonfinite="skip", nonfinite_patience=2)
    with pytest.raises(TrainingDiverged, match="step 2: the loss of group-1"):
        run(before=poison(1, 2))


def test_the_other_groups_keep_their_weights(run):
    fresh = {}
    stage, output = run([1], before=lambda stage: fresh.update(copied(stage.model.state_dict())))
    final = load_file(output / "final" / "transformer" / "diffusion_pytorch_model.safetensors")
    for tensors in (stage.model.state_dict(), final):
        same = {name for name, tensor in tensors.items() if torch.equal(tensor, fresh[name])}
        theirs = {name for name in fresh if name.startswith(("layers.0.", "layers.1.", "io.0."))}
        assert theirs <= same
        assert not {name for name in same - theirs if name.endswith("proj.weight")}
    saved = {name.partition("/")[2] for name in state(stage, output)[0]}
    assert all(name.startswith(("layers.2.", "layers.3.", "io.1.")) for name in saved)


def copied(state):
    return {name: tensor.clone() for name, tensor in state.items()}


@pytest.fixture(scope="module")
def apart(run):
    """Two runs of one step, one a group; tests copy them before they change them."""
    return [run([group], steps=1)[1] for group in (0, 1)]


@pytest.fixture
def pair(apart, tmp_path):
    return [shutil.copytree(folder, tmp_path / f"run-{number}") for number, folder in enumerate(apart)]


def change(folder, **values):
    """Change values of a run's recorded recipe, or of a part's configuration: ``part__key``."""
    for key, value in values.items():
        part, key = key.split("__", 1) if "__" in key else ("", key)
        file = folder / "final" / (f"{part}/config.json" if part not in ("", "train", "generator") else "recipe.json")
        content = json.loads(file.read_text())
        (content[part] if part in ("train", "generator") else content)[key] = value
        file.write_text(json.dumps(content))


def test_a_merged_pipeline_draws_and_says_that_it_has_all_groups(pair, tmp_path):
    out = merge_runs([pair[1] / "final", pair[0]], tmp_path / "merged")
    assert out == tmp_path / "merged"
    pipe = LatteFlowPipeline.from_pretrained(out)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a red circle", num_inference_steps=2).images[0].size == (32, 32)
    recipe = json.loads((out / "recipe.json").read_text())
    assert recipe["generator"]["groups"] is None
    assert recipe["output"] == str(out)
    TypeAdapter(Recipe).validate_python(recipe)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged", "run-0", "run-1"]


def test_runs_of_several_groups_can_be_merged_too(run, apart, tmp_path):
    several = run([1, 2, 3], num_groups=4, steps=1)[1]
    first = run([0], num_groups=4, steps=1)[1]
    joint = run(num_groups=4, steps=1)[1]
    merge_runs([several, first], tmp_path / "merged")
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "merged" / weights).read_bytes() == (joint / "final" / weights).read_bytes()


def test_places_and_habits_may_differ(pair, tmp_path):
    change(pair[1], encode={"output": "elsewhere"})
    change(pair[1], output="elsewhere", train__workers=3, train__log_every=7, generator__backbone="elsewhere")
    change(pair[1], vae___diffusers_version="9.9", vae___name_or_path="elsewhere")
    merge_runs(pair, tmp_path / "merged")


def shift(folder, part):
    """Change one weight of a part by its least bit."""
    (file,) = (folder / "final" / part).glob("*.safetensors")
    tensors = load_file(file)
    name = sorted(tensors)[0]
    first = tensors[name].view(-1)[:1]
    first.copy_(torch.nextafter(first, first + 1))
    save_file(tensors, file)
    return name


def test_a_file_with_another_header_is_the_same_weights(pair, tmp_path):
    (file,) = (pair[1] / "final" / "vae").glob("*.safetensors")
    save_file(load_file(file), file, metadata={"format": "pt", "written by": "another version"})
    merge_runs(pair, tmp_path / "merged")


@pytest.mark.parametrize("part", ["backbone", "vae"])
def test_other_frozen_weights_are_named(pair, tmp_path, part):
    name = shift(pair[1], part)
    with pytest.raises(UserError, match=rf"runs differ: .*run-0.*{part}.* and .*run-1.* are not the same \({name}\)"):
        merge_runs(pair, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__steps": 7}, r"runs differ in train\.steps: 1 in .*run-0.final, 7 in .*run-1.final"),
        ({"train__seed": 7}, r"runs differ in train\.seed: 0 in"),
        ({"generator__density": "logit_normal"}, r"runs differ in generator\.density"),
        ({"transformer__latents_mean": [0.0] * 4}, r"runs differ in transformer.config\.json: latents_mean: \["),
        ({"backbone__rope_theta": 3.0}, r"runs differ in backbone.config\.json: rope_theta"),
        ({"generator__groups": [0]}, r"group 0 is in .*run-0.final and .*run-1.final: leave out all but one"),
        ({"generator__groups": [0, 1]}, r"group 0 is in .*run-0.final and"),
        ({"generator__groups": None}, r"run-1.final has trained all groups together .*nothing to merge"),
        (
            {"generator__shared_io": True, "generator__groups": None},
            r"run-1.final cannot be merged: its groups share patch embedding, .*train each .*shared_io=false",
        ),
        ({"generator__lora": {"rank": 4, "alpha": None}}, r"run-1.final has trained adapters .*load the `lora` folder"),
        ({"generator": None, "stage": "backbone"}, r"run-1.final is of the backbone stage: only a generator has"),
    ],
)
def test_runs_that_do_not_fit_are_refused_and_the_difference_is_named(pair, tmp_path, changes, message):
    change(pair[1], **changes)
    with pytest.raises(UserError, match=message):
        merge_runs(pair, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_missing_group_run_or_file_is_named(pair, tmp_path):
    with pytest.raises(UserError, match=r"group 1 is in no run: train it with generator\.groups=\[1\]"):
        merge_runs(pair[:1], tmp_path / "merged")
    with pytest.raises(UserError, match=r"no finished run in .*nowhere"):
        merge_runs([*pair, tmp_path / "nowhere"], tmp_path / "merged")
    (pair[1] / "final" / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(UserError, match=r"runs differ: there is no .*run-1.*scheduler_config"):
        merge_runs(pair, tmp_path / "merged")


def test_weights_that_cannot_be_read_are_named_and_leave_nothing(pair, tmp_path):
    file = pair[1] / "final" / "transformer" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match=r"weights of diffusion_pytorch_model.safetensors cannot be read"):
        merge_runs(pair, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_nothing_is_written_over(pair, tmp_path):
    merge_runs(pair, tmp_path / "merged")
    with pytest.raises(UserError, match="merged is there already: give another folder"):
        merge_runs(pair, tmp_path / "merged")


def test_groups_that_share_weights_are_refused_before_training(tmp_path, toy_set, parts):
    recipe = toy_recipe("generator", tmp_path, toy_set, parts=parts)
    for changes, message in [
        ({"groups": [0]}, "set shared_io=false"),
        ({"groups": [2], "shared_io": False}, "groups has to name some of 0 to 1"),
        ({"groups": [], "shared_io": False}, "groups has to name some of 0 to 1"),
    ]:
        with pytest.raises(ValidationError, match=message):
            TypeAdapter(Recipe).validate_python({**recipe, "generator": {**recipe["generator"], **changes}})
