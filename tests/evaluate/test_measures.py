"""A whole evaluation on toys: every measure, its figures and their conditions, the files that are left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fidelity_toys import ToyNetwork
from PIL import Image

import toys
from latteflow.data.captioned import load_captioned_images
from latteflow.errors import UserError
from latteflow.evaluate import fidelity, inputs, measures
from latteflow.evaluate.evaluation_recipe import load_evaluation
from latteflow.evaluate.inputs import require_inputs
from latteflow.evaluate.measures import run_evaluation
from latteflow.evaluate.record import FILE, read_evaluation
from latteflow.evaluate.report_page import write_report
from latteflow.pipeline import LatteFlowPipeline
from latteflow.train.classifier import PictureClassifier, classes_of

FILTERS = {"leave_out_groups": [], "leave_out_subgroups": [], "styles": [], "skin_tones": ["none"]}
MEASURES = ["embedded", "fidelity", "understanding", "text-to-image", "compositional", "cost"]


@pytest.fixture(scope="module")
def model(saved_pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated")
    for part in saved_pipeline.iterdir():
        (folder / part.name).symlink_to(part)
    (folder / "recipe.json").write_text(json.dumps({"data": FILTERS}))
    return folder


@pytest.fixture(scope="module")
def judge(toy_set, tmp_path_factory):
    pytest.importorskip("efficientnet_lite_pytorch")
    images = load_captioned_images(toy_set, "train", skin_tones=["none"])
    classifier = PictureClassifier(classes_of(images.records), picture_size=64)
    classifier.start_from(images)
    folder = tmp_path_factory.mktemp("judge") / "judge"
    classifier.save(folder)
    return folder


@pytest.fixture(scope="module")
def small_networks():
    """Six features in place of 1,280, and eight directions: the toy set has 33 pictures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measures, "network_of", lambda recipe, device: ToyNetwork())
        patch.setitem(inputs.FEATURES, "efficientnet-lite0", 6)
        patch.setattr(fidelity, "DIRECTIONS", 8)
        patch.setattr("latteflow.evaluate.fidelity.principal_directions.__defaults__", (8,))
        yield


