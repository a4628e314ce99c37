"""Quantised weights: how close pictures stay, what they take, to a folder and back, and what is refused."""

import importlib.util
import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from latteflow import LatteFlowPipeline
from latteflow.errors import UserError
from latteflow.evaluate.cost import cost_of
from latteflow.evaluate.memory import weight_bytes
from latteflow.models import quantization
from latteflow.models.lora import lora_config
from latteflow.models.quantization import (
    QUANTIZATIONS,
    quantization_config,
    quantization_of,
    quantized_settings,
    stored_bytes,
)
from latteflow.models.saved import require_weights
from latteflow.models.weight_store import transformer_without_layers
from toys import seeded, toy_picture, toy_pipeline

needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
KINDS = pytest.mark.parametrize("kind", QUANTIZATIONS)
# Mean difference of pixels in [0, 1], about twice what is seen; an int8 is off by 1/254 of its row's largest weight at
# most, an fp8 by 1/16 of itself.
MOST_DIFFERENCE = {"int8": 0.001, "fp8": 0.005}
MORE_IN_HALF_PRECISION = 0.003


def loaded(folder, **settings):
    pipe = LatteFlowPipeline.from_pretrained(str(folder), **settings)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe, **settings):
    settings = {"num_inference_steps": 4, "output_type": "pt", **settings}
    return pipe(["a red circle", "a blue square"], generator=seeded(), **settings).images


@pytest.fixture(scope="module")
def quantized(saved_pipeline):
    """Pipelines of both kinds, in float32; tests only read them."""
    return {kind: loaded(saved_pipeline, quantization_config=quantization_config(kind)) for kind in QUANTIZATIONS}


@needs_torchao
@KINDS
def test_pictures_stay_close(quantized, saved_pipeline, kind):
    difference = (drawn(quantized[kind]) - drawn(loaded(saved_pipeline))).abs().mean().item()
    assert 0 < difference < MOST_DIFFERENCE[kind]


@needs_torchao
@KINDS
def test_answers_are_given(quantized, kind):
    assert isinstance(quantized[kind].ask(toy_picture("circle", "red", "solid"), "What is this?"), str)


@needs_torchao
@KINDS
def test_every_matrix_of_the_layers_is_quantised_and_nothing_that_stands_around_them(quantized, kind):
    pipe = quantized[kind]
    assert quantization_of(pipe.transformer) == quantization_of(pipe.backbone) == kind
    assert quantization_of(pipe.vae) is None
    for part, plain in ((pipe.transformer, "io."), (pipe.backbone, "lm_head")):
        for name, module in part.named_modules():
            wanted = kind if isinstance(module, torch.nn.Linear) and not name.startswith(plain) else None
            for own, weight in module.named_parameters(recurse=False):
                assert quantization_of(torch.nn.ParameterList([weight])) == (wanted if own == "weight" else None), name


@needs_torchao
@KINDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_draw_as_well(saved_pipeline, kind, dtype):
    config = quantization_config(kind)
    pipe = loaded(saved_pipeline, dtype=dtype, quantization_config=config)
    assert pipe.transformer.dtype == pipe.backbone.dtype == dtype
    assert (drawn(pipe) - drawn(loaded(saved_pipeline))).abs().mean() < MOST_DIFFERENCE[kind] + MORE_IN_HALF_PRECISION


