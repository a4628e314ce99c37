"""From a backbone to a pipeline, to a folder and back; nothing that holds code is loaded."""

import json

import pytest
import torch
from safetensors import safe_open

from latteflow import LatteFlowPipeline
from latteflow.errors import UserError
from latteflow.models import loading
from latteflow.models.autoencoder import small_autoencoder
from toys import seeded, shake, toy_backbone, toy_picture, toy_processor, toy_tokenizer, toy_vae

SETTINGS = {"num_inference_steps": 2, "output_type": "pt"}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A backbone and an autoencoder, as their own libraries save them."""
    folder = tmp_path_factory.mktemp("hub")
    tokenizer = toy_tokenizer()
    toy_backbone(tokenizer).save_pretrained(folder / "backbone")
    processor = toy_processor(tokenizer)
    processor.tokenizer.save_pretrained(folder / "backbone")
    processor.image_processor.save_pretrained(folder / "backbone")
    toy_vae().save_pretrained(folder / "vae")
    return folder


def built(hub, **settings):
    torch.manual_seed(0)
    pipe = LatteFlowPipeline.from_backbone(
        str(hub / "backbone"), str(hub / "vae"), num_groups=2, size=32, time_embedding_size=16, **settings
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe, **settings):
    return pipe("a red circle", generator=seeded(), **{**SETTINGS, **settings}).images


def test_a_backbone_becomes_a_pipeline_ready_to_be_trained(hub):
    pipe = built(hub)
    config = pipe.transformer.config
    assert (config.num_groups, config.latent_channels, config.sample_size) == (2, 4, 4)
    assert (config.backbone_name, config.backbone_revision) == (str(hub / "backbone"), None)
    assert not any(p.requires_grad for p in pipe.backbone.parameters())
    assert all(p.requires_grad for p in pipe.transformer.parameters())
    for source, layer in zip(pipe.backbone.model.language_model.layers, pipe.transformer.layers, strict=True):
        assert torch.equal(layer.mlp.down_proj.weight, source.mlp.down_proj.weight)
    assert drawn(pipe).shape == (1, 3, 32, 32)


def test_the_processor_is_the_backbones(hub):
    pipe, own = built(hub), toy_processor()
    image = toy_picture("circle", "red", "solid")
    prompt = own.chat_prompt("What is this?", pictures=1)
    assert pipe.processor.chat_prompt("What is this?", pictures=1) == prompt
    for name, value in own(prompt, [image]).items():
        assert torch.equal(pipe.processor(prompt, [image])[name], value)


@pytest.mark.parametrize("file", ["chat_template.jinja", "chat_template.json"])
def test_the_chat_template_beside_the_model_comes_first(hub, tmp_path, file):
    for source in (hub / "backbone").iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    words = "{{ messages[0].role }}!"
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    (tmp_path / file).write_text(json.dumps({"chat_template": words}) if file.endswith("json") else words)
    pipe = LatteFlowPipeline.from_backbone(str(tmp_path), str(hub / "vae"), num_groups=2, size=32)
    assert pipe.processor.chat_prompt("What?") == "user!"


def test_parts_that_are_at_hand_need_no_folder(hub):
    backbone, processor = toy_backbone(), toy_processor()
    pipe = LatteFlowPipeline.from_backbone(
        backbone, toy_vae(), num_groups=4, size=64, processor=processor, residual_attention="none"
    )
    assert pipe.backbone is backbone
    assert (pipe.transformer.config.sample_size, pipe.transformer.config.residual_attention) == (8, "none")


def test_a_published_autoencoder_is_found_by_its_name(monkeypatch):
    asked = []
    monkeypatch.setattr(
        loading.AutoencoderDC, "from_pretrained", lambda name, **settings: asked.append(name) or toy_vae()
    )
    loading.load_autoencoder("dc-ae-f32c32-sana-1.0", torch.float32)
    loading.load_autoencoder("someone/other", torch.float32)
    assert asked == ["mit-han-lab/dc-ae-f32c32-sana-1.0-diffusers", "someone/other"]


def test_a_dtype_is_everyones(hub):
    pipe = built(hub, dtype=torch.bfloat16)
    assert {p.dtype for part in (pipe.backbone, pipe.transformer, pipe.vae) for p in part.parameters()} == {
        torch.bfloat16
    }
    assert torch.isfinite(drawn(pipe)).all()


@pytest.mark.parametrize("shard", [None, "20KB"])
@pytest.mark.parametrize("include_backbone", [True, False])
def test_saved_and_loaded_draws_the_same(hub, tmp_path, include_backbone, shard):
    pipe = built(hub)
    shake(pipe.transformer, seeded(3))
    settings = {} if shard is None else {"max_shard_size": shard}
    pipe.save_pretrained(tmp_path, include_backbone=include_backbone, **settings)
    assert (tmp_path / "backbone").exists() == include_backbone
    assert (len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1) == (shard is not None)
    assert not [file for file in tmp_path.rglob("*") if file.suffix in (".bin", ".py", ".pt")]
    loaded = LatteFlowPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(drawn(loaded), drawn(pipe))
    image = toy_picture("circle", "red", "solid")
    assert loaded.ask(image, "What?") == pipe.ask(image, "What?")
    assert pipe.backbone is not None


@pytest.mark.parametrize("relative", [False, True])
def test_a_saved_model_does_not_tell_where_its_parts_came_from(hub, tmp_path, monkeypatch, relative):
    monkeypatch.chdir(tmp_path)
    built(hub).save_pretrained(tmp_path / "once")
    again = LatteFlowPipeline.from_pretrained("once" if relative else str(tmp_path / "once"))
    again.save_pretrained(tmp_path / "twice")
    files = list((tmp_path / "twice").rglob("*.json"))
    assert [file.name for file in files if str(tmp_path) in file.read_text() or "once" in file.read_text()] == []
    assert len(files) > 4
    assert torch.equal(drawn(LatteFlowPipeline.from_pretrained(str(tmp_path / "twice"))), drawn(again))


def test_without_the_backbone_only_the_replica_and_small_parts_are_stored(hub, tmp_path):
    pipe = built(hub)
    pipe.save_pretrained(tmp_path, include_backbone=False)
    stored = {}
    for file in tmp_path.rglob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            stored[file.parent.name] = sum(tensors.get_tensor(name).numel() for name in tensors.keys())  # noqa: SIM118
    count = {name: sum(p.numel() for p in getattr(pipe, name).parameters()) for name in ("transformer", "vae")}
    assert stored == count
    config = json.loads((tmp_path / "transformer" / "config.json").read_text())
    assert config["backbone_name"] == str(hub / "backbone")


def test_a_backbone_without_a_name_cannot_be_left_out(hub, tmp_path):
    pipe = LatteFlowPipeline.from_backbone(
        toy_backbone(), toy_vae(), num_groups=2, size=32, processor=toy_processor(), backbone_name=None
    )
    with pytest.raises(UserError, match="does not know its backbone's name"):
        pipe.save_pretrained(tmp_path / "model", include_backbone=False)
    assert not (tmp_path / "model").exists()


def test_a_backbone_at_hand_takes_the_place_of_the_named_one(hub, tmp_path):
    pipe = built(hub)
    pipe.save_pretrained(tmp_path, include_backbone=False)
    other = toy_backbone(seed=7)
    assert LatteFlowPipeline.from_pretrained(tmp_path, backbone=other).backbone is other


def test_a_named_backbone_that_is_gone_is_said(hub, tmp_path):
    pipe = built(hub, backbone_name=None)
    pipe.transformer.register_to_config(backbone_name=str(tmp_path / "gone"))
    pipe.save_pretrained(tmp_path / "model", include_backbone=False)
    with pytest.raises((UserError, OSError), match="gone"):
        LatteFlowPipeline.from_pretrained(tmp_path / "model")
    config = tmp_path / "model" / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "backbone_name": None}))
    with pytest.raises(UserError, match="pass backbone="):
        LatteFlowPipeline.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("name", ["backbone", "vae", "pipeline"])
@pytest.mark.parametrize("file", ["modeling.py", "pytorch_model.bin", "weights.pt", "deep/er/x.pkl", "a.ckpt", "b.pth"])
def test_code_and_pickles_are_refused_with_advice(hub, tmp_path, name, file):
    built(hub).save_pretrained(tmp_path / "pipeline")
    for part in ("backbone", "vae"):
        for source in (hub / part).iterdir():
            (tmp_path / part).mkdir(exist_ok=True)
            (tmp_path / part / source.name).write_bytes(source.read_bytes())
    place = tmp_path / name / file
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(b"x")

    def load():
        if name == "pipeline":
            return LatteFlowPipeline.from_pretrained(tmp_path / "pipeline")
        return LatteFlowPipeline.from_backbone(str(tmp_path / "backbone"), str(tmp_path / "vae"), num_groups=2, size=32)

    with pytest.raises(UserError, match=f"{place.name} is not safe .* convert them"):
        load()


@pytest.mark.parametrize("part", ["backbone", "transformer", "processor"])
def test_a_configuration_that_asks_for_code_is_refused(hub, tmp_path, part):
    built(hub).save_pretrained(tmp_path)
    file = next((tmp_path / part).glob("*config.json"))
    file.write_text(json.dumps({**json.loads(file.read_text()), "auto_map": {"AutoModel": "a.B"}}))
    with pytest.raises(UserError, match="asks for code"):
        LatteFlowPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("setting", [{"trust_remote_code": True}, {"custom_pipeline": "x"}])
def test_settings_that_run_code_are_refused(hub, setting):
    with pytest.raises(UserError, match="no code that comes with a model"):
        LatteFlowPipeline.from_pretrained("emoji-64", **setting)


@pytest.mark.parametrize("size", [0, 20, -32])
def test_a_size_that_is_no_multiple_of_the_factor_is_refused(hub, size):
    with pytest.raises(UserError, match=f"size {size} does not do: give a multiple of the autoencoder's factor 8"):
        LatteFlowPipeline.from_backbone(str(hub / "backbone"), str(hub / "vae"), num_groups=2, size=size)


def test_an_unknown_kind_is_refused_before_its_weights_are_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UserError, match="'bert' is not supported"):
        LatteFlowPipeline.from_backbone(str(tmp_path), toy_vae(), num_groups=2)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"holds no config\.json"):
        LatteFlowPipeline.from_backbone(str(tmp_path), toy_vae(), num_groups=2)


@pytest.mark.parametrize(("height", "width"), [(256, 256), (512, 256), (512, 512), (256, 768), (1024, 1024)])
def test_an_autoencoder_of_factor_32_draws_real_sizes(height, width):
    torch.manual_seed(0)
    vae = small_autoencoder(latent_channels=4, widths=(8,) * 6, layers=(0, 1, 1, 1, 1, 1)).eval()
    pipe = LatteFlowPipeline.from_backbone(
        toy_backbone(), vae, num_groups=2, size=256, time_embedding_size=16, processor=toy_processor()
    )
    pipe.set_progress_bar_config(disable=True)
    assert pipe.spatial_factor == 32
    tokens = []
    pipe.transformer.layers[0].register_forward_pre_hook(lambda _, args: tokens.append(args[0].shape[1]))
    assert drawn(pipe, height=height, width=width).shape == (1, 3, height, width)
    assert tokens == [height * width // 1024]
    assert drawn(pipe).shape == (1, 3, 256, 256)


def test_weights_go_straight_to_a_device(hub):
    pipe = built(hub, device="cpu")
    assert {p.device.type for part in (pipe.backbone, pipe.transformer, pipe.vae) for p in part.parameters()} == {"cpu"}
    assert torch.equal(drawn(pipe), drawn(built(hub)))


@pytest.mark.parametrize("size", [(32, 32), (64, 32), (32, 96), (128, 128)])
def test_draws_square_and_other_sizes(hub, size):
    height, width = size
    assert drawn(built(hub), height=height, width=width).shape == (1, 3, height, width)
