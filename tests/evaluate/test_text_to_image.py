"""Folders of pictures for GenEval and DPG: their layout, whose noise is whose, and half-done folders."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import toys
from latteflow.errors import UserError
from latteflow.evaluate import text_to_image
from latteflow.evaluate.text_to_image import (
    Drawing,
    draw_dpg,
    draw_geneval,
    draw_prompt,
    picture_seed,
    read_dpg_prompts,
    read_geneval_prompts,
)

LINES = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {"tag": "colors", "include": [{"class": "cow", "count": 1, "color": "red"}], "prompt": "a photo of a red cow"},
]
PROMPTS = {"12": "a red square", "COCO_val2014_000000000042": "A blue circle,\nleft of a green cross."}
DRAWING = Drawing("toy", seed=3, steps=2, guidance_scale=2.0)


@pytest.fixture(scope="module")
def pipe():
    return toys.toy_pipeline()


@pytest.fixture
def geneval(tmp_path):
    file = tmp_path / "evaluation_metadata.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in LINES) + "\n\n", encoding="utf-8")
    return file


@pytest.fixture
def dpg(tmp_path):
    folder = tmp_path / "prompts"
    folder.mkdir()
    for name, prompt in PROMPTS.items():
        (folder / f"{name}.txt").write_text(f"{prompt}\n", encoding="utf-8")
    return folder


@pytest.fixture
def calls(pipe, monkeypatch):
    """Prompts that were drawn."""
    seen = []

    def counted(pipe, prompt, pictures, drawing):
        seen.append(prompt)
        return draw_prompt(pipe, prompt, pictures, drawing)

    monkeypatch.setattr(text_to_image, "draw_prompt", counted)
    return seen


def files_of(folder):
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_geneval_s_layout(pipe, geneval, tmp_path):
    told = []
    assert draw_geneval(pipe, geneval, tmp_path / "out", DRAWING, pictures=2, watch=told.append) == 2
    files = files_of(tmp_path / "out")
    assert set(files) == {
        f"{number:05d}/{name}"
        for number in (0, 1)
        for name in ("metadata.jsonl", "samples/0000.png", "samples/0001.png")
    }
    assert [json.loads(files[f"0000{number}/metadata.jsonl"]) for number in (0, 1)] == LINES
    assert told == ["1 of 2: a photo of a bench", "2 of 2: a photo of a red cow"]
    assert sorted(child.name for child in tmp_path.iterdir()) == ["evaluation_metadata.jsonl", "out"]
    with Image.open(tmp_path / "out/00001/samples/0001.png") as image:
        assert (image.size, image.mode, image.info["prompt"]) == ((32, 32), "RGB", "a photo of a red cow")
        assert image.info["seed"] == str(picture_seed(3, "a photo of a red cow", 1))
        assert (image.info["model"], image.info["steps"], image.info["guidance"]) == ("toy", "2", "2.0")
        assert image.info["software"].startswith("latteflow ")


def test_dpg_s_layout(pipe, dpg, tmp_path):
    assert draw_dpg(pipe, dpg, tmp_path / "out", DRAWING) == 2
    assert set(files_of(tmp_path / "out")) == {f"{name}.png" for name in PROMPTS}
    for name, prompt in PROMPTS.items():
        with Image.open(tmp_path / "out" / f"{name}.png") as grid:
            assert grid.size == (64, 64)
            assert grid.info["prompt"] == prompt
            images = draw_prompt(pipe, prompt, 4, DRAWING)
            boxes = [(0, 0, 32, 32), (32, 0, 64, 32), (0, 32, 32, 64), (32, 32, 64, 64)]
            for box, image in zip(boxes, images, strict=True):
                assert np.array_equal(np.asarray(grid.crop(box)), np.asarray(image))
            assert len({image.tobytes() for image in images}) == 4


def test_a_picture_s_noise_follows_from_seed_prompt_and_number_alone(pipe):
    seeds = [picture_seed(*given) for given in ((0, "a", 0), (0, "a", 1), (0, "b", 0), (1, "a", 0), (0, "a0", 0))]
    assert len(set(seeds)) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert picture_seed(0, "a", 0) == 7756895851570414870
    two, three = (draw_prompt(pipe, "a red square", number, DRAWING) for number in (2, 3))
    for one, other in zip(two, three[:2], strict=True):
        assert np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max() <= 1


def test_nothing_is_drawn_twice(pipe, geneval, dpg, tmp_path, calls):
    for draw, prompts in ((draw_geneval, geneval), (draw_dpg, dpg)):
        out = tmp_path / draw.__name__
        draw(pipe, prompts, out, DRAWING)
        before, number = files_of(out), len(calls)
        assert draw(pipe, prompts, out, DRAWING) == 0
        assert (files_of(out), len(calls)) == (before, number)


def test_what_is_missing_or_broken_is_drawn_anew(pipe, geneval, tmp_path, calls):
    out = tmp_path / "out"
    draw_geneval(pipe, geneval, out, DRAWING, pictures=2)
    before = files_of(out)
    (out / "00000/samples/0001.png").unlink()
    whole = before["00001/samples/0000.png"]
    (out / "00001/samples/0000.png").write_bytes(whole[: len(whole) // 2])
    calls.clear()
    assert draw_geneval(pipe, geneval, out, DRAWING, pictures=2) == 2
    assert files_of(out) == before
    (out / "00001/samples/0001.png").unlink()
    assert draw_geneval(pipe, geneval, out, DRAWING, pictures=2) == 1
    assert calls == [*(line["prompt"] for line in LINES), LINES[1]["prompt"]]


@pytest.mark.parametrize("change", [{"steps": 3}, {"seed": 4}, {"guidance_scale": 1.0}, {"model": "x"}, {"height": 64}])
def test_pictures_that_were_drawn_otherwise_are_left_alone(pipe, geneval, dpg, tmp_path, change):
    other = replace(DRAWING, **change)
    for draw, prompts in ((draw_geneval, geneval), (draw_dpg, dpg)):
        out = tmp_path / draw.__name__
        draw(pipe, prompts, out, DRAWING)
        before = files_of(out)
        with pytest.raises(UserError, match=r"was drawn otherwise \(.*\): give another folder"):
            draw(pipe, prompts, out, other)
        assert files_of(out) == before


def test_sizes_reach_the_pipeline(pipe, dpg, tmp_path):
    draw_dpg(pipe, dpg, tmp_path / "out", replace(DRAWING, height=64, width=64))
    with Image.open(tmp_path / "out/12.png") as grid:
        assert grid.size == (128, 128)


def test_settings_that_cannot_be_are_refused_before_anything_is_written(pipe, geneval, dpg, tmp_path):
    for draw, prompts in ((draw_geneval, geneval), (draw_dpg, dpg)):
        with pytest.raises(UserError, match="num_inference_steps"):
            draw(pipe, prompts, tmp_path / "out", replace(DRAWING, steps=0))
    with pytest.raises(UserError, match="at least one picture"):
        draw_geneval(pipe, geneval, tmp_path / "out", DRAWING, pictures=0)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{}", "line 1: an object with a prompt and a tag"),
        ('{"prompt": "a", "tag": "b"}\n{"prompt": "", "tag": "b"}', "line 2: an object"),
        ("[1]", "line 1: an object"),
        ("a photo of a bench", "line 1: not JSON"),
        ("\n", "holds no prompts"),
    ],
)
def test_a_broken_prompt_file_of_geneval_is_refused(tmp_path, text, reason):
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(UserError, match=reason):
        read_geneval_prompts(tmp_path / "a.jsonl")


def test_missing_prompts_are_said_so(tmp_path):
    with pytest.raises(UserError, match=r"evaluation_metadata\.jsonl"):
        read_geneval_prompts(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match=r"no \.txt files"):
        read_dpg_prompts(tmp_path)
    (tmp_path / "1.txt").write_text(" \n")
    with pytest.raises(UserError, match=r"1\.txt is empty"):
        read_dpg_prompts(tmp_path)
