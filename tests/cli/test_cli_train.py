"""``latteflow train``: a run from a recipe file, and every mistake in one line."""

import json
from pathlib import Path

import pytest
import yaml

from latteflow.train.checkpoint import checkpoint_folders
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
