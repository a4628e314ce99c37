"""``--compile``, on the verbs that draw."""

import json
import shutil
from pathlib import Path

import pytest

from latteflow.models.compilation import compile_groups, runs_compiled
from latteflow.pipeline import LatteFlowPipeline


@pytest.fixture
def compiled(monkeypatch):
    """The pipelines that were compiled, by a compiler that changes nothing."""
    pipes = []

    def compile(pipe):
        compile_groups(pipe.transformer, backend="eager")
        pipes.append(pipe)

    monkeypatch.setattr(LatteFlowPipeline, "compile", compile)
    return pipes


@pytest.fixture
def words_of(saved_pipeline, toy_set, tmp_path, monkeypatch):
    """What to type for a verb."""
    monkeypatch.chdir(tmp_path)  # where evaluate finds no judge
    lines = iter(["/draw red", "/quit"] * 2)
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    model = shutil.copytree(saved_pipeline, tmp_path / "model")
    data = {"leave_out_groups": [], "leave_out_subgroups": [], "styles": [], "skin_tones": []}
    (model / "recipe.json").write_text(json.dumps({"data": data}))
    return {
        "generate": ["generate", "red", "--out", "red.png", "--steps", 2, "--model", model],
        "chat": ["chat", "--steps", 2, "--model", model],
        "evaluate": [
            "evaluate",
            model,
            "--data",
            toy_set,
            "--drawings",
            2,
            "--steps",
            2,
            "--seeds",
            1,
            "--json",
            "--out",
            "out",
        ],
    }


@pytest.mark.parametrize("verb", ["generate", "chat", "evaluate"])
def test_what_draws_draws_compiled(latteflow, compiled, words_of, verb):
    plain = latteflow(*words_of[verb])
    assert plain.code == 0, plain.err
    assert compiled == []
    outcome = latteflow(*words_of[verb], "--compile")
    assert outcome.code == 0, outcome.err
    (pipe,) = compiled
    assert runs_compiled(pipe.transformer)
    if verb == "evaluate":
        told = [json.loads(one.out)["conditions"]["compiled"] for one in (plain, outcome)]
        assert told == [False, True]
        record = json.loads(Path("out/evaluation.json").read_text())
        assert (record["config"]["compile"], record["environment"]["compiled"]) == (True, True)


def test_what_draws_nothing_is_not_compiled(latteflow):
    for verb in (["ask", "x.png", "What?"], ["info"]):
        assert latteflow(*verb, "--compile").code == 2
