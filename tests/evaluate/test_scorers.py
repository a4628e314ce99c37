"""Calling the scorers of GenEval and DPG, with checkouts of stand-ins that take the same arguments."""

from __future__ import annotations

import json
import sys

import pytest
from PIL import Image

from latteflow.errors import UserError
from latteflow.evaluate.scorers import dpg_summary, geneval_summary, score_dpg, score_geneval

GENEVAL = """
import argparse, json, os
from pathlib import Path
parser = argparse.ArgumentParser()
parser.add_argument("imagedir")
parser.add_argument("--outfile")
parser.add_argument("--model-path")
options = parser.parse_args()
assert Path("object_names.txt").is_file() and Path(options.model_path).is_dir()
with open(options.outfile, "w") as file:
    for sub in sorted(os.listdir(options.imagedir)):
        line = json.loads(Path(options.imagedir, sub, "metadata.jsonl").read_text())
        for name in sorted(os.listdir(Path(options.imagedir, sub, "samples"))):
            correct = line["tag"] == "colors" or name == "0001.png"
            verdict = {"tag": line["tag"], "correct": correct, "metadata": json.dumps(line)}
            file.write(json.dumps(verdict) + "\\n")
"""
DPG = """
import argparse, os
parser = argparse.ArgumentParser()
for name in ("image-root-path", "csv", "res-path", "vqa-model"):
    parser.add_argument("--" + name)
for name in ("resolution", "pic-num"):
    parser.add_argument("--" + name, type=int)
options = parser.parse_args()
assert options.vqa_model == "mplug" and options.pic_num == 4 and os.path.isfile(options.csv)
assert options.res_path.endswith(".txt")
open(options.res_path, "w").close()
print("Start to conduct evaluation of x")
for name in os.listdir(options.image_root_path):
    if name.startswith("bad"):
        print("Failed filename:", name, "'NoneType' object is not subscriptable")
print("L1 category scores:\\n\\tentity: 87.5\\n\\tother: 50.0\\nL2 category scores:\\n\\tentity - whole: 12.5")
print(f"Save results to: {options.res_path}\\nDPG-Bench score: {options.resolution + 0.25}")
"""


@pytest.fixture
def geneval(tmp_path):
    """A checkout, and pictures of two prompts."""
    tmp_path = tmp_path / "of-geneval"
    place = tmp_path / "geneval" / "evaluation"
    place.mkdir(parents=True)
    (place / "evaluate_images.py").write_text(GENEVAL)
    (place / "object_names.txt").write_text("bench\n")
    (tmp_path / "detector").mkdir()
    for number, tag in enumerate(("single_object", "colors")):
        samples = tmp_path / "pictures" / f"{number:05d}" / "samples"
        samples.mkdir(parents=True)
        (samples.parent / "metadata.jsonl").write_text(json.dumps({"tag": tag, "prompt": tag}))
        for name in ("0000.png", "0001.png"):
            Image.new("RGB", (8, 8)).save(samples / name)
    return tmp_path


@pytest.fixture
def dpg(tmp_path):
    """A checkout, and two grids."""
    tmp_path = tmp_path / "of-dpg"
    place = tmp_path / "ella" / "dpg_bench"
    place.mkdir(parents=True)
    (place / "compute_dpg_bench.py").write_text(DPG)
    (place / "dpg_bench.csv").write_text("item_id\n")
    (tmp_path / "pictures").mkdir()
    for name in ("1.png", "256.png"):
        Image.new("RGB", (64, 64)).save(tmp_path / "pictures" / name)
    return tmp_path


def run_geneval(place, **changes):
    given = {"pictures": place / "pictures", "checkout": place / "geneval", "detector": place / "detector"}
    given |= {"results": place / "results" / "verdicts.jsonl", "python": sys.executable, **changes}
    return score_geneval(**given)


def run_dpg(place, **changes):
    given = {"pictures": place / "pictures", "checkout": place / "ella", "results": place / "verdicts.txt"}
    return score_dpg(**{**given, "python": sys.executable, **changes})


