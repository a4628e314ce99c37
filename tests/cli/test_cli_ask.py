"""``latteflow ask``: the backbone's answer, or one line that says what is wrong."""

import pytest
from PIL import Image

from latteflow.pipeline import LatteFlowPipeline
from toys import toy_picture


@pytest.fixture
def ask(latteflow, saved_pipeline):
    def run(image, question="What is this?", *words):
        return latteflow("ask", image, question, "--model", saved_pipeline, "--max-new-tokens", 4, *words)

    return run


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_prints_the_answer_and_nothing_else(ask, saved_pipeline, tmp_path, kind):
    file = tmp_path / f"picture.{kind.lower()}"
    toy_picture("circle", "red", "solid").save(file)
    outcome = ask(file)
    assert (outcome.code, outcome.err) == (0, "")
    pipe = LatteFlowPipeline.from_pretrained(saved_pipeline)
    with Image.open(file) as image:
        assert outcome.out == pipe.ask(image, "What is this?", max_new_tokens=4) + "\n"


def picture(folder):
    file = folder / "picture.png"
    toy_picture("circle", "red", "solid").save(file)
    return file


@pytest.mark.parametrize("question", ["", "   "])
def test_an_empty_question_is_refused(ask, tmp_path, question):
    assert "the question is empty" in ask(picture(tmp_path), question).mistake


@pytest.mark.parametrize("tokens", [0, -1, 10**6])
def test_an_absurd_length_is_refused(ask, tmp_path, tokens):
    assert f"--max-new-tokens has to be 1 to 4096: got {tokens}" in ask(
        picture(tmp_path), "What?", "--max-new-tokens", tokens
    ).mistake  # fmt: skip


def damaged(folder, kind):
    file = folder / "picture.png"
    content = picture(folder).read_bytes()
    if kind == "missing":
        file.unlink()
    elif kind == "folder":
        file.unlink()
        file.mkdir()
    elif kind == "text":
        file.write_text("this is no picture")
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif kind == "corrupt":
        file.write_bytes(content[:60] + bytes(len(content) - 60))
    elif kind == "svg":
        file.write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    elif kind == "tiff":
        Image.new("RGB", (8, 8)).save(file, format="TIFF")
    return file


@pytest.mark.parametrize("kind", ["missing", "folder", "text", "empty", "truncated", "corrupt", "svg", "tiff"])
def test_what_is_no_picture_is_named(ask, tmp_path, kind):
    message = ask(damaged(tmp_path, kind)).mistake
    assert str(tmp_path / "picture.png") in message
    assert "PNG, JPEG, WebP, GIF or BMP" in message


@pytest.mark.parametrize("size", [(9000, 8000), (4000, 10), (1, 200), (12000, 11000), (20000, 20000)])
def test_a_picture_of_absurd_size_is_refused_unread(ask, tmp_path, size):
    file = tmp_path / "picture.png"
    Image.new("1", size).save(file)
    message = ask(file).mistake
    assert str(file) in message
    assert "megapixels" in message


def test_an_unknown_model_is_named(latteflow, tmp_path):
    message = latteflow("ask", picture(tmp_path), "What?", "--model", "nonsense").mistake
    assert "no model 'nonsense'" in message
