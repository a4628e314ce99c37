"""evaluation.json: what is written is what is read, and nothing else is taken for it."""

from __future__ import annotations

import json
import math

import pytest
import torch
from evaluation_toys import evaluation, figure

import latteflow
from latteflow.errors import UserError
from latteflow.evaluate import record
from latteflow.evaluate.numbers import shown_number
from latteflow.evaluate.record import FILE, environment_of, finite, read_evaluation


def test_what_is_written_is_read(tmp_path):
    written = evaluation()
    file = written.write(tmp_path / "new" / "folder")
    assert file.name == FILE
    assert read_evaluation(file) == written
    assert [found.name for found in file.parent.iterdir()] == [FILE]


def test_numbers_that_are_none_become_null(tmp_path):
    assert finite({"a": (math.nan, 1), 2: [math.inf, {"b": -math.inf}]}) == {"a": [None, 1], "2": [None, {"b": None}]}
    file = evaluation([figure(value=math.nan)], results={"x": math.inf}).write(tmp_path)
    assert "NaN" not in file.read_text()
    assert "Infinity" not in file.read_text()
    assert read_evaluation(file).figures[0].value is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe", "is not JSON"),
        (b"{", "is not JSON"),
        (b"[]", "is no evaluation.json of this version (its top level:"),
        (b'{"model": "emoji-64", "conditions": {}}', "is no evaluation.json of this version"),
        (json.dumps({**evaluation().model_dump(), "format": "latteflow evaluation 2"}).encode(), "(format: "),
        (json.dumps({**evaluation().model_dump(), "figures": [{"name": 3}]}).encode(), "(figures.0."),
    ],
)
def test_json_of_another_kind_is_refused(tmp_path, content, message):
    file = tmp_path / "other.json"
    file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_evaluation(file)
    assert str(caught.value).startswith(str(file))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_evaluation(tmp_path / FILE)


@pytest.mark.parametrize(
    ("value", "unit", "words"),
    [
        (0.5732, "share", "57.3%"),
        (29.345, "dB", "29.34 dB"),
        (1_840_000, "parameters", "1.84M"),
        (97_500_000, "FLOP", "97.5 MFLOP"),
        (999, "B", "999 B"),
        (0, "B", "0 B"),
        (999_600, "parameters", "1M"),
        (-2_000, "B", "-2 kB"),
        (12.3456, "", "12.35"),
    ],
)
def test_numbers_are_shown_as_people_read_them(value, unit, words):
    assert shown_number(value, unit) == words


def test_a_spread_is_shown_where_seeds_differ():
    assert figure(lowest=0.4, highest=0.6).shown == "50.0% (40.0% to 60.0%)"
    assert figure(lowest=0.5, highest=0.5).shown == "50.0%"
    assert figure(value=None, why="too few").shown == "none"
    assert figure(value=None, why="too few").told == "none: too few"


def test_the_environment_says_versions_and_hardware():
    here = environment_of(torch.device("cpu"))
    assert here["latteflow"] == latteflow.__version__
    assert here["torch"] == torch.__version__
    assert here["gpu"] is None
    assert here["processor"]
    assert here["threads"] == torch.get_num_threads()


def test_a_commit_is_said_of_a_checkout_alone(tmp_path):
    nothing = {"commit": None, "changed_since": None}
    assert record._checkout(tmp_path) == nothing
    (tmp_path / ".git").write_text("gitdir: nowhere")
    (tmp_path / "pyproject.toml").touch()
    assert record._checkout(tmp_path) == nothing


def test_a_commit_and_later_changes_are_said(tmp_path, monkeypatch):
    import subprocess

    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_NAME", "a")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "a@example.org")
    (tmp_path / "pyproject.toml").write_text("one")
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "One"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True, capture_output=True)
    found = record._checkout(tmp_path)
    assert len(found["commit"]) == 40
    assert found["changed_since"] is False
    (tmp_path / "pyproject.toml").write_text("two")
    assert record._checkout(tmp_path) == {**found, "changed_since": True}
