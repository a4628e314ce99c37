"""``latteflow info`` and ``latteflow evaluate``."""

from __future__ import annotations

import json
import shutil

import pytest
from typer.testing import CliRunner

from latteflow.cli import main
from latteflow.cli.main import app
from latteflow.errors import UserError
from latteflow.models import presets


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


def test_info_says_what_a_preset_costs_without_loading_it():
    result = _run("info", "--preset", "smolvlm-256m")
    assert result.exit_code == 0
    for words in (
        "HuggingFaceTB/SmolVLM-256M-Instruct",
        "5 groups of 6 layers",
        "694M: backbone 256M, transformer 125M, vae 312M",
        "569M / 125M; LoRA of rank 16: 4.88M",
        "256x256, 64 tokens",
        "peak to draw",
        "peak to train",
    ):
        assert words in result.stdout, result.stdout


def test_a_preset_as_json_names_the_unit_of_every_figure():
    figures = json.loads(_run("info", "--preset", "smolvlm-256m", "--json", "--size", "512", "--steps", "8").stdout)
    assert (figures["preset"], figures["picture_size_pixels"], figures["steps"]) == ("smolvlm-256m", 512, 8)
    assert figures["image_flops"] == 8 * figures["step_flops"] + figures["prefill_flops"] + figures["decode_flops"]
    assert figures["inference_memory"]["peak_bytes"] > 2 * figures["total_parameters"]
    counts = {"layers", "groups", "layers_per_step", "image_tokens", "prompt_tokens", "steps", "lora_rank"}
    counts |= {"training_batch", "guided"}
    units = ("_bytes", "_flops", "_parameters", "_pixels")
    for name, value in figures.items():
        if isinstance(value, int | float):
            assert name.endswith(units) or name in counts, name
        elif isinstance(value, dict) and name != "parameters":
            assert all(term.endswith(units) for term in value), value


def test_all_presets_are_a_table_of_one_row_each(monkeypatch):
    names = ["smolvlm-500m", "qwen2-vl-2b"]
    assert set(names) < set(presets.preset_names())
    monkeypatch.setattr(presets, "preset_names", lambda: names)
    lines = _run("info", "--preset", "all").stdout.splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith("| ")]
    assert [row[0].strip("| ") for row in rows[2:]] == names
    assert len({len(row) for row in rows}) == 1
    assert next(row for row in rows if "qwen2-vl-2b" in row[0])[1] == "4 x 7"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--preset", "qwen9"), "no preset 'qwen9': there are qwen2-vl-2b, "),
        (("--preset", "smolvlm-256m", "--size", "100"), "size 100 does not do: give a multiple of 32"),
        (("--preset", "smolvlm-256m", "--steps", "0"), "--steps has to be 1 to 1000: got 0"),
        (("--preset", "smolvlm-256m", "--model", "a/b"), "give --model a/b or --preset smolvlm-256m, not both"),
        (("--size", "256"), "--size goes with --preset"),
    ],
)
def test_a_preset_that_cannot_be_is_one_line_and_exit_code_2(latteflow, arguments, message):
    assert message in latteflow("info", *arguments).mistake


def test_evaluate_prints_every_figure(saved_pipeline, toy_set, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where no judge is found
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