def test_geneval_s_scores(geneval):
    assert run_geneval(geneval) == {
        "images": 4,
        "tasks": {"single_object": 0.5, "colors": 1.0},
        "overall": 0.75,
        "prompts": 1.0,
    }


def test_geneval_s_mean_is_over_tasks_and_a_prompt_is_right_by_one_picture(tmp_path):
    rows = [("a", "1", True), ("a", "1", False), ("a", "2", False), ("a", "2", False), ("b", "3", True)]
    (tmp_path / "r").write_text("\n".join(json.dumps({"tag": t, "metadata": m, "correct": c}) for t, m, c in rows))
    summary = geneval_summary(tmp_path / "r", 5)
    assert summary == {"images": 5, "tasks": {"a": 0.25, "b": 1.0}, "overall": 0.625, "prompts": 2 / 3}


def test_dpg_s_scores(dpg):
    assert run_dpg(dpg) == {"overall": 32.25, "categories": {"entity": 87.5, "other": 50.0}}
    assert sorted(file.name for file in (dpg / "pictures").iterdir()) == ["1.png", "256.png"]


def test_a_scorer_that_is_not_there_is_said_so(geneval, dpg):
    with pytest.raises(UserError, match=r"GenEval's scorer is not there.*djghosh13/geneval"):
        run_geneval(geneval, checkout=geneval / "elsewhere")
    with pytest.raises(UserError, match=r"download_models\.sh"):
        run_geneval(geneval, detector=geneval / "elsewhere")
    with pytest.raises(UserError, match=r"DPG's scorer is not there.*TencentQQGYLab/ELLA"):
        run_dpg(dpg, checkout=dpg / "elsewhere")
    with pytest.raises(UserError, match="cannot be started with /no/python"):
        run_geneval(geneval, python="/no/python")


def test_a_scorer_that_fails_is_said_so_with_its_last_line(geneval):
    script = geneval / "geneval" / "evaluation" / "evaluate_images.py"
    script.write_text("import no_such_detector")
    with pytest.raises(UserError, match=r"No module named 'no_such_detector'\): does .* have all"):
        run_geneval(geneval)
    script.write_text("raise SystemExit(3)")
    with pytest.raises(UserError, match="it said nothing"):
        run_geneval(geneval)


def test_verdicts_have_to_be_of_all_pictures(geneval):
    script = geneval / "geneval" / "evaluation" / "evaluate_images.py"
    script.write_text(GENEVAL.replace('name == "0001.png"', "False").replace("file.write", "len"))
    with pytest.raises(UserError, match="judged 0 of 4 pictures"):
        run_geneval(geneval)
    (geneval / "results" / "verdicts.jsonl").write_text('{"tag": "a", "metadata": "b", "correct": true}')
    script.write_text("")  # old verdicts do not count
    with pytest.raises(UserError, match="judged 0 of 4 pictures"):
        run_geneval(geneval)


def test_pictures_that_dpg_leaves_out_are_no_score(dpg):
    Image.new("RGB", (64, 64)).save(dpg / "pictures" / "bad.png")
    with pytest.raises(UserError, match=r"left out 1 pictures \(bad\.png first\)"):
        run_dpg(dpg)
    with pytest.raises(UserError, match="no score"):
        dpg_summary("done")


def test_folders_that_dpg_would_misread_are_refused(dpg):
    with pytest.raises(UserError, match="lies among the pictures"):
        run_dpg(dpg, results=dpg / "pictures" / "verdicts.txt")
    Image.new("RGB", (32, 32)).save(dpg / "pictures" / "2.png")
    with pytest.raises(UserError, match="not squares of one size"):
        run_dpg(dpg)
    (dpg / "pictures" / "2.png").unlink()
    (dpg / "pictures" / "notes.txt").touch()
    with pytest.raises(UserError, match=r"notes\.txt is no picture"):
        run_dpg(dpg)


def test_no_pictures_are_said_so(geneval, dpg):
    for run, place in ((run_geneval, geneval), (run_dpg, dpg)):
        with pytest.raises(UserError, match="draw them first"):
            run(place, pictures=place / "nothing")
