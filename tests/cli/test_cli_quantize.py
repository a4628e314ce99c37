"""``--dtype`` and ``--quantize``, on the verbs that load a model."""

import importlib.util
import json
import shutil

import pytest
import torch
from PIL import Image

from latteflow import LatteFlowPipeline
from latteflow.models import quantization
from toys import toy_picture

needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")


def info(latteflow, model, *words):
    outcome = latteflow("info", "--model", model, "--json", *words)
    assert (outcome.code, outcome.err) == (0, "")
    return json.loads(outcome.out)


@pytest.mark.parametrize(("dtype", "parts"), [("bfloat16", 2), ("float16", 2), ("float32", 1)])
def test_info_counts_bytes_of_the_dtype(latteflow, saved_pipeline, dtype, parts):
    plain = info(latteflow, saved_pipeline)
    other = info(latteflow, saved_pipeline, "--dtype", dtype)
    assert (plain["dtype"], other["dtype"], other["quantization"]) == ("float32", dtype, None)
    assert other["weight_bytes"] == plain["weight_bytes"] // parts


@needs_torchao
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_info_counts_quantised_bytes(latteflow, saved_pipeline, kind):
    plain, other = info(latteflow, saved_pipeline), info(latteflow, saved_pipeline, "--quantize", kind)
    assert other["quantization"] == kind
    assert other["total_parameters"] == plain["total_parameters"]
    assert other["weight_bytes"] < plain["weight_bytes"]
    outcome = latteflow("info", "--model", saved_pipeline, "--dtype", "bfloat16", "--quantize", kind)
    assert f"(bfloat16, matrices {kind})" in outcome.out


@needs_torchao
def test_generate_ask_and_chat_take_them(latteflow, saved_pipeline, tmp_path, monkeypatch):
    options = ["--model", saved_pipeline, "--dtype", "bfloat16", "--quantize", "int8"]
    file = tmp_path / "drawn.png"
    outcome = latteflow("generate", "red", "--out", file, "--steps", 2, *options)
    assert (outcome.code, outcome.err) == (0, "")
    with Image.open(file) as image:
        assert (image.text["dtype"], image.text["quantize"]) == ("bfloat16", "int8")
    loaded = []
    monkeypatch.setattr(quantization, "quantization_config", recorded(quantization.quantization_config, loaded))
    toy_picture("circle", "red", "solid").save(tmp_path / "picture.png")
    outcome = latteflow("ask", tmp_path / "picture.png", "What?", "--max-new-tokens", 2, *options)
    assert (outcome.code, outcome.err) == (0, "")
    lines = iter(["/draw red", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    outcome = latteflow("chat", "--out", tmp_path, "--steps", 1, *options)
    assert (outcome.code, outcome.out) == (0, f"{tmp_path / 'chat-0.png'}\n")
    with Image.open(tmp_path / "chat-0.png") as image:
        assert image.text["quantize"] == "int8"
    assert loaded == ["int8", "int8"]


@pytest.mark.parametrize(
    ("words", "kind"),
    [(["--dtype", "bfloat16"], "none"), pytest.param(["--quantize", "fp8"], "fp8", marks=needs_torchao)],
)
def test_evaluate_takes_them(latteflow, saved_pipeline, toy_set, tmp_path, monkeypatch, words, kind):
    monkeypatch.chdir(tmp_path)  # where no judge is found
    data = {"leave_out_groups": [], "leave_out_subgroups": [], "styles": [], "skin_tones": []}
    model = shutil.copytree(saved_pipeline, tmp_path / "model")
    (model / "recipe.json").write_text(json.dumps({"data": data}))
    options = ["--data", toy_set, "--drawings", 2, "--steps", 2, "--seeds", 1, "--json", *words]
    outcome = latteflow("evaluate", model, *options)
    assert outcome.code == 0, outcome.err
    figures = json.loads(outcome.out)
    assert figures["conditions"]["dtype"] == ("bfloat16" if "bfloat16" in words else "float32")
    assert figures["conditions"]["quantization"] == kind
    assert figures["autoencoder_psnr_db"] > 0


def recorded(function, calls):
    def call(name):
        calls.append(name)
        return function(name)

    return call


@needs_torchao
def test_a_quantised_folder_loads_in_its_own_dtype(latteflow, saved_pipeline, tmp_path, capsys):
    config = quantization.quantization_config("fp8")
    pipe = LatteFlowPipeline.from_pretrained(str(saved_pipeline), dtype=torch.bfloat16, quantization_config=config)
    pipe.save_pretrained(tmp_path)
    capsys.readouterr()  # the library's progress bars
    figures = info(latteflow, tmp_path)
    assert (figures["dtype"], figures["quantization"]) == ("bfloat16", "fp8")
    mistake = latteflow("info", "--model", tmp_path, "--dtype", "float32").mistake
    assert "was quantised in bfloat16: give that as dtype (--dtype), or leave it out" in mistake
    mistake = latteflow("info", "--model", tmp_path, "--quantize", "int8").mistake
    assert "load it without quantization_config (--quantize)" in mistake


@pytest.mark.parametrize("verb", [["generate", "red", "--out", "x.png"], ["info"], ["chat"], ["evaluate"]])
def test_unknown_names_are_refused(latteflow, verb):
    assert "there is no dtype 'int4': give float32, bfloat16, float16" in latteflow(*verb, "--dtype", "int4").mistake
    mistake = latteflow(*verb, "--quantize", "int4").mistake
    assert "there is no quantization 'int4': give int8 or fp8" in mistake


def test_without_torchao_the_extra_is_named(latteflow, saved_pipeline, monkeypatch):
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    mistake = latteflow("info", "--model", saved_pipeline, "--quantize", "int8").mistake
    assert 'pip install "latteflow[quantize]"' in mistake


@pytest.mark.parametrize("words", [["--dtype", "float16"], ["--quantize", "int8"]])
def test_presets_take_neither(latteflow, words):
    assert "--dtype and --quantize go with --model" in latteflow("info", "--preset", "smolvlm-256m", *words).mistake
