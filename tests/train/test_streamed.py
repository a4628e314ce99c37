"""Feeds that read sample by sample: pictures and latents ahead of time train the same replica."""

import pytest
import torch
from safetensors.torch import load_file

from latteflow import LatteFlowPipeline
from latteflow.errors import UserError
from latteflow.train.build import build_stage
from latteflow.train.checkpoint import newest_checkpoint
from latteflow.train.encode import encode
from latteflow.train.encode_job import job_of
from latteflow.train.loop import train
from latteflow.train.recipe import GeneratorRecipe, LoraSection
from latteflow.train.samples import step_samples


def recipe(output, parts, data, **train_settings):
    return GeneratorRecipe(
        stage="generator",
        output=str(output),
        data={"kind": "shapes", "path": "", "size": 32, "validation": 4, **data},
        train={
            "steps": 4,
            "batch_size": 6,
            "warmup_steps": 1,
            "mixed_precision": "no",
            "log_every": 1,
            "preview_every": 4,
            "checkpoint_every": 2,
            "tracker": "none",
            "cpu_threads": 1,
            **train_settings,
        },
        generator={
            "autoencoder": f"{parts}/autoencoder",
            "backbone": f"{parts}/backbone",
            "num_groups": 2,
            "time_embedding_size": 16,
            "preview_prompts": ["red circle"],
        },
        encode={"output": str(output / "latents"), "shard_size": 16, "batch_size": 5, "dtype": "float32"},
    )


def run(given):
    stage, losses, ids = build_stage(given), [], []
    loss = stage.loss

    def recorded(model, samples, data):
        ids.append(samples.index.tolist())
        return loss(model, samples, data)

    stage.loss = recorded
    train(given, stage, watch=lambda progress: losses.append(progress.loss))
    return losses, ids, load_file(newest_checkpoint(given_output(given)) / "model.safetensors")


def given_output(given):
    from pathlib import Path

    return Path(given.output)


@pytest.mark.parametrize("contexts", [False, True])
def test_training_from_latents_is_training_from_pictures(tmp_path, parts, contexts, monkeypatch):
    pictures = recipe(tmp_path / "pictures", parts, {})
    job = job_of(pictures.model_copy(update={"encode": pictures.encode.model_copy(update={"contexts": contexts})}))
    shards = encode(job)
    latents = recipe(tmp_path / "latents", parts, {"kind": "latents", "path": pictures.encode.output})
    # The statistics are of what is trained on here, of all there is there: the one difference, taken away.
    monkeypatch.setattr(type(build_stage(pictures).feed), "statistics", lambda self, vae: (shards.mean, shards.std))
    expected, found = run(pictures), run(latents)
    assert found[1] == expected[1]
    assert found[0] == pytest.approx(expected[0], rel=1e-2 if contexts else 1e-5)  # contexts are kept in bfloat16
    for name, weight in expected[2].items():
        torch.testing.assert_close(found[2][name], weight, rtol=0, atol=2e-2 if contexts else 1e-5)


def test_worker_processes_read_the_same(tmp_path, parts):
    alone, helped = (run(recipe(tmp_path / str(n), parts, {}, workers=n)) for n in (0, 2))
    assert alone[:2] == helped[:2]
    assert all(torch.equal(alone[2][name], helped[2][name]) for name in alone[2])


def test_validation_samples_are_not_trained_on(tmp_path, parts):
    stage = build_stage(recipe(tmp_path, parts, {"validation": 10}))
    assert stage.number == len(stage.feed.source) - 10
    stage.to(torch.device("cpu"))
    pictures = sum(len(latents) for latents, _ in stage.feed.validation())
    assert pictures == 10
    assert stage.validate()["loss"] > 0
    assert build_stage(recipe(tmp_path, parts, {"validation": 0})).number == len(stage.feed.source)


def test_dropped_prompts_are_the_empty_prompt(tmp_path, parts):
    stage = build_stage(recipe(tmp_path, parts, {}))
    stage.to(torch.device("cpu"))
    (samples,) = step_samples(0, number=stage.number, batch_size=3, seed=0)
    data = stage.read(samples)
    _, dropped = stage.feed.inputs(samples, data, 1.0)
    empty = stage.pipe.encode_prompt(["", "", ""])
    assert torch.equal(dropped.keys, empty.keys)
    _, kept = stage.feed.inputs(samples, data, 0.0)
    assert torch.equal(kept.keys, stage.pipe.encode_prompt(data[1]).keys)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ({"size": None}, "data.size is missing"),
        ({"buckets": True}, "encode first"),
        ({"validation": 10_000}, "none is left to train on"),
        ({"kind": "latents", "path": "nowhere"}, "nowhere"),
        ({"kind": "image_folder", "path": "nowhere"}, "nowhere"),
    ],
)
def test_data_that_cannot_be_trained_on_is_refused(tmp_path, parts, data, reason):
    with pytest.raises(UserError, match=reason):
        build_stage(recipe(tmp_path, parts, data))


def test_latents_of_another_autoencoder_are_refused(tmp_path, parts):
    pictures = recipe(tmp_path / "pictures", parts, {})
    encode(job_of(pictures))
    other = recipe(tmp_path / "latents", parts, {"kind": "latents", "path": pictures.encode.output})
    other = other.model_copy(update={"generator": other.generator.model_copy(update={"autoencoder": "emoji-64"})})
    with pytest.raises(UserError, match=r"autoencoder\.sha256"):
        build_stage(other)


def adapted(given):
    return given.model_copy(update={"generator": given.generator.model_copy(update={"lora": LoraSection(rank=2)})})


def test_adapters_alone_are_trained_and_left_beside_the_whole(tmp_path, parts):
    given = adapted(recipe(tmp_path, parts, {}))
    stage = build_stage(given)
    before = {name: p.clone() for name, p in stage.model.named_parameters() if not p.requires_grad}
    final = train(given, stage)
    saved = load_file(newest_checkpoint(tmp_path) / "model.safetensors")
    assert saved
    assert all("lora" in name for name in saved)
    after = dict(stage.model.named_parameters())
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    whole = LatteFlowPipeline.from_pretrained(final)
    start = build_stage(recipe(tmp_path / "start", parts, {})).pipe.transformer
    start.load_lora_adapter(final / "lora", prefix=None, use_safetensors=True)
    start.fuse_lora()
    start.unload_lora()
    for name, weight in whole.transformer.state_dict().items():
        torch.testing.assert_close(start.state_dict()[name], weight, rtol=0, atol=1e-6)


def test_a_run_starts_from_a_trained_replica(tmp_path, parts):
    final = train(recipe(tmp_path / "first", parts, {}), build_stage(recipe(tmp_path / "first", parts, {})))
    trained = LatteFlowPipeline.from_pretrained(final).transformer.state_dict()
    again = recipe(tmp_path / "second", parts, {})
    again = again.model_copy(update={"generator": again.generator.model_copy(update={"start_from": str(final)})})
    for name, weight in build_stage(again).pipe.transformer.state_dict().items():
        assert torch.equal(weight, trained[name]), name


@pytest.mark.parametrize(("name", "reason"), [("nowhere", "no trained pipeline"), ("emoji-64", "does not fit")])
def test_a_start_that_does_not_do_is_refused(tmp_path, parts, name, reason):
    given = recipe(tmp_path, parts, {})
    given = given.model_copy(update={"generator": given.generator.model_copy(update={"start_from": name})})
    with pytest.raises(UserError, match=reason):
        build_stage(given)
