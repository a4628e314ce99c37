"""Evaluation recipes: those in the repository load, targets mean what they should, every mistake is one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from latteflow.errors import UserError
from latteflow.evaluate.evaluation_recipe import EvaluationRecipe, load_evaluation
from latteflow.train.recipe import resolved
from toys import toy_recipe

ROOT = Path(__file__).parents[2] / "recipes"
RECIPES = sorted((ROOT / "evaluation").glob("*.yaml"))
VALUES = {"stage": "evaluation", "model": "emoji-64", "output": "out", "measures": ["cost"]}


def written(folder, **changes):
    file = folder / "evaluation.yaml"
    file.write_text(yaml.safe_dump({**VALUES, **changes}))
    return str(file)


def refused(target, overrides=(), options=None):
    with pytest.raises(UserError) as caught:
        load_evaluation(str(target), overrides, options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_in_full_and_for_a_short_run(path):
    weights = {"network": {"weights": "w.pth"}}
    full, smoke = load_evaluation(str(path), (), weights), load_evaluation(str(path), ["smoke=true"], weights)
    assert full.output != smoke.output
    assert smoke.model == "emoji-64"
    assert "cost" in full.measures


def test_the_recipes_ask_for_every_measure():
    weights = {"network": {"weights": "w.pth"}}
    asked = {measure for path in RECIPES for measure in load_evaluation(str(path), (), weights).measures}
    assert asked == {"embedded", "fidelity", "understanding", "text-to-image", "compositional", "cost"}


def test_a_model_is_measured_in_the_usual_way():
    recipe = load_evaluation("emoji-64")
    assert (recipe.model, recipe.output) == ("emoji-64", str(Path("runs/evaluation/emoji-64")))
    assert recipe.measures == ("embedded", "cost")
    assert recipe.sampling.guidance_scales == (4.0, 1.0)
    folders = {load_evaluation(name).output for name in ("runs/a/final", "runs/b/final", "/runs/c/final", "owner/name")}
    assert len(folders) == 4
    assert all(Path(folder).parent == Path("runs/evaluation") for folder in folders)


def test_options_come_after_overrides_and_those_after_the_recipe(tmp_path):
    file = written(tmp_path, sampling={"steps": 3, "number": 5}, smoke={"sampling": {"steps": 1}})
    assert load_evaluation(file).sampling.steps == 3
    assert load_evaluation(file, ["smoke=true"]).sampling.steps == 1
    recipe = load_evaluation(file, ["sampling.steps=7", "sampling.guidance_scale=2"], {"sampling": {"steps": 9}})
    assert (recipe.sampling.steps, recipe.sampling.guidance_scale, recipe.sampling.number) == (9, 2.0, 5)
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(resolved(recipe)))
    assert load_evaluation(str(again)) == recipe


def test_without_guidance_is_not_measured_twice(tmp_path):
    assert load_evaluation(written(tmp_path, sampling={"guidance_scale": 1})).sampling.guidance_scales == (1.0,)


def test_a_training_recipe_means_what_it_has_written(tmp_path):
    values = toy_recipe("generator", tmp_path / "run", tmp_path / "set", parts=tmp_path)
    file = tmp_path / "generator.yaml"
    file.write_text(yaml.safe_dump({**values, "smoke": {"output": str(tmp_path / "short")}}))
    assert "holds no model yet: run `latteflow train" in refused(file)
    for run in ("run", "short"):
        (tmp_path / run / "final").mkdir(parents=True)
        (tmp_path / run / "final" / "model_index.json").write_text("{}")
    recipe = load_evaluation(str(file), (), {"sampling": {"steps": 2}})
    assert recipe.model == str(tmp_path / "run" / "final")
    assert recipe.output == str(tmp_path / "run" / "evaluation")
    assert (recipe.data.path, recipe.sampling.steps) == (str(tmp_path / "set"), 2)
    assert recipe.measures == EvaluationRecipe.model_fields["measures"].default
    assert load_evaluation(str(file), ["smoke=true"]).model == str(tmp_path / "short" / "final")


def test_a_training_recipe_without_a_model_or_a_usual_measure_is_refused():
    assert "trains a part (stage autoencoder)" in refused(ROOT / "emoji-64" / "autoencoder.yaml")
    assert "data of kind image_folder" in refused(ROOT / "imagenet-256" / "generator.yaml")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["measures=[beauty]"], "measures.0: Input should be 'embedded', 'fidelity'"),
        (["measures=[]"], "measures: Tuple should have at least 1 item"),
        (["sampling.setps=3"], "unknown key 'sampling.setps': did you mean 'steps'?"),
        (["sampling.steps=0"], "sampling.steps: Input should be greater than or equal to 1 (given: 0)"),
        (["sampling.guidance_scale=.nan"], "sampling.guidance_scale"),
        (["sampling.seeds=[]"], "sampling.seeds"),
        (["model="], "model"),
        (["network.kind=vgg"], "network.kind: Input should be"),
        (
            ["measures=[fidelity]", "network.kind=inception"],
            "network.kind inception needs its weights: give --inception",
        ),
        (["measures=[fidelity]", "sampling.guidance_scale=1"], "with guidance and without: give a"),
        (["measures=[text-to-image]"], "text-to-image needs prompts"),
        (["measures=[fidelity]", "quantize=int8"], "leave quantize out"),
        (["measures=[understanding]", "quantize=int8"], "leave quantize out"),
        (["text_to_image.geneval.prompts=p", "text_to_image.geneval.scorer.checkout=c"], "scorer needs its detector"),
        (["steps"], "override 'steps' is not of the form key=value"),
        (["output=${nowhere}"], "cannot be read as a recipe"),
    ],
)
def test_a_wrong_value_is_one_line(tmp_path, overrides, message):
    said = refused(written(tmp_path), overrides)
    assert message in said
    assert len(said) < 250 + len(str(tmp_path))


@pytest.mark.parametrize("content", ["a: [1, 2", "- 1\n", "words", "stage: evaluation\n", "stage: paint\n"])
def test_a_file_that_is_no_recipe_is_one_line(tmp_path, content):
    file = tmp_path / "broken.yaml"
    file.write_text(content)
    assert str(file) in refused(file)


def test_a_missing_recipe_is_named(tmp_path):
    assert "no recipe" in refused(tmp_path / "nowhere.yaml")