@pytest.fixture(scope="module")
def options(model, judge, toy_set, tmp_path_factory):
    place = tmp_path_factory.mktemp("evaluation")
    lines = [{"prompt": f"a {colour} <circle>", "tag": "colors"} for colour in ("red", "blue")]
    (place / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {
        "output": str(place / "out"),
        "measures": MEASURES,
        "data": {"path": str(toy_set), "judge": str(judge)},
        "sampling": {"steps": 2, "number": 3, "seeds": [0, 1], "batch_size": 4},
        "fidelity": {"number": 8, "reference_number": 20},
        "text_to_image": {"geneval": {"prompts": str(place / "prompts.jsonl"), "pictures": 1}},
    }


@pytest.fixture(scope="module")
def pipe(model):
    pipe = LatteFlowPipeline.from_pretrained(str(model))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def evaluated(small_networks, model, pipe, options):
    recipe = load_evaluation(str(model), (), options)
    require_inputs(recipe)
    record, shown = run_evaluation(recipe, pipe)
    folder = Path(recipe.output)
    record.write(folder)
    write_report(record, shown, folder)
    return record, shown, folder


def figures(record, measure, of=None):
    return {one.name: one for one in record.figures if one.measure == measure and of in (None, one.of)}


def test_every_measure_leaves_figures_and_results(evaluated):
    record, _, _ = evaluated
    assert list(record.results) == list(record.seconds) == MEASURES
    assert {one.measure for one in record.figures} == set(MEASURES)
    keys = [(one.measure, one.of, one.name) for one in record.figures]
    assert len(set(keys)) == len(keys)


def test_what_is_drawn_is_drawn_without_guidance_too(evaluated):
    record, _, _ = evaluated
    for measure in ("embedded", "fidelity", "text-to-image", "compositional"):
        guided = {one.name for one in record.figures if one.measure == measure and one.of.endswith("guided")}
        without = {one.name for one in record.figures if one.measure == measure and one.of.endswith("without guidance")}
        assert guided == without != set()
        scales = {one.conditions["guidance_scale"] for one in record.figures if one.of.endswith("without guidance")}
        assert scales == {1.0}
    sets = (record.results["embedded"], record.results["embedded"]["without_guidance"])
    assert sets[0]["features"]["drawn"] != sets[1]["features"]["drawn"]


def test_figures_say_what_they_depend_on(evaluated):
    record, _, _ = evaluated
    for one in record.figures:
        assert {"model", "device", "dtype", "quantization"} <= one.conditions.keys(), one
        if one.of.endswith(("guided", "without guidance")):
            assert one.conditions["steps"] == 2
        if one.measure != "cost" and one.of != "halves of the reference":
            assert "samples" in one.conditions, one
    answers = figures(record, "embedded", "guided")["answers: concept"]
    assert (answers.conditions["samples"], answers.conditions["seeds"]) == (3, [0, 1])
    assert answers.conditions["reference"].startswith("3 held-out pictures (")
    assert figures(record, "embedded", "guided")["judge: style"].conditions["judge"]
    distance = figures(record, "fidelity", "guided")["FD-Toy"]
    assert distance.value == record.results["fidelity"]["guidance 4"]["FD-Toy"]["value"]
    assert {"network": "Toy, 8 pixels", "samples": 8, "reference_samples": 20}.items() <= distance.conditions.items()
    assert figures(record, "fidelity", "halves of the reference")["FD-Toy"].value is not None
    costs = figures(record, "cost")
    assert costs["operations a picture"].conditions["steps"] == 2
    assert "steps" not in costs["operations a step"].conditions


def test_figures_are_the_measures_own(evaluated):
    record, _, _ = evaluated
    score = record.results["fidelity"]["guidance 4"]["IS-Toy"]
    one = figures(record, "fidelity", "guided")["IS-Toy"]
    assert score["splits"] > 1
    assert (one.lowest, one.value, one.highest) == (
        score["value"] - score["spread"],
        score["value"],
        score["value"] + score["spread"],
    )
    found, drawn = record.results["embedded"], figures(record, "embedded", "guided")
    spread = found["features"]["drawn"]["frechet"]
    one = drawn["features: frechet"]
    assert (one.value, one.lowest, one.highest) == (spread["mean"], spread["lowest"], spread["highest"])
    assert figures(record, "embedded", "real pictures")["reconstruction"].value == found["autoencoder_psnr_db"]
    assert figures(record, "understanding", "both")["different answers"].value == 0
    assert (
        figures(record, "compositional", "unseen pairs, real")["judge: both"].value
        == (record.results["compositional"]["guidance 4"]["unseen"]["real"]["both"])
    )
    assert figures(record, "cost")["active parameters"].value == record.results["cost"]["active_parameters"]
    geneval = figures(record, "text-to-image", "guided")["GenEval"]
    assert geneval.value is None
    assert "no scorer is named" in geneval.why


def test_the_files_hold_all_of_it(evaluated, pipe):
    record, _, folder = evaluated
    assert read_evaluation(folder / FILE) == record
    here = record.environment
    assert {
        "latteflow",
        "torch",
        "transformers",
        "diffusers",
        "python",
        "processor",
        "commit",
        "compiled",
        "weights",
    } <= here.keys()
    other = toys.toy_pipeline()
    toys.shake(other.vae, toys.seeded(9))
    assert measures._weights(pipe) == here["weights"] != measures._weights(other)
    page = (folder / "report.html").read_text()
    assert "a red &lt;circle&gt;" in page
    assert "<circle>" not in page
    assert (folder / "report.md").read_text().count("\n") > len(record.figures)
    assert (folder / "geneval" / "guidance-1" / "00001" / "samples" / "0000.png").is_file()


def test_pictures_stand_beside_each_other(evaluated):
    _, shown, folder = evaluated
    kinds = {one.measure: set(one.pictures) for one in shown}
    assert kinds["embedded"] == {"real", "guided", "without guidance"}
    assert kinds["fidelity"] == kinds["GenEval"] == {"guided", "without guidance"}
    first = next(one for one in shown if one.measure == "GenEval")
    with Image.open(folder / "geneval" / "guidance-4" / "00000" / "samples" / "0000.png") as picture:
        assert first.pictures["guided"].tobytes() == picture.tobytes()


def test_what_is_drawn_already_is_not_drawn_again(evaluated, model, pipe, options, small_networks, monkeypatch):
    record, _, _ = evaluated
    again = load_evaluation(str(model), (), {**options, "measures": ["fidelity", "text-to-image"]})

    def drawing(*_, **__):
        raise AssertionError("drawn again")

    monkeypatch.setattr(LatteFlowPipeline, "__call__", drawing)
    said = []
    found, _ = run_evaluation(again, pipe, said.append)
    assert found.results["fidelity"] == record.results["fidelity"]
    assert "8 of 8 drawings, guidance 4" in said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"path": "nowhere"}}, "no data set in nowhere"),
        ({"data": {"judge": "nowhere"}}, "no judge in nowhere"),
        ({"fidelity": {"number": 6}}, "fidelity.number=6: efficientnet-lite0 has 6 features"),
        ({"fidelity": {"reference": "nowhere.npz"}}, "no reference nowhere.npz"),
        ({"network": {"kind": "inception", "weights": "w.pth"}, "fidelity": {"number": 3000}}, "no file w.pth"),
        ({"data": {"class_names": "nowhere.txt"}}, "class names nowhere.txt cannot be read"),
        ({"text_to_image": {"geneval": {"prompts": "nowhere"}}}, "no nowhere: give GenEval's"),
        ({"text_to_image": {"dpg": {"prompts": "nowhere"}}}, "no .txt files in nowhere"),
        (
            {"text_to_image": {"geneval": {"scorer": {"checkout": "nowhere", "detector": "d"}}}},
            "no folder nowhere: give a checkout",
        ),
        ({"output": "blocked/out"}, "blocked/out cannot be made"),
    ],
)
def test_what_is_missing_is_named_before_anything_is_drawn(
    small_networks, model, options, tmp_path, monkeypatch, changes, message
):
    monkeypatch.chdir(tmp_path)
    Path("blocked").write_text("a file")
    merged = {**options}
    for name, value in changes.items():
        merged[name] = {**merged.get(name, {}), **value} if isinstance(value, dict) else value
    if "scorer" in str(changes):
        merged["text_to_image"] = {
            "geneval": {**options["text_to_image"]["geneval"], **changes["text_to_image"]["geneval"]}
        }
    with pytest.raises(UserError) as caught:
        require_inputs(load_evaluation(str(model), (), merged))
    assert message in str(caught.value)


