"""The model that ships inside the package: it is there, it is small, it draws and it answers."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from latteflow import LatteFlowPipeline
from latteflow.data import prompts
from latteflow.models.answers import greedy_answers
from latteflow.models.embedded import embedded_models

NAME = "emoji-64"
THINGS = {
    "pizza": "food & drink",
    "red apple": "food & drink",
    "rocket": "travel & places",
    "dog face": "animals & nature",
    "grinning face": "smileys & emotion",
    "evergreen tree": "animals & nature",
    "automobile": "travel & places",
    "red heart": "smileys & emotion",
}
STYLES = ("noto", "twemoji", "openmoji", "fluent 3d")


@pytest.fixture(scope="module")
def folder():
    return embedded_models()[NAME]


@pytest.fixture(scope="module")
def pipe():
    pipe = LatteFlowPipeline.from_pretrained(NAME)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def drawn(pipe):
    """Each thing in each style, things first."""
    asked = [f"{thing}, {style} style" for thing in THINGS for style in STYLES]
    return pipe(asked, num_inference_steps=20, generator=torch.Generator().manual_seed(0)).images


def test_it_is_at_most_40_megabytes(folder):
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 40_000_000


def test_it_carries_its_card_licences_and_recipe(folder):
    card = (folder / "README.md").read_text(encoding="utf-8")
    for heading in ("Data", "Training", "Figures", "Licences"):
        assert f"## {heading}" in card
    for art in ("OpenMoji", "Noto", "Twemoji", "Fluent"):
        assert art in (folder / "LICENSES.md").read_text(encoding="utf-8")
    assert json.loads((folder / "recipe.json").read_text())["stage"] == "generator"


def test_it_draws_pictures_that_differ(drawn):
    pictures = np.stack([np.asarray(image, dtype=np.float32) for image in drawn])
    assert pictures.shape == (len(THINGS) * len(STYLES), 64, 64, 3)
    assert (pictures.std(axis=(1, 2, 3)) > 20).all()  # neither blank nor grey
    differences = np.abs(pictures[:, None] - pictures[None]).mean(axis=(2, 3, 4))
    assert (differences + 255 * np.eye(len(pictures)) > 5).all()


def test_emoji_stand_on_white(drawn):
    corners = np.stack([np.asarray(image)[[0, 0, -1, -1], [0, -1, 0, -1]] for image in drawn])
    assert corners.mean() > 235


def test_it_tells_what_it_drew_far_better_than_chance(pipe, drawn):
    def share(question, wanted):
        answers = greedy_answers(pipe.backbone, pipe.processor, drawn, question, max_new_tokens=prompts.ANSWER_TOKENS)
        return prompts.exact_share(answers, wanted)

    # Of the pictures that it was trained on, the most common category has 26% and the most common style 17%.
    assert share(prompts.WHICH_CATEGORY, [group for group in THINGS.values() for _ in STYLES]) >= 0.5
    assert share(prompts.WHICH_STYLE, list(STYLES) * len(THINGS)) >= 0.4


def test_the_same_seed_draws_the_same_picture_in_a_fresh_process(tmp_path):
    for name in ("one.png", "two.png"):
        command = [sys.executable, "-m", "latteflow", "generate", "rocket, noto style", "--out", name, "--steps", "8"]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
