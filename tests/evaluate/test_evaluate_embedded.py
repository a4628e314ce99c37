"""The embedded model's evaluation, on toys."""

from __future__ import annotations

import json

import pytest

import toys
from latteflow.data.captioned import load_captioned_images
from latteflow.errors import UserError
from latteflow.evaluate.embedded import evaluate_embedded, judged_shares
from latteflow.train.classifier import PictureClassifier, classes_of

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


@pytest.fixture(scope="module")
def judge(toy_set):
    """A judge that was not trained, but starts from the training pictures' means."""
    pytest.importorskip("efficientnet_lite_pytorch")
    images = load_captioned_images(toy_set, "train", skin_tones=["none"])
    classifier = PictureClassifier(classes_of(images.records), picture_size=64)
    classifier.start_from(images)
    return classifier


def test_the_judge_and_the_features_stand_beside_real_pictures(toy_set, model_folder, judge, tmp_path, monkeypatch):
    judge.save(tmp_path / "judge")
    monkeypatch.setattr("latteflow.evaluate.fidelity.DIRECTIONS", 8)
    monkeypatch.setattr("latteflow.evaluate.fidelity.principal_directions.__defaults__", (8,))
    results = _evaluate(toys.toy_pipeline(), model_folder, toy_set, judge=tmp_path / "judge")
    heldout = load_captioned_images(toy_set, "heldout", skin_tones=["none"])
    assert results["judge"]["real"] == judged_shares(judge, heldout.spread(4), heldout.spread(4).pixels)
    assert results["judge"]["real"]["judged"] == len(heldout)
    for name, keys in (
        ("judge", {"concept", "concept_top5", "style", "category", "judged"}),
        ("features", {"frechet", "kernel"}),
    ):
        drawn = results[name]["drawn"]
        assert results[name]["real"].keys() == drawn.keys() == keys
        assert all(value["lowest"] <= value["mean"] <= value["highest"] for value in drawn.values())
    features = results["features"]
    assert features["drawn"]["frechet"]["mean"] > features["real"]["frechet"]
    assert features["drawn_by_real"]["frechet"] == pytest.approx(
        features["drawn"]["frechet"]["mean"] / features["real"]["frechet"]
    )


def test_without_a_judge_nothing_is_said_of_it(toy_set, model_folder):
    assert not {"judge", "features"} & _evaluate(toys.toy_pipeline(), model_folder, toy_set).keys()
    with pytest.raises(UserError, match="no judge in"):
        _evaluate(toys.toy_pipeline(), model_folder, toy_set, judge=model_folder)


def test_the_judge_is_asked_about_what_it_knows(toy_set, judge):
    images = load_captioned_images(toy_set, "train", skin_tones=["none"])
    everything = judged_shares(judge, images, images.pixels)
    assert everything["judged"] == len(images)
    assert everything["concept"] > 0.8
    assert judged_shares(judge, images, images.pixels.roll(1, 0))["concept"] < 0.5
    strange = judge.classes["concept"][0]
    fewer = images.select(lambda record: record.concept != strange)
    judge.classes = {**judge.classes, "concept": ["none", *judge.classes["concept"][1:]]}
    try:
        assert judged_shares(judge, images, images.pixels)["judged"] == len(fewer)
        only = images.select(lambda record: record.concept == strange)
        with pytest.raises(UserError, match="knows none"):
            judged_shares(judge, only, only.pixels)
    finally:
        judge.classes["concept"][0] = strange