@needs_torchao
@KINDS
def test_bytes_are_those_in_memory(quantized, saved_pipeline, kind):
    linear = quantized[kind].transformer.layers[0].mlp.up_proj.weight
    rows, columns = linear.shape
    assert linear.qdata.dtype == {"int8": torch.int8, "fp8": torch.float8_e4m3fn}[kind]
    scales = rows * (5 if kind == "int8" else 4)  # float32, and torchao's zero points of int8, which are all zero
    assert stored_bytes(linear) == rows * columns + scales
    assert linear.nbytes == 4 * rows * columns  # what it says of itself
    assert weight_bytes(quantized[kind].transformer.layers[0].mlp.up_proj) == stored_bytes(linear)
    cost, plain = cost_of(quantized[kind], steps=2), cost_of(loaded(saved_pipeline), steps=2)
    assert (cost.dtype, cost.quantization, plain.quantization) == ("float32", kind, None)
    assert cost.parameters == plain.parameters
    assert cost.weight_bytes < plain.weight_bytes
    parts = (quantized[kind].backbone, quantized[kind].transformer, quantized[kind].vae)
    packed = [w for part in parts for w in part.parameters() if hasattr(w, "qdata")]
    saved = sum(w.nbytes - stored_bytes(w) for w in packed)
    assert cost.weight_bytes == plain.weight_bytes - saved


@needs_torchao
@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_to_a_folder_and_back_in_safetensors(saved_pipeline, tmp_path, kind, dtype):
    pipe = loaded(saved_pipeline, dtype=dtype, quantization_config=quantization_config(kind))
    pipe.save_pretrained(tmp_path)
    assert {file.suffix for file in tmp_path.rglob("*") if file.is_file()} <= {".json", ".safetensors", ".jinja"}
    again = loaded(tmp_path)
    assert quantization_of(again.transformer) == quantization_of(again.backbone) == kind
    assert again.transformer.dtype == again.backbone.dtype == again.vae.dtype == dtype
    assert torch.equal(drawn(again), drawn(pipe))
    with pytest.raises(UserError, match=f"was quantised in {str(dtype).removeprefix('torch.')}: give that as dtype"):
        loaded(tmp_path, dtype=torch.float16)
    with pytest.raises(UserError, match="holds quantised weights: load it without quantization_config"):
        loaded(tmp_path, quantization_config=quantization_config("int8"))


@needs_torchao
def test_a_backbone_found_by_its_name_is_quantised_too(saved_pipeline, tmp_path):
    pipe = toy_pipeline(backbone_name=str(saved_pipeline / "backbone"))
    pipe.save_pretrained(tmp_path, include_backbone=False)
    again = loaded(tmp_path, quantization_config=quantization_config("int8"))
    assert quantization_of(again.backbone) == quantization_of(again.transformer) == "int8"


@needs_torchao
def test_lacking_weights_are_refused_whether_they_are_quantised_or_not(saved_pipeline, tmp_path):
    shutil.copytree(saved_pipeline, tmp_path / "model")
    leave_out(tmp_path / "model" / "backbone", "up_proj")
    with pytest.raises(UserError, match="the backbone's files hold"):
        loaded(tmp_path / "model", quantization_config=quantization_config("int8"))


@needs_torchao
@KINDS
def test_lacking_weights_of_quantised_files_are_refused(quantized, tmp_path, kind):
    for part, lacking, message in (
        ("backbone", "layers.0.mlp.up_proj", "the backbone's files hold"),
        ("backbone", "layers.0.input_layernorm", "the backbone's files hold"),
        ("transformer", "layers.0.mlp.up_proj", "the transformer's files lack"),
    ):
        folder = tmp_path / part / lacking
        quantized[kind].save_pretrained(folder)
        leave_out(folder / part, lacking)
        with pytest.raises(UserError, match=message):
            loaded(folder)


def test_weights_quantised_in_another_way_may_be_fewer_elements(tmp_path):
    part = tmp_path / "backbone"
    part.mkdir()
    (part / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "bitsandbytes_4bit"}}))
    save_file({"weight": torch.zeros(8, dtype=torch.uint8)}, part / "model.safetensors")
    whole, nothing = torch.nn.Linear(4, 4, bias=False), torch.nn.Module()
    require_weights(tmp_path, whole, nothing, nothing)
    (part / "config.json").write_text("{}")
    with pytest.raises(UserError, match="the backbone's files hold 8 of its 16 weights"):
        require_weights(tmp_path, whole, nothing, nothing)


