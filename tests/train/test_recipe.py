"""Recipes: every one in the repository loads, and every mistake is named with its remedy."""

from pathlib import Path

import pytest
import yaml

from latteflow.errors import UserError
from latteflow.train.recipe import (
    AutoencoderRecipe,
    BackboneRecipe,
    ClassifierRecipe,
    GeneratorRecipe,
    VisionRecipe,
    load_recipe,
    resolved,
)
from toys import toy_recipe

RECIPES = sorted(
    path for path in (Path(__file__).parents[2] / "recipes").rglob("*.yaml") if path.parent.name != "evaluation"
)
KINDS = {
    "autoencoder": AutoencoderRecipe,
    "classifier": ClassifierRecipe,
    "vision": VisionRecipe,
    "backbone": BackboneRecipe,
    "generator": GeneratorRecipe,
}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "recipe.yaml"
    smoke = {"train": {"steps": 2}, "output": "elsewhere"}
    path.write_text(yaml.safe_dump({**toy_recipe("autoencoder", Path("out"), Path("set")), "smoke": smoke}))
    return path


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: "/".join(path.parts[-2:]))
def test_every_recipe_loads_in_full_and_for_a_short_run(path):
    full, smoke = load_recipe(path), load_recipe(path, ["smoke=true"])
    assert type(full) is type(smoke) is KINDS[full.stage]
    assert smoke.train.steps < full.train.steps
    assert smoke.output != full.output  # a short run must not resume, or overwrite, the real one
    assert full.train.checkpoint_every <= full.train.steps


def test_every_stage_has_a_recipe():
    assert {load_recipe(path).stage for path in RECIPES} == set(KINDS)


def test_overrides_come_last(file):
    recipe = load_recipe(file, ["train.steps=7", "train.learning_rate=2e-4", "data.styles=[noto,twemoji]"])
    assert recipe.train.steps == 7
    assert recipe.train.learning_rate == 2e-4
    assert recipe.data.styles == ("noto", "twemoji")
    assert recipe.output == "out"
    short = load_recipe(file, ["train.steps=7", "smoke=true"])
    assert (short.train.steps, short.output) == (7, "elsewhere")
    assert load_recipe(file, ["smoke=false"]).train.steps == 20


def test_a_recipe_cannot_be_changed_and_is_written_out_whole(file):
    recipe = load_recipe(file)
    with pytest.raises(ValueError, match="frozen"):
        recipe.train.steps = 3
    written = resolved(recipe)
    assert written["train"]["gradient_clip"] == 1.0
    again = file.with_name("again.yaml")
    again.write_text(yaml.safe_dump(written))
    assert load_recipe(again) == recipe


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.setps=3", "unknown key 'train.setps': did you mean 'steps'?"),
        ("autoencoder.latent_chanels=3", "unknown key 'autoencoder.latent_chanels': did you mean 'latent_channels'?"),
        ("zzzz=3", "unknown key 'zzzz'"),
        ("generator.num_groups=3", "unknown key 'generator'"),
        ("train.steps=many", "train.steps: Input should be a valid integer"),
        ("train.steps=0", "train.steps: Input should be greater than 0 (given: 0)"),
        ("train.steps=2.5", "train.steps: Input should be a valid integer"),
        ("train.schedule=linear", "train.schedule: Input should be 'constant' or 'cosine' (given: 'linear')"),
        ("train.learning_rate=-1", "train.learning_rate: Input should be greater than 0"),
        ("train.learning_rate=.nan", "train.learning_rate"),
        ("train=5", "train"),
        ("stage=painter", "'painter'"),
        ("train.steps", "override 'train.steps' is not of the form key=value"),
        ("=3", "override '=3' is not of the form key=value"),
        ("train.steps=[1", "cannot be read as a recipe"),
        ("output=${nowhere}", "cannot be read as a recipe"),
        ("train.gradient_accumulation_steps=9", "gradient_accumulation_steps"),
    ],
)
def test_a_wrong_override_is_named_in_one_line(file, override, message):
    with pytest.raises(UserError) as caught:
        load_recipe(file, [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [1, 2", "cannot be read as a recipe"),
        ("\tstage: autoencoder", "cannot be read as a recipe"),
        ("- 1\n- 2\n", "its top level has to be keys and values"),
        ("just words", "recipe"),
        ("", "stage"),
        ("stage: autoencoder\noutput: x\n", "train: Field required"),
        ("stage: autoencoder\ntrain: {steps: 1, batch_size: 1}\n", "output: Field required"),
        (b"\xff\xfe\x00\x01", "cannot be read as a recipe"),
    ],
)
def test_a_file_that_is_no_recipe_is_named_in_one_line(tmp_path, content, message):
    file = tmp_path / "broken.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        load_recipe(file)
    assert str(caught.value).startswith(str(file))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no recipe .*nowhere\.yaml: give the path of a YAML file"):
        load_recipe(tmp_path / "nowhere.yaml")
    with pytest.raises(UserError, match="no recipe"):
        load_recipe(tmp_path)
