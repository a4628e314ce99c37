"""The newcomer's path: a folder of pictures, three commands of examples/train_your_own.md, a picture drawn; offline."""

import csv
import json
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from latteflow.train.checkpoint import checkpoint_folders

ROOT = Path(__file__).parents[2]
RECIPE = "recipes/your-pictures/generator.yaml"
# A short run that leaves its files where the commands look for them.
SHORT = ("smoke=true", "output=runs/your-pictures", "encode.output=data/your-pictures-latents", "train.cpu_threads=1")
COLOURS = ("red", "blue", "green", "orange", "purple")
SHAPES = ("ellipse", "rectangle", "line", "arc")


def commands_of(page):
    """The commands about this recipe and its model, of all that a page shows."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if "your-pictures" in line]


def words_of(command):
    words = [str(ROOT / word) if word.startswith("recipes/") else word for word in shlex.split(command)[1:]]
    return [*words, *SHORT] if words[0] in ("encode", "train") else words


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """Twenty drawings of 100x80 and their captions in ``mine/``, beside which the commands are given."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "mine"
    folder.mkdir()
    rows = []
    for colour in COLOURS:
        for shape in SHAPES:
            picture = Image.new("RGB", (100, 80), "white")
            more = {"start": 0, "end": 250} if shape == "arc" else {}
            getattr(ImageDraw.Draw(picture), shape)((20, 10, 80, 70), fill=colour, width=8, **more)
            picture.save(folder / f"{colour}-{shape}.png")
            rows.append((f"{colour}-{shape}.png", f"a {colour} {shape}"))
    write_captions(folder, ("file", "caption"), rows)
    return folder


def write_captions(folder, header, rows):
    with (folder / "captions.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


def test_the_pages_show_the_same_three_commands():
    commands = commands_of("examples/train_your_own.md")
    assert [command.split()[:2] for command in commands] == [
        ["latteflow", verb] for verb in ("encode", "train", "generate")
    ]
    assert commands_of("docs/training.md") == commands


def test_three_commands_from_a_folder_of_pictures_to_a_picture_drawn(latteflow, mine):
    encode, train, generate = map(words_of, commands_of("examples/train_your_own.md"))
    outcome = latteflow(*encode)
    assert outcome.code == 0, outcome.err
    assert outcome.out.strip() == "latents: data/your-pictures-latents: 20 samples"
    outcome = latteflow(*train)
    assert outcome.code == 0, outcome.err
    assert outcome.out.strip() == "trained weights: runs/your-pictures/final"
    assert "generator: 20 samples" in outcome.err
    assert Path("runs/your-pictures/previews/step-00000004.png").is_file()
    assert len(checkpoint_folders(Path("runs/your-pictures"))) == 1
    outcome = latteflow(*generate)
    assert outcome.code == 0, outcome.err
    with Image.open("picture.png") as picture:
        assert picture.size == (64, 64)
        assert picture.info["model"] == "runs/your-pictures/final"
        assert len(picture.getcolors(64 * 64)) > 1


def test_pictures_do_without_encoding(latteflow, mine):
    outcome = latteflow("train", ROOT / RECIPE, *SHORT, "train.steps=1", "train.batch_size=4")
    assert outcome.code == 0, outcome.err
    recipe = json.loads(Path("runs/your-pictures/final/recipe.json").read_text())
    assert recipe["data"]["kind"] == "captions_csv"


def test_a_few_bad_pictures_are_left_out_and_named(latteflow, mine):
    (mine / "red-arc.png").unlink()
    (mine / "blue-arc.png").write_text("no picture")
    outcome = latteflow("encode", ROOT / RECIPE, *SHORT)
    assert outcome.code == 0, outcome.err
    listed = Path("data/your-pictures-latents/quarantine.jsonl")
    assert outcome.out.replace("\n", "") == f"latents: data/your-pictures-latents: 18 samples, 2 left out ({listed})"
    assert [json.loads(line)["name"] for line in listed.read_text().splitlines()] == ["red-arc.png", "blue-arc.png"]


@pytest.mark.parametrize("verb", ["encode", "train"])
@pytest.mark.parametrize(
    ("header", "rows", "message"),
    [
        (None, None, "give a folder that holds captions.csv (UTF-8), columns file and caption"),
        (("file", "caption"), [], "has no row below its header"),
        (("file", "text"), [("red-arc.png", "a red arc")], "has no column 'caption': it has file, text"),
        (("file", "caption"), [("../red-arc.png", "a red arc")], "names no picture inside the folder"),
    ],
)
def test_what_cannot_be_read_is_one_line(latteflow, mine, verb, header, rows, message):
    if header is None:
        (mine / "captions.csv").unlink()
    else:
        write_captions(mine, header, rows)
    assert message in latteflow(verb, ROOT / RECIPE, *SHORT).mistake
    assert not Path("runs").exists()


@pytest.mark.parametrize("verb", ["encode", "train"])
def test_too_many_bad_pictures_stop_the_run(latteflow, mine, verb):
    for shape in SHAPES:
        (mine / f"red-{shape}.png").unlink()
    outcome = latteflow(verb, ROOT / RECIPE, *SHORT)
    assert outcome.code == 2
    last = outcome.err.splitlines()[-1]
    assert "of 20 samples are bad, more than" in last
    assert "quarantine.jsonl" in last


def test_too_few_to_keep_some_apart(latteflow, mine):
    write_captions(mine, ("file", "caption"), [("red-arc.png", "a red arc"), ("red-line.png", "a red line")])
    message = latteflow("train", ROOT / RECIPE, *SHORT, "data.validation=2").mistake
    assert "there are 2 samples, and data.validation keeps 2 apart: none is left to train on" in message


def test_training_before_encoding_says_what_is_missing(latteflow, mine):
    _, train, _ = map(words_of, commands_of("examples/train_your_own.md"))
    assert "data/your-pictures-latents" in latteflow(*train).mistake
