"""Feeds that read sample by sample: pictures and latents ahead of time train the same replica."""

import shutil

import pytest
import torch
from diffusers import AutoencoderDC
from safetensors.torch import load_file

from latteflow import LatteFlowPipeline
from latteflow.data.sources.shapes import Shapes
from latteflow.errors import UserError
from latteflow.train import encode_parts
from latteflow.train.build import build_stage
from latteflow.train.checkpoint import newest_checkpoint
from latteflow.train.encode import encode
from latteflow.train.encode_job import job_of
from latteflow.train.loop import train
from latteflow.train.recipe import GeneratorRecipe, LoraSection
from latteflow.train.samples import step_samples
from picture_sets import BROKEN, encoded, picture, write_image_folder
from toys import toy_backbone


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


def an_epoch(stage, batch_size=4):
    """The numbers of all samples that the steps of two epochs take."""
    steps = range(-(-2 * stage.number // batch_size))
    return torch.cat([stage.indices(step, batch_size, 0) for step in steps]).unique().tolist()


def test_validation_samples_are_not_trained_on(tmp_path, parts):
    stage = build_stage(recipe(tmp_path, parts, {"validation": 10}))
    source = stage.feed.source
    assert stage.number == len(source) - 10
    read = []
    good, source.good = source.good, lambda index: read.append(index) or good(index)
    stage.to(torch.device("cpu"))
    assert sum(len(latents) for latents, _ in stage.feed.validation()) == 10
    assert sorted([*read, *an_epoch(stage)]) == list(range(len(source)))
    assert sorted(read) != list(range(len(source) - 10, len(source)))
    read.clear()
    stage.feed.statistics(stage.pipe.vae)
    assert sorted(read) == an_epoch(stage)
    assert stage.validate()["loss"] > 0
    assert build_stage(recipe(tmp_path, parts, {"validation": 0})).number == len(source)


def class_folder(folder):
    """Five classes of eight pictures of three shapes, the third and the sixth of each broken."""
    write_image_folder(folder, dict.fromkeys("abcde", 8))
    for number, file in enumerate(sorted(folder.rglob("*.png"))):
        shape = [(40, 40), (64, 40), (40, 64)][number % 3]
        file.write_bytes(BROKEN["cut.png"] if number % 8 in (2, 5) else encoded(picture(number, *shape)))
    return {"kind": "image_folder", "path": str(folder), "quarantine_limit": 0.5, "validation": 14}


def test_latents_keep_apart_what_pictures_do_though_some_are_bad(tmp_path, parts):
    data = class_folder(tmp_path / "set")
    pictures = recipe(tmp_path / "pictures", parts, data)
    shards = encode(job_of(pictures))
    latents = recipe(tmp_path / "latents", parts, {**data, "kind": "latents", "path": pictures.encode.output})
    one, other = build_stage(pictures), build_stage(latents)
    names = [one.feed.source.name(i) for i in range(len(one.feed.source))]
    bad = {name for i, name in enumerate(names) if i % 8 in (2, 5)}
    assert {shards.name(i) for i in an_epoch(other)} == {names[i] for i in an_epoch(one)} - bad
    assert 0 < len({names[i] for i in an_epoch(one)} & bad) < len(bad)  # of both kinds some are bad
    assert one.number == 26
    for stage in (one, other):
        stage.pipe.transformer.register_to_config(latents_mean=shards.mean, latents_std=shards.std)
        stage.to(torch.device("cpu"))
    assert sum(len(x) for x, _ in other.feed.validation()) == len(shards) - other.number
    for (x, words), (their_x, their_words) in zip(one.feed.validation(), other.feed.validation(), strict=True):
        torch.testing.assert_close(x, their_x)
        torch.testing.assert_close(words.keys, their_words.keys)


def test_for_a_bad_picture_none_that_is_kept_apart_stands_in(tmp_path, parts):
    feed = build_stage(recipe(tmp_path / "run", parts, class_folder(tmp_path / "set"))).feed
    trained, found = set(an_epoch(feed)), set()
    good, feed.source.good = feed.source.good, lambda index: found.add(index) or good(index)
    for step in range(30):
        feed.read(*step_samples(step, number=feed.number, batch_size=4, seed=0, index=feed.indices(step, 4, 0)))
    assert found == trained


def test_latents_of_several_sizes_are_kept_apart_too(tmp_path, parts):
    data = {**class_folder(tmp_path / "set"), "buckets": True}
    pictures = recipe(tmp_path / "pictures", parts, data)
    shards = encode(job_of(pictures))
    square = encode(job_of(recipe(tmp_path / "square", parts, {**data, "buckets": False})))
    assert len(shards.buckets.unique()) == 3
    stages = [
        build_stage(recipe(tmp_path / "latents", parts, {**data, "kind": "latents", "path": str(folder.folder)}))
        for folder in (shards, square)
    ]
    assert an_epoch(stages[0], 2) == an_epoch(stages[1])
    for step in range(30):
        assert len(shards.buckets[stages[0].indices(step, 4, 0)].unique()) == 1
    stages[0].to(torch.device("cpu"))
    assert sum(len(x) for x, _ in stages[0].feed.validation()) == len(shards) - stages[0].number


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


def test_contexts_of_another_backbone_are_refused(tmp_path, parts):
    pictures = recipe(tmp_path / "pictures", parts, {})
    pictures = pictures.model_copy(update={"encode": pictures.encode.model_copy(update={"contexts": True})})
    encode(job_of(pictures))
    other = shutil.copytree(parts / "backbone", tmp_path / "other")
    toy_backbone(seed=3).save_pretrained(other)
    latents = recipe(tmp_path / "latents", parts, {"kind": "latents", "path": pictures.encode.output})
    build_stage(latents)
    changed = latents.model_copy(
        update={"generator": latents.generator.model_copy(update={"backbone": str(tmp_path / "other")})}
    )
    with pytest.raises(UserError, match=rf"of backbone '{parts}/backbone' .*the recipe's is '{other}'") as mistake:
        build_stage(changed)
    assert "\n" not in str(mistake.value)
    (tmp_path / "pictures/latents/manifest.json").unlink()
    encode(job_of(recipe(tmp_path / "pictures", parts, {})))
    build_stage(changed)  # without contexts, the latents are any backbone's


@pytest.mark.parametrize("kind", ["shapes", "latents"])
def test_each_frozen_part_is_loaded_once(tmp_path, parts, monkeypatch, kind):
    pictures = recipe(tmp_path, parts, {})
    pictures = pictures.model_copy(update={"encode": pictures.encode.model_copy(update={"contexts": True})})
    encode(job_of(pictures))
    loaded = []
    for part, holder, name in (("vae", AutoencoderDC, "from_pretrained"), ("backbone", encode_parts, "load_backbone")):
        load = getattr(holder, name)
        monkeypatch.setattr(
            holder, name, lambda *given, load=load, part=part, **named: loaded.append(part) or load(*given, **named)
        )
    build_stage(recipe(tmp_path / "run", parts, {"kind": kind, "path": pictures.encode.output}))
    assert sorted(loaded) == ["backbone", "vae"]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("error", [UserError("sample 7 is of the wrong kind: take another"), OSError(116, "Stale")])
def test_what_a_worker_process_cannot_read_is_told_in_one_line(tmp_path, parts, monkeypatch, workers, error):
    given = recipe(tmp_path, parts, {}, workers=workers)
    stage, steps = build_stage(given), []

    def fails(source, index):
        if index == stage.indices(2, 6, 0)[3]:
            raise error
        return read(source, index)

    read = Shapes.read
    monkeypatch.setattr(Shapes, "read", fails)
    with pytest.raises(type(error)) as told:
        train(given, stage, watch=lambda progress: steps.append(progress.step))
    assert str(told.value) == str(error)
    assert steps == [1, 2]


def test_a_fault_in_a_worker_process_keeps_its_traceback(tmp_path, parts, monkeypatch):
    given = recipe(tmp_path, parts, {}, workers=1)
    stage = build_stage(given)

    def is_wrong(source, index):
        raise ValueError("no such thing")

    monkeypatch.setattr(Shapes, "read", is_wrong)
    with pytest.raises(ValueError, match=r"(?s)Original Traceback.*in is_wrong.*no such thing") as told:
        train(given, stage)
    assert not isinstance(told.value, UserError)


def test_a_damaged_shard_of_several_sizes_is_told_before_training(tmp_path, parts):
    data = class_folder(tmp_path / "set")
    given = recipe(tmp_path / "pictures", parts, {**data, "buckets": True})
    shards = encode(job_of(given))
    damaged = shards.folder / "latents-00001.safetensors"
    damaged.write_bytes(b"\xff" * damaged.stat().st_size)
    latents = {**data, "kind": "latents", "path": str(shards.folder)}
    with pytest.raises(UserError, match=r"latents-00001\.safetensors .*delete it and encode again"):
        build_stage(recipe(tmp_path / "latents", parts, latents))


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
