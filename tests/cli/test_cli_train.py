"""``latteflow train``: a run from a recipe file, and every mistake in one line."""

import json
from pathlib import Path

import pytest
import yaml

from latteflow.train import on_ray
from latteflow.train.checkpoint import checkpoint_folders
from latteflow.train.guard import TrainingDiverged
from latteflow.train.loop import Progress, Stopped
from toys import toy_recipe

RECIPES = Path(__file__).parents[2] / "recipes" / "emoji-64"


@pytest.fixture
def file(tmp_path, toy_set, parts):
    """Write a toy recipe; returns the function that does."""

    def write(stage="autoencoder"):
        path = tmp_path / f"{stage}.yaml"
        recipe = toy_recipe(stage, tmp_path / "run", toy_set, parts=parts, steps=4, log_every=1, preview_every=2)
        path.write_text(yaml.safe_dump(recipe))
        return path

    return write


@pytest.mark.parametrize("stage", ["autoencoder", "generator"])
def test_trains_prints_where_and_shows_the_loss(latteflow, file, tmp_path, stage):
    outcome = latteflow("train", file(stage))
    assert outcome.code == 0, outcome.err
    assert outcome.out.strip().replace("\n", "") == f"trained weights: {tmp_path / 'run' / 'final'}"
    assert f"{stage}: 36 samples" in outcome.err
    assert ("latents and contexts are computed once" in outcome.err) == (stage == "generator")
    assert "step 4" in outcome.err
    assert "loss" in outcome.err
    assert (tmp_path / "run" / "final").is_dir()
    assert (tmp_path / "run" / "previews" / "step-00000002.png").is_file()


def test_run_again_it_resumes(latteflow, file, tmp_path):
    path = file()
    assert latteflow("train", path, "train.checkpoint_every=2").code == 0
    outcome = latteflow("train", path, "train.checkpoint_every=2", "train.steps=6")
    assert outcome.code == 0
    assert "step 6" in outcome.err
    assert "step 2" not in outcome.err
    assert [folder.name[-1] for folder in checkpoint_folders(tmp_path / "run")] == ["4", "6"]
    assert json.loads((tmp_path / "run" / "final" / "recipe.json").read_text())["train"]["steps"] == 6


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.setps=3"], "unknown key 'train.setps': did you mean 'steps'?"),
        (["train.steps=many"], "train.steps: Input should be a valid integer"),
        (["train.steps"], "override 'train.steps' is not of the form key=value"),
        (["data.styles=[crayon]"], "no style 'crayon' in"),
        (["data.path=nowhere"], "no data set in nowhere"),
        (["autoencoder.widths=[8,12]", "autoencoder.layers=[1,1]"], "8 and 12 do not"),
        (["train.learning_rate=1e30", "train.warmup_steps=0"], "lower train.learning_rate"),
    ],
)
def test_a_mistake_is_one_line(latteflow, file, overrides, message):
    outcome = latteflow("train", file(), *overrides)
    assert outcome.code == 2
    assert message in outcome.err.splitlines()[-1]
    assert "Traceback" not in outcome.err


def test_a_mistake_in_the_recipe_leaves_no_output(latteflow, file, tmp_path):
    for override in ("train.setps=3", "data.styles=[crayon]", "autoencoder.layers=[1]"):
        assert latteflow("train", file(), override).mistake
    assert not (tmp_path / "run").exists()


def test_a_missing_recipe_is_named(latteflow, tmp_path):
    assert "no recipe" in latteflow("train", tmp_path / "nowhere.yaml").mistake


def test_a_recipe_that_is_no_yaml_is_named(latteflow, tmp_path):
    (tmp_path / "bad.yaml").write_text("a: [1, 2")
    assert "bad.yaml cannot be read as a recipe" in latteflow("train", tmp_path / "bad.yaml").mistake


