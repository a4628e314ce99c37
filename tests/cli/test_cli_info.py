"""``latteflow info`` and ``latteflow evaluate``."""

from __future__ import annotations

import json
import shutil

import pytest
from typer.testing import CliRunner

from latteflow.cli import main
from latteflow.cli.main import app
from latteflow.errors import UserError


def _run(*arguments):
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)


def test_info_says_what_a_model_is(saved_pipeline):
    result = _run("info", "--model", str(saved_pipeline))
    assert result.exit_code == 0
    for word in ("experts", "active a step", "operations an image", "weights in memory"):
        assert word in result.stdout


def test_info_as_json_agrees_with_itself(saved_pipeline):
    cost = json.loads(_run("info", "--model", str(saved_pipeline), "--json", "--steps", "4").stdout)
    assert cost["steps"] == 4
    assert cost["total_parameters"] == sum(cost["parameters"].values())


def test_info_refuses_absurd_steps(saved_pipeline):
    with pytest.raises(UserError, match="--steps"):
        _run("info", "--model", str(saved_pipeline), "--steps", "0")


def test_evaluate_prints_every_figure(saved_pipeline, toy_set, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(saved_pipeline, model)
    data = {"leave_out_groups": [], "leave_out_subgroups": [], "styles": [], "skin_tones": []}
    (model / "recipe.json").write_text(json.dumps({"data": data}))
    options = ("--data", str(toy_set), "--drawings", "2", "--steps", "2", "--seeds", "1")
    assert "drawn, then asked" in _run("evaluate", str(model), *options).stdout
    results = json.loads(_run("evaluate", str(model), *options, "--json").stdout)
    assert results["conditions"]["drawings"] == 2
    assert results["autoencoder_psnr_db"] > 0


def test_evaluate_refuses_no_drawings(saved_pipeline):
    with pytest.raises(UserError, match="--drawings"):
        _run("evaluate", str(saved_pipeline), "--drawings", "0")


def test_a_missing_extra_is_named_with_the_remedy(monkeypatch, capsys):
    def without_accelerate():
        raise ModuleNotFoundError("No module named 'accelerate'", name="accelerate")

    monkeypatch.setattr(main, "app", without_accelerate)
    with pytest.raises(SystemExit) as left:
        main.main()
    assert left.value.code == 2
    assert (
        capsys.readouterr().err == "latteflow: this needs accelerate: install it with pip install 'latteflow[train]'\n"
    )


def test_a_missing_module_of_ours_is_no_mistake_of_the_users(monkeypatch):
    def broken():
        raise ModuleNotFoundError("No module named 'latteflow.gone'", name="latteflow.gone")

    monkeypatch.setattr(main, "app", broken)
    with pytest.raises(ModuleNotFoundError):
        main.main()
