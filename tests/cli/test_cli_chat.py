"""``latteflow chat``: lines in, words and pictures out."""

import io
import sys

import pytest
from PIL import Image

from latteflow.pipeline import LatteFlowPipeline
from toys import seeded, shake, toy_picture, toy_pipeline


@pytest.fixture(scope="module")
def saved_pipeline(tmp_path_factory):
    """A toy that says something else to everything: an untrained model hardly speaks."""
    pipe = toy_pipeline()
    shake(pipe.backbone, seeded(5), 0.3)
    folder = tmp_path_factory.mktemp("talking")
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def chat(latteflow, saved_pipeline, monkeypatch, tmp_path):
    def run(*lines, words=()):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        options = ("--out", tmp_path, "--max-new-tokens", 4, "--steps", 2)
        return latteflow("chat", "--model", saved_pipeline, *options, *words)

    return run


@pytest.fixture
def pipe(saved_pipeline):
    pipe = LatteFlowPipeline.from_pretrained(saved_pipeline)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def said(pipe, *messages):
    return pipe.chat(list(messages), max_new_tokens=4)["content"][0]["text"]


def user(*parts):
    return {"role": "user", "content": [*parts[:-1], {"type": "text", "text": parts[-1]}]}


def test_answers_each_line_with_what_was_said_before(chat, pipe):
    outcome = chat("Hello", "", "What is this?")
    first = said(pipe, user("Hello"))
    reply = {"role": "assistant", "content": [{"type": "text", "text": first}]}
    second = said(pipe, user("Hello"), reply, user("What is this?"))
    assert outcome.code == 0
    assert outcome.out.split() == [*first.split(), *second.split()]
    assert first != second


def test_draws_where_it_is_told_and_knows_what_it_drew(chat, pipe, tmp_path):
    outcome = chat("/draw a red circle", "What is this?", "/draw a blue cross", words=("--seed", 7))
    files = [tmp_path / "chat-0.png", tmp_path / "chat-1.png"]
    first, *answer, last = outcome.out.split()
    assert (outcome.code, [first, last]) == (0, [str(file) for file in files])
    drawn = pipe.chat([user("a red circle")], modalities=["image"], num_inference_steps=2, generator=seeded(7))
    with Image.open(files[0]) as image:
        assert image.tobytes() == drawn["content"][0]["image"].tobytes()
        assert (image.info["prompt"], image.info["seed"], image.info["steps"]) == ("a red circle", "7", "2")
    assert answer == said(pipe, user("a red circle"), drawn, user("What is this?")).split()
    with Image.open(files[1]) as image:
        assert image.info["seed"] == "8"


def test_a_picture_is_shown_with_the_next_line(chat, pipe, tmp_path):
    file = tmp_path / "circle.png"
    toy_picture("circle", "red", "solid").save(file)
    outcome = chat(f"/image {file}", "What is this?", "/new", "What is this?")
    picture = {"type": "image", "image": toy_picture("circle", "red", "solid")}
    shown, alone = said(pipe, user(picture, "What is this?")), said(pipe, user("What is this?"))
    assert outcome.out.split() == [*shown.split(), *alone.split()]


def test_help_and_quit(chat):
    outcome = chat("/help", "/quit", "Hello")
    assert outcome.code == 0
    assert outcome.out.count("\n") == 1
    assert "/draw WORDS" in outcome.out


def test_nothing_to_say_is_no_mistake(chat):
    assert chat().code == 0


@pytest.mark.parametrize(
    ("lines", "words", "reason"),
    [
        (["/paint"], (), "'/paint' is not known: /draw WORDS"),
        (["/draw"], (), "'/draw' is not known"),
        (["/image nowhere.png"], (), "no picture nowhere.png"),
        ([], ("--out", "nowhere"), "--out nowhere: there is no such folder"),
        ([], ("--seed", -1), "--seed has to be"),
        ([], ("--max-new-tokens", 0), "--max-new-tokens has to be"),
        (["/draw a"], ("--steps", 0), "num_inference_steps has to be 1 to 1000"),
    ],
)
def test_a_mistake_is_one_line(chat, lines, words, reason):
    assert reason in chat(*lines, words=words).mistake


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_at_a_terminal_a_mistake_does_not_end_the_talk(latteflow, saved_pipeline, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stdin", Terminal("/paint\nHello\n"))
    outcome = latteflow("chat", "--model", saved_pipeline, "--out", tmp_path, "--max-new-tokens", 4)
    assert outcome.code == 0
    assert outcome.err == "latteflow: '/paint' is not known: " + outcome.out.splitlines()[0] + "\n"
