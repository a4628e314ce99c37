"""``latteflow benchmark``: mistakes in one line, and where results go."""

import pytest

from latteflow.benchmark import plots, run


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nonsense"], "no benchmark 'nonsense': there are limits, startup, emoji, paper, curves"),
        (["limits", "--steps", "0"], "--steps has to be 1 to 1000: got 0"),
        (["limits", "--threads", "0"], "--threads has to be 1 or more: got 0"),
        (["limits", "--dtype", "int8"], "no dtype 'int8'"),
        (["limits", "--preset", "nothing"], "no preset 'nothing'"),
        (["paper", "--preset", "smolvlm-256m"], "those of smolvlm-256m do not divide by 4"),
        (["limits", "--device", "abacus"], "device 'abacus' is not to be had here"),
    ],
)
def test_mistakes(latteflow, tmp_path, words, says):
    assert says in latteflow("benchmark", *words, "--out", tmp_path / "out").mistake
    assert not list(tmp_path.glob("out/*"))


def test_no_matplotlib(latteflow, tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    assert "pip install 'latteflow[plots]'" in latteflow("benchmark", "curves", "--out", tmp_path / "out").mistake


def test_files_are_named(latteflow, tmp_path, monkeypatch):
    monkeypatch.setattr(run.torch, "set_num_threads", lambda number: None)
    outcome = latteflow("benchmark", "limits", "--quick", "--dtype", "float32", "--threads", 1, "--out", tmp_path)
    assert outcome.code == 0
    assert outcome.out.split() == [str(tmp_path / "limits.md"), str(tmp_path / "README.md")]
    assert "--quick" in (tmp_path / "limits.md").read_text()