def test_compositional_without_any_judge_says_how_to_train_one(model, options, tmp_path, monkeypatch, small_networks):
    monkeypatch.chdir(tmp_path)
    recipe = load_evaluation(
        str(model), (), {**options, "data": {"path": options["data"]["path"]}, "measures": ["compositional"]}
    )
    with pytest.raises(UserError, match=r"no judge in .*: train one with"):
        require_inputs(recipe)


def test_a_reference_of_another_size_is_refused_before_anything_is_drawn(
    model, pipe, options, tmp_path, small_networks, monkeypatch
):
    from fidelity_toys import pictures

    from latteflow.evaluate.picture_arrays import write_pictures

    write_pictures(tmp_path / "large.npz", [pictures(9, size=(64, 64))], 9)
    monkeypatch.setattr(LatteFlowPipeline, "__call__", None)
    changes = {
        "output": str(tmp_path / "out"),  # where nothing is drawn yet
        "measures": ["fidelity"],
        "fidelity": {"number": 8, "reference": str(tmp_path / "large.npz")},
    }
    recipe = load_evaluation(str(model), (), {**options, **changes})
    require_inputs(recipe)
    with pytest.raises(UserError, match="take a reference of the same resolution"):
        run_evaluation(recipe, pipe)


def test_a_reference_file_can_be_taken(model, pipe, options, tmp_path, small_networks, toy_set):
    from latteflow.evaluate.picture_arrays import write_pictures

    images = load_captioned_images(toy_set, "train", skin_tones=["none"])
    write_pictures(tmp_path / "real.npz", [images.pixels], len(images))
    (tmp_path / "classes.txt").write_text("n0 red circle\nn1 blue square, box\n")
    changes = {
        "output": str(tmp_path / "out"),
        "measures": ["fidelity"],
        "data": {"class_names": str(tmp_path / "classes.txt")},
        "fidelity": {"number": 8, "reference": str(tmp_path / "real.npz")},
    }
    record, shown = run_evaluation(load_evaluation(str(model), (), {**options, **changes}), pipe)
    assert [one.prompt for one in shown] == ["red circle", "blue square"] * 4
    found = figures(record, "fidelity", "guided")["FD-Toy"].conditions
    assert (found["reference"], found["reference_samples"]) == ("real.npz", len(images))
    assert len(found["reference_sha256"]) == 12
