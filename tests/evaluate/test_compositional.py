"""Styles and concepts that were never seen together, on the toy set: what is drawn, how it is judged."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn import functional

import toys
from latteflow.data.captioned import load_captioned_images
from latteflow.errors import UserError
from latteflow.evaluate import compositional
from latteflow.evaluate.compositional import composed_shares, compositional_report
from latteflow.train.classifier import PictureClassifier, class_numbers, classes_of

_DATA = {"leave_out_groups": [], "leave_out_subgroups": [], "styles": [], "skin_tones": ["none"]}


@pytest.fixture(scope="module")
def judge(toy_set):
    """A judge that was not trained, but starts from the training pictures' means."""
    pytest.importorskip("efficientnet_lite_pytorch")
    images = load_captioned_images(toy_set, "train", skin_tones=["none"])
    classifier = PictureClassifier(classes_of(images.records), picture_size=64)
    classifier.start_from(images)
    return classifier


@pytest.fixture(scope="module")
def model(saved_pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("composed")
    for part in saved_pipeline.iterdir():
        (folder / part.name).symlink_to(part)
    (folder / "recipe.json").write_text(json.dumps({"data": _DATA}))
    return folder


@pytest.fixture(scope="module")
def judge_folder(judge, tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge") / "judge"
    judge.save(folder)
    return folder


def test_pairs_of_both_kinds_are_judged(model, toy_set, judge_folder, judge, monkeypatch):
    drawn = []
    real = compositional.drawings_of

    def counted(pipe, part, seed, **sampling):
        drawn.append((seed, sampling, {(record.label, record.style) for record in part.records}))
        return real(pipe, part, seed, **sampling)

    monkeypatch.setattr(compositional, "drawings_of", counted)
    report = compositional_report(str(model), toy_set, judge_folder, drawings=8, steps=2, seeds=(0, 5))
    assert json.loads(json.dumps(report)) == report
    unseen, seen = drawn[0][2], drawn[2][2]
    assert unseen == toys.HELD_OUT
    assert not unseen & seen
    concepts, styles = ({pair[i] for pair in unseen} for i in (0, 1))
    assert all(label in concepts and style in styles for label, style in seen)
    assert [one[0] for one in drawn] == [0, 5, 0, 5]
    assert all(one[1] == {"num_inference_steps": 2, "guidance_scale": 4.0} for one in drawn)
    assert report["conditions"]["drawings"] == {"unseen": 3, "seen": 6}
    heldout = load_captioned_images(toy_set, "heldout", skin_tones=["none"])
    assert report["unseen"]["real"] == composed_shares(judge, heldout, heldout.pixels)
    for kind in ("unseen", "seen"):
        assert report[kind]["drawn"].keys() == {"concept", "style", "both", "judged"}
        for spread in report[kind]["drawn"].values():
            assert spread["lowest"] <= spread["mean"] <= spread["highest"]


def test_both_have_to_be_right_in_one_picture(judge, toy_set, monkeypatch):
    images = load_captioned_images(toy_set, "train", skin_tones=["none"]).spread(4)
    wanted = class_numbers(images.records, judge.classes)
    right = {"concept": [True, True, True, False], "style": [True, False, False, True], "group": [True] * 4}

    def scores(judge, pixels):
        assert len(pixels) == 4
        return {
            key: torch.stack(
                [
                    functional.one_hot(
                        number if hit else (number + 1) % len(judge.classes[key]), len(judge.classes[key])
                    )
                    for number, hit in zip(wanted[key], right[key], strict=True)
                ]
            ).float()
            for key in right
        }

    monkeypatch.setattr(compositional, "classified", scores)
    shares = composed_shares(judge, images, images.pixels)
    assert shares == {"concept": 0.75, "style": 0.5, "both": 0.25, "judged": 4}


def test_a_judge_of_other_pictures_is_refused(judge, toy_set, monkeypatch):
    images = load_captioned_images(toy_set, "heldout", skin_tones=["none"])
    monkeypatch.setattr(judge, "classes", {**judge.classes, "concept": ["none"] * len(judge.classes["concept"])})
    with pytest.raises(UserError, match="knows none of these pairs"):
        composed_shares(judge, images, images.pixels)


def test_a_pair_that_was_trained_on_is_no_composition(toy_set):
    heldout, train = (load_captioned_images(toy_set, split, skin_tones=["none"]) for split in ("heldout", "train"))
    with pytest.raises(UserError, match="is held out and trained on"):
        compositional._seen_pairs(heldout, train.joined(heldout.spread(1)))
    strange = train.select(lambda record: record.concept not in {one.concept for one in heldout.records})
    with pytest.raises(UserError, match="nothing to compose"):
        compositional._seen_pairs(heldout, strange)
