"""``latteflow evaluate``: recipes, --compare, --cost, and what is refused in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

FILTERS = {"leave_out_groups": [], "leave_out_subgroups": [], "styles": [], "skin_tones": []}
FIDELITY = ("measures=[fidelity]", "data.class_names=names.txt", "fidelity.reference=no.npz")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def model(saved_pipeline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where no judge is found
    folder = shutil.copytree(saved_pipeline, tmp_path / "model")
    (folder / "recipe.json").write_text(json.dumps({"data": FILTERS}))
    return folder


def recipe(folder, **changes):
    values = {
        "stage": "evaluation",
        "model": str(folder / "model"),
        "output": str(folder / "out"),
        "measures": ["cost"],
        "sampling": {"steps": 2, "number": 2, "seeds": [0]},
    }
    file = folder / "evaluation.yaml"
    file.write_text(yaml.safe_dump({**values, **changes}))
    return file


def evaluation(latteflow, folder, name, *words):
    outcome = latteflow("evaluate", recipe(folder), "--out", folder / name, *words)
    assert outcome.code == 0, outcome.err
    return folder / name / "evaluation.json"


def test_a_recipe_prints_its_figures_and_leaves_a_report(latteflow, model, toy_set, tmp_path):
    file = recipe(tmp_path, measures=["embedded", "cost"], data={"path": str(toy_set)})
    outcome = latteflow("evaluate", file, "sampling.number=3", "--steps", 3)
    assert outcome.code == 0, outcome.err
    for words in ("embedded (", "without guidance", "reconstruction", "cost (", "active parameters"):
        assert words in outcome.out
    record = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert (record["config"]["sampling"]["number"], record["config"]["sampling"]["steps"]) == (3, 3)
    assert record["config"]["measures"] == ["embedded", "cost"]
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"evaluation.json", "report.html", "report.md"}
    for name in ("evaluation.json", "report.html", "report.md"):
        assert f"wrote {tmp_path / 'out' / name}" in outcome.err


def test_json_of_a_recipe_is_the_record(latteflow, model, tmp_path):
    outcome = latteflow("evaluate", recipe(tmp_path), "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out) == json.loads((tmp_path / "out" / "evaluation.json").read_text())


def test_a_model_leaves_a_report_where_models_usually_do(latteflow, model, toy_set, tmp_path):
    words = ("--data", toy_set, "--drawings", 2, "--steps", 2, "--seeds", 1, "--guidance", 2)
    outcome = latteflow("evaluate", "model", *words)
    assert outcome.code == 0, outcome.err
    assert outcome.out.count("drawn, then asked") == 2
    assert "without guidance:" in outcome.out
    record = json.loads((tmp_path / "runs" / "evaluation" / "model" / "evaluation.json").read_text())
    assert record["config"]["sampling"]["guidance_scale"] == 2
    assert set(record["results"]) == {"embedded", "cost"}


def test_two_evaluations_are_compared(latteflow, model, tmp_path):
    one = evaluation(latteflow, tmp_path, "one")
    alike = evaluation(latteflow, tmp_path, "alike")
    longer = evaluation(latteflow, tmp_path, "longer", "--steps", 5)
    other = evaluation(latteflow, tmp_path, "other", "--steps", 5, "--dtype", "bfloat16")
    outcome = latteflow("evaluate", "--compare", one, alike)
    assert outcome.code == 0, outcome.err
    assert "10 of 10 figures can be compared" in outcome.out
    assert "9 of 10 figures" in latteflow("evaluate", "--compare", one, longer).out  # of which one depends on steps
    outcome = latteflow("evaluate", "--compare", one, other)
    assert "0 of 10 figures can be compared" in outcome.out
    assert "not comparable: dtype float32 / bfloat16, steps 2 / 5" in outcome.out
    assert "sampling.steps: 2 / 5" in outcome.out
    values = json.loads(latteflow("evaluate", "--compare", one, other, "--json").out)
    assert values["differing"]["dtype"] == [None, "bfloat16"]
    assert values["differing"]["output"] == [str(one.parent), str(other.parent)]


def test_costs_are_tabled_without_a_model(latteflow):
    outcome = latteflow("evaluate", "--cost", "smolvlm-256m")
    assert outcome.code == 0, outcome.err
    page = (ROOT / "benchmarks" / "results" / "cost.md").read_text(encoding="utf-8").splitlines()
    assert set(outcome.out.splitlines()) <= set(page)
    assert outcome.out.count("| smolvlm-256m") == 2
    rows = json.loads(latteflow("evaluate", "--cost", "smolvlm-256m", "--json").out)
    assert [(row["preset"], row["groups"]) for row in rows] == [("smolvlm-256m", 5), ("smolvlm-256m", 1)]
    assert rows[0]["image_flops"] > rows[0]["step_flops"] * 40


def test_the_cost_page_names_its_command(latteflow):
    page = (ROOT / "benchmarks" / "results" / "cost.md").read_text(encoding="utf-8")
    assert "`latteflow evaluate --cost`" in page


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere.yaml"], "no recipe nowhere.yaml"),
        (["nowhere"], "no model 'nowhere'"),
        (["broken.yaml"], "broken.yaml cannot be read as a recipe"),
        (["evaluation.yaml", "measures=[beauty]"], "measures.0: Input should be"),
        (["evaluation.yaml", "sampling.stesp=3"], "did you mean 'steps'?"),
        (["evaluation.yaml", "--steps", "0"], "sampling.steps: Input should be greater than or equal to 1"),
        (["evaluation.yaml", "--guidance", "0"], "sampling.guidance_scale"),
        (["evaluation.yaml", "--seeds", "0"], "--seeds has to be 1 or more: got 0"),
        (["evaluation.yaml", "dtype=int4"], "there is no dtype 'int4': give float32, bfloat16, float16"),
        (["evaluation.yaml", "quantize=int4"], "there is no quantization 'int4': give int8 or fp8"),
        (["evaluation.yaml", "device=gpu"], "device 'gpu' is not to be had here"),
        (["evaluation.yaml", "measures=[embedded]"], "no data set in data/emoji"),
        (["evaluation.yaml", *FIDELITY], "no reference no.npz: give an .npz file"),
        (["evaluation.yaml", "--inception", "no.pth", "fidelity.number=3000", *FIDELITY], "no file no.pth"),
        (["--compare", "broken.yaml", "broken.yaml"], "broken.yaml is not JSON"),
        (["--compare", "other.json", "other.json"], "other.json is no evaluation.json of this version"),
        (["--compare", "no.json", "other.json"], "no.json cannot be read"),
        (["emoji-64", "--compare", "a.json", "b.json"], "leave 'emoji-64' out"),
        (["--cost", "--compare", "a.json", "b.json"], "give one of them"),
        (["--cost", "--steps", "3"], "no other option but --json"),
        (["--cost", "gpt-5"], "no preset 'gpt-5'"),
    ],
)
def test_what_cannot_be_is_one_line(latteflow, model, tmp_path, words, message):
    recipe(tmp_path)
    (tmp_path / "broken.yaml").write_text("a: [1, 2")
    (tmp_path / "other.json").write_text('{"model": "emoji-64"}')
    (tmp_path / "names.txt").write_text("n0 tench\n")
    assert message in latteflow("evaluate", *words).mistake
    assert not list(tmp_path.glob("runs/**/*.json"))
    assert not (tmp_path / "out" / "evaluation.json").exists()
