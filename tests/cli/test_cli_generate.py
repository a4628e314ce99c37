"""``latteflow generate``: pictures with their settings inside, or one line that says what is wrong."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import latteflow as package
from latteflow.pipeline import LatteFlowPipeline
from toys import seeded


@pytest.fixture
def generate(latteflow, saved_pipeline, tmp_path):
    """Run ``generate`` with the toy model, few steps and an output in the test's folder; later options win."""

    def run(*words, out="picture.png"):
        return latteflow("generate", "--model", saved_pipeline, "--steps", 2, "--out", tmp_path / out, *words)

    return run


def files(folder):
    return sorted(file.name for file in folder.iterdir())


def pixels(file):
    with Image.open(file) as image:
        return np.asarray(image)


def size(file):
    with Image.open(file) as image:
        return image.size


def text(file):
    """The settings that a PNG carries."""
    with Image.open(file) as image:
        assert image.format == "PNG"
        image.load()
        return image.text


def test_writes_a_picture_with_its_settings_inside(generate, tmp_path, saved_pipeline):
    outcome = generate("a red círcle ☕", "--seed", 5, "--guidance", 2.5, "--negative", "blue")
    assert outcome.code == 0, outcome.err
    assert outcome.out.split() == [str(tmp_path / "picture.png")]
    assert outcome.err == ""
    assert size(tmp_path / "picture.png") == (32, 32)
    assert text(tmp_path / "picture.png") == {
        "prompt": "a red círcle ☕",
        "seed": "5",
        "steps": "2",
        "guidance": "2.5",
        "model": str(saved_pipeline),
        "negative_prompt": "blue",
        "software": f"latteflow {package.__version__}",
    }
    pipe = LatteFlowPipeline.from_pretrained(saved_pipeline)
    pipe.set_progress_bar_config(disable=True)
    same = pipe("a red círcle ☕", "blue", num_inference_steps=2, guidance_scale=2.5, generator=seeded(5)).images[0]
    assert np.array_equal(pixels(tmp_path / "picture.png"), np.asarray(same))


def test_several_pictures_are_numbered_each_with_its_seed(generate, tmp_path):
    outcome = generate("red", "blue", "--num-images", 2, "--seed", 7)
    assert outcome.code == 0, outcome.err
    names = [f"picture-{i}.png" for i in range(4)]
    assert files(tmp_path) == names
    assert outcome.out.split() == [str(tmp_path / name) for name in names]
    texts = [text(tmp_path / name) for name in names]
    assert [settings["prompt"] for settings in texts] == ["red", "red", "blue", "blue"]
    assert [settings["seed"] for settings in texts] == ["7", "8", "9", "10"]
    assert generate("blue", "--seed", 10, out="alone.png").code == 0
    difference = pixels(tmp_path / "alone.png").astype(int) - pixels(tmp_path / "picture-3.png")
    assert abs(difference).max() <= 1  # the last bit of a float may turn a rounding


@pytest.mark.parametrize(("prompts", "number", "sheet"), [(["a", "b"], 3, (96, 64)), (["a", "b", "c"], 1, (96, 32))])
def test_a_grid_is_one_file_a_row_a_prompt(generate, tmp_path, prompts, number, sheet):
    assert generate(*prompts, "--num-images", number, "--grid").code == 0
    assert files(tmp_path) == ["picture.png"]
    file = tmp_path / "picture.png"
    assert size(file) == sheet
    assert text(file)["prompt"] == " | ".join(prompts)
    generate(*prompts, "--num-images", number, out="one.png")
    cells = [pixels(tmp_path / f"one-{i}.png") for i in range(len(prompts) * number)]
    columns = sheet[0] // 32
    rows = [np.concatenate(cells[i : i + columns], axis=1) for i in range(0, len(cells), columns)]
    assert np.array_equal(pixels(file), np.concatenate(rows))


def test_size_scale_and_scheduler(generate, tmp_path):
    assert generate("a", "--height", 16, "--width", 40, "--scale", 3, "--scheduler", "heun").code == 0
    assert size(tmp_path / "picture.png") == (120, 48)
    assert generate("a", "--device", "cpu", out="euler.png").code == 0
    assert generate("a", "--scheduler", "heun", out="heun.png").code == 0
    assert not np.array_equal(pixels(tmp_path / "euler.png"), pixels(tmp_path / "heun.png"))


def test_an_existing_picture_is_replaced(generate, tmp_path):
    (tmp_path / "picture.png").write_text("old")
    assert generate("a").code == 0
    assert size(tmp_path / "picture.png") == (32, 32)
    assert files(tmp_path) == ["picture.png"]


MISTAKES = [
    ([""], "a prompt is empty"),
    (["red", "  "], "a prompt is empty"),
    (["a", "--seed", "-1"], "--seed has to be 0 to 2**63 - 1: got -1"),
    (["a", "--seed", 2**63], f"got {2**63}"),
    (["a", "--num-images", 0], "--num-images 0"),
    (["a", "--num-images", 10**6], "--num-images 1000000: 1 to 1024"),
    (["a", "--steps", 0], "num_inference_steps has to be 1 to 1000: got 0"),
    (["a", "--steps", 10**9], "got 1000000000"),
    (["a", "--guidance", "nan"], "guidance_scale has to be 0 to 100: got nan"),
    (["a", "--guidance", "inf"], "got inf"),
    (["a", "--guidance", "-3"], "got -3.0"),
    (["a", "--height", 0], "height 0 does not do: give a multiple of 8"),
    (["a", "--width", 33], "width 33 does not do"),
    (["a", "--height", 10**6 * 8, "--width", 8], "draw smaller"),
    (["a", "--scale", 0], "--scale has to be 1 to 64: got 0"),
    (["a", "--scheduler", "ddim"], "unknown scheduler 'ddim'; choose one of euler, heun, dpm++, unipc"),
    (["a", "--device", "toaster"], "device 'toaster' is not to be had here"),
    (["a", "--device", "cuda:77"], "device 'cuda:77' is not to be had here"),
    (["a", "--device", "meta"], "device 'meta' is not to be had here"),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES, ids=lambda value: str(value)[:40])
