"""``latteflow batch``: from a file to pictures, and what it refuses to begin with."""

import pytest


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.csv"
    file.write_text("prompt,seed\na red circle,3\n,4\n")
    return file


def test_a_file_becomes_pictures(latteflow, saved_pipeline, prompts, tmp_path):
    out = tmp_path / "out"
    outcome = latteflow("batch", prompts, "--out", out, "--model", saved_pipeline, "--steps", "2")
    assert outcome.code == 0
    assert outcome.out == f"pictures: {out}: 1, 1 rows left out ({out / 'bad-rows.json'})\n"
    assert [file.name for file in out.rglob("*.png")] == ["00000000.png"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "nonsense"], "no model 'nonsense'"),
        (["--dtype", "int3"], "there is no dtype 'int3'"),
        (["--workers", "2"], "--workers is for Ray: give --ray too"),
        (["--batch-size", "3"], "a shard of 256 is no multiple of a batch of 3"),
    ],
)
def test_a_mistake_is_one_line(latteflow, prompts, tmp_path, words, message):
    assert message in latteflow("batch", prompts, "--out", tmp_path / "out", *words).mistake
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written(latteflow, saved_pipeline, prompts, tmp_path):
    (tmp_path / "out").touch()
    words = ["--out", tmp_path / "out", "--model", saved_pipeline]
    assert "drawing stopped: " in latteflow("batch", prompts, *words).err
