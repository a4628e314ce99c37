"""The embedded model's evaluation, on toys."""

from __future__ import annotations

import json

import pytest

import toys
from latteflow.data.captioned import load_captioned_images
from latteflow.errors import UserError
from latteflow.evaluate.embedded import evaluate_embedded

_DATA = {"leave_out_groups": [], "leave_out_subgroups": [], "styles": [], "skin_tones": ["none"]}


@pytest.fixture
def model_folder(tmp_path):
    (tmp_path / "recipe.json").write_text(json.dumps({"data": _DATA}))
    return tmp_path


def _evaluate(pipe, folder, data, **settings):
    return evaluate_embedded(pipe, folder, data, drawings=4, steps=2, seeds=(0, 1), **settings)


def test_an_untrained_model_names_nothing(toy_set, model_folder):
    results = _evaluate(toys.toy_pipeline(), model_folder, toy_set)
    assert results["understanding"]["concept"] == 0
    assert results["drawn_then_asked"]["concept"] == {"mean": 0, "lowest": 0, "highest": 0}
    assert results["conditions"]["seeds"] == [0, 1]


def test_right_answers_are_counted(toy_set, model_folder, monkeypatch):
    heldout = load_captioned_images(toy_set, "heldout", skin_tones=["none"])
    label = heldout.records[0].label
    share = sum(record.label == label for record in heldout.records) / len(heldout)
    monkeypatch.setattr(
        "latteflow.evaluate.embedded.greedy_answers",
        lambda backbone, processor, images, question, max_new_tokens: [label.upper()] * len(images),
    )
    results = _evaluate(toys.toy_pipeline(), model_folder, toy_set)
    assert results["understanding"] == {"concept": share, "style": 0, "category": 0}
    assert 0 < share < 1


def test_the_recipe_decides_what_is_measured(toy_set, model_folder):
    everything = _evaluate(toys.toy_pipeline(), model_folder, toy_set)["conditions"]["heldout_pictures"]
    style = load_captioned_images(toy_set, "heldout").records[0].style
    (model_folder / "recipe.json").write_text(json.dumps({"data": {**_DATA, "styles": [style]}}))
    fewer = _evaluate(toys.toy_pipeline(), model_folder, toy_set)["conditions"]["heldout_pictures"]
    assert 0 < fewer < everything


def test_a_folder_without_recipe_is_refused(toy_set, tmp_path):
    with pytest.raises(UserError, match=r"recipe\.json"):
        _evaluate(toys.toy_pipeline(), tmp_path, toy_set)