def test_a_mistake_is_one_line_and_leaves_nothing(generate, tmp_path, words, message):
    assert message in generate(*words).mistake
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("picture.jpg", "does not end in .png"),
        ("picture", "does not end in .png"),
        ("nowhere/picture.png", "there is no folder"),
    ],
)
def test_an_output_that_cannot_be_is_refused(generate, tmp_path, out, message):
    assert message in generate("a", out=out).mistake
    assert files(tmp_path) == []


def test_an_output_that_cannot_be_written_leaves_nothing_half_done(generate, tmp_path):
    (tmp_path / "picture.png").mkdir()
    assert "picture.png cannot be written" in generate("a").mistake
    assert files(tmp_path) == ["picture.png"]
    assert files(tmp_path / "picture.png") == []


@pytest.fixture
def broken(saved_pipeline, tmp_path):
    """A copy of the toy model, to be broken."""
    return shutil.copytree(saved_pipeline, tmp_path / "broken")


def draw_with(latteflow, model, tmp_path):
    outcome = latteflow("generate", "a", "--model", model, "--steps", 2, "--out", tmp_path / "picture.png")
    assert not (tmp_path / "picture.png").exists()
    return outcome.mistake


@pytest.mark.parametrize("name", ["nonsense", "./nowhere", "/nowhere/model", "~/nowhere", "a/b/c", "no/body", ""])
def test_a_model_that_is_not_there_is_named(latteflow, tmp_path, name):
    message = draw_with(latteflow, name, tmp_path)
    assert f"no model {name!r}" in message
    assert "embedded are" in message


def test_a_folder_that_is_no_model_is_named(latteflow, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "holds no model_index.json" in draw_with(latteflow, tmp_path / "empty", tmp_path)


def test_a_file_that_is_no_folder_is_named(latteflow, tmp_path):
    (tmp_path / "model.bin").write_text("x")
    assert "holds no model_index.json" in draw_with(latteflow, tmp_path / "model.bin", tmp_path)


WEIGHTS = [
    "transformer/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "backbone/model.safetensors",
]


@pytest.mark.parametrize("file", WEIGHTS)
@pytest.mark.parametrize("kept", [0, 0.5, 0.999])
def test_truncated_weights_are_named(latteflow, broken, tmp_path, file, kept):
    content = (broken / file).read_bytes()
    (broken / file).write_bytes(content[: int(kept * len(content))])
    assert "broken cannot be loaded as a latteflow model" in draw_with(latteflow, broken, tmp_path)


@pytest.mark.parametrize("file", [*WEIGHTS, "transformer/config.json", "backbone/config.json", "processor"])
def test_missing_parts_are_named(latteflow, broken, tmp_path, file):
    shutil.rmtree(broken / file) if (broken / file).is_dir() else (broken / file).unlink()
    assert "broken cannot be loaded as a latteflow model" in draw_with(latteflow, broken, tmp_path)


@pytest.mark.parametrize("file", WEIGHTS)
def test_foreign_weights_are_named(latteflow, broken, tmp_path, file):
    save_file({"somebody.elses.weight": torch.zeros(3)}, broken / file, metadata={"format": "pt"})
    assert "broken cannot be loaded as a latteflow model" in draw_with(latteflow, broken, tmp_path)


def test_weights_of_other_shapes_are_named(latteflow, broken, tmp_path):
    config = json.loads((broken / "transformer" / "config.json").read_text())
    config["hidden_size"] = 64
    (broken / "transformer" / "config.json").write_text(json.dumps(config))
    assert "broken cannot be loaded as a latteflow model" in draw_with(latteflow, broken, tmp_path)


@pytest.mark.parametrize(
    "index",
    [
        "not json",
        "[]",
        "{}",
        json.dumps({"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}),
    ],
)
def test_another_pipelines_index_is_named(latteflow, broken, tmp_path, index):
    (broken / "model_index.json").write_text(index)
    assert "broken cannot be loaded as a latteflow model" in draw_with(latteflow, broken, tmp_path)


def test_as_a_process_of_its_own(saved_pipeline, tmp_path):
    """The real command: exit codes and streams, without a traceback or stray warnings."""
    command = [sys.executable, "-c", "from latteflow.cli.main import main; main()", "generate", "--out"]
    good = [*command, tmp_path / "picture.png", "--model", saved_pipeline, "--steps", "1", "red"]
    done = subprocess.run([str(word) for word in good], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == [str(tmp_path / "picture.png")]
    bad = [*command, tmp_path / "other.png", "--model", "nonsense", "red"]
    done = subprocess.run([str(word) for word in bad], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("latteflow: no model 'nonsense'")
    assert done.stderr.count("\n") == 1
    assert files(tmp_path) == ["picture.png"]