def test_a_truncated_checkpoint_is_named_and_the_one_before_is_used(latteflow, file, tmp_path, caplog):
    path = file()
    latteflow("train", path, "train.checkpoint_every=2")
    weights = checkpoint_folders(tmp_path / "run")[-1] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert latteflow("train", path, "train.steps=6").code == 0
    assert f"{weights} has 100 bytes" in caplog.text
    for folder in checkpoint_folders(tmp_path / "run"):
        (folder / "ema.safetensors").unlink()
    outcome = latteflow("train", path, "train.steps=8")
    assert outcome.code == 2
    assert "is whole" in outcome.err.splitlines()[-1]


def test_a_missing_part_is_named(latteflow, file):
    message = latteflow("train", file("generator"), "generator.autoencoder=nowhere").mistake
    assert "no autoencoder in nowhere: train one with" in message


@pytest.fixture
def on_a_pretended_ray(monkeypatch):
    """What ``train_on_ray`` is called with, in its place; ``end`` in it is raised."""
    given = {}

    def pretend(recipe, *, resources, watch):
        given.update(recipe=recipe, resources=resources)
        for group in (0, 1):
            figures = {"samples_per_second": 2.0, f"loss/group-{group}": 0.25}
            watch(group, Progress(3, 4, 0.25, 9.0, figures))
        if "end" in given:
            raise given["end"]
        return Path("where") / "final"

    monkeypatch.setattr(on_ray, "train_on_ray", pretend)
    return given


def test_on_ray_it_shows_every_group(latteflow, file, on_a_pretended_ray):
    outcome = latteflow("train", file("generator"), "--on-ray", "--per-group", "CPU=4, GPU=0.5", "train.steps=7")
    assert outcome.code == 0
    assert outcome.out == "trained weights: where/final\n"
    assert "group 0: loss 0.2500 (0.250) 2/s 0:00:03 left" in outcome.err
    assert "group 1: loss" in outcome.err
    assert on_a_pretended_ray["recipe"].train.steps == 7
    assert on_a_pretended_ray["resources"] == {"CPU": 4.0, "GPU": 0.5}
    assert latteflow("train", file("generator"), "--on-ray").code == 0
    assert on_a_pretended_ray["resources"] == {}


def test_how_a_run_on_ray_ends_is_a_line(latteflow, file, on_a_pretended_ray):
    for mistake in (TrainingDiverged("group 1: step 2"), OSError("Ray gave up: no")):
        on_a_pretended_ray["end"] = mistake
        outcome = latteflow("train", file("generator"), "--on-ray")
        assert outcome.code == 2
        assert outcome.err.splitlines()[-1] == f"latteflow: {mistake}"
        assert "Traceback" not in outcome.err
    on_a_pretended_ray["end"] = Stopped("stopped; start it again")
    outcome = latteflow("train", file("generator"), "--on-ray")
    assert (outcome.code, outcome.out) == (0, "")
    assert "stopped; start it again" in outcome.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--on-ray"], "set generator.shared_io=false, or train them together without Ray"),
        (["--per-group", "CPU=1"], "give --on-ray too"),
        (["--on-ray", "--per-group", "CPU"], "--per-group CPU is not of the form CPU=4,GPU=1"),
        (["--on-ray", "--per-group", "CPU=many"], "--per-group CPU=many is not of the form"),
        (["--on-ray", "--per-group", "CPU=4,GPU=0"], "is not of the form"),
        (["--on-ray", "--per-group", "=4"], "is not of the form"),
    ],
)
def test_a_mistake_about_ray_is_one_line(latteflow, file, words, message):
    assert message in latteflow("train", file("generator"), *words).mistake


def test_resume_never_sees_the_checkpoints_of_groups(latteflow, file, tmp_path, on_a_pretended_ray):
    assert latteflow("train", file("generator"), "--on-ray", "--resume", "never").code == 0
    (tmp_path / "run" / "group-1" / "checkpoints").mkdir(parents=True)
    assert "run holds checkpoints" in latteflow("train", file("generator"), "--on-ray", "--resume", "never").mistake