def leave_out(part, word):
    """Take the weights whose names hold a word out of a part's file."""
    (file,) = part.glob("*.safetensors")
    with safe_open(file, framework="pt") as tensors:
        metadata = tensors.metadata()
    kept = {key: value for key, value in load_file(file).items() if word not in key}
    save_file(kept, file, metadata=metadata)


@needs_torchao
@KINDS
def test_adapters_learn_beside_quantised_weights_and_are_saved(saved_pipeline, tmp_path, kind):
    from peft import get_peft_model_state_dict

    def fresh():
        return loaded(saved_pipeline, quantization_config=quantization_config(kind))

    pipe = fresh()
    replica = pipe.transformer
    replica.add_adapter(lora_config(replica, rank=2))
    trained = [p for p in replica.parameters() if p.requires_grad]
    before = drawn(pipe)
    optimizer = torch.optim.SGD(trained, lr=1.0)
    for _ in range(2):
        v = replica(torch.ones(1, 4, 4, 4), torch.tensor([0.3]), pipe.encode_prompt(["a red circle"]))
        v.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = drawn(pipe)
    assert not torch.equal(before, after)
    config = replica.peft_config["default"].to_dict()
    LatteFlowPipeline.save_lora_weights(
        tmp_path, get_peft_model_state_dict(replica), transformer_lora_adapter_metadata=config
    )
    with pytest.raises(ValueError, match="Casting a quantized model"):
        replica.save_lora_adapter(tmp_path / "refused")
    again = fresh()
    again.load_lora_weights(tmp_path)
    torch.testing.assert_close(drawn(again), after, atol=1e-5, rtol=0)
    again.transformer.fuse_lora()
    again.transformer.unload_lora()
    assert quantization_of(again.transformer) == kind
    assert 0 < (drawn(again) - after).abs().mean() < MOST_DIFFERENCE[kind]


@needs_torchao
def test_another_dtype_after_loading_is_refused(saved_pipeline):
    pipe = loaded(saved_pipeline, quantization_config=quantization_config("int8"))
    with pytest.raises(ValueError, match="Casting a quantized model"):
        pipe.to(torch.float16)
    assert {part.dtype for part in (pipe.backbone, pipe.transformer, pipe.vae)} == {torch.float32, torch.float16}


@needs_torchao
def test_group_residency_is_refused(quantized, saved_pipeline, tmp_path):
    with pytest.raises(UserError, match="not quantised ones, can leave"):
        quantized["int8"].enable_group_residency(saved_pipeline)
    quantized["int8"].save_pretrained(tmp_path)
    with pytest.raises(UserError, match="holds quantised weights: only plain ones"):
        transformer_without_layers(tmp_path)
    with pytest.raises(UserError, match="holds quantised weights: only plain ones"):
        loaded(saved_pipeline).enable_group_residency(tmp_path)


def test_unknown_names_are_refused():
    with pytest.raises(UserError, match="there is no quantization 'int3': give int8 or fp8"):
        quantization_config("int3")


def test_without_torchao_the_extra_is_named(monkeypatch, saved_pipeline, tmp_path):
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'need torchao: pip install "latteflow\[quantize\]"'):
        quantization_config("int8")
    shutil.copytree(saved_pipeline / "transformer", tmp_path / "transformer")
    assert quantized_settings(tmp_path, {"revision": "main"}) == {"revision": "main"}
    make_quantized(tmp_path / "transformer")
    with pytest.raises(UserError, match=r'need torchao: pip install "latteflow\[quantize\]"'):
        quantized_settings(tmp_path, {})


def make_quantized(part):
    """Make a part's files look like torchao's as far as their headers go."""
    config = json.loads((part / "config.json").read_text())
    (part / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "torchao"}}))
    (file,) = part.glob("*.safetensors")
    note = {"_type": "Int8Tensor", "_data": {"dtype": {"_data": "bfloat16"}}, "_tensor_data_names": ["qdata"]}
    save_file(load_file(file), file, metadata={"some.weight": json.dumps(note)})
