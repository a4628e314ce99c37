"""Encoding ahead of training: the same bytes whoever does the work, and however often it was interrupted."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from latteflow.data import shards
from latteflow.data.latents import LatentShards
from latteflow.data.sizes import as_input, bucket_sizes, fitted, nearest_size
from latteflow.data.sources import open_source
from latteflow.data.sources.parquet import ParquetStream
from latteflow.errors import UserError
from latteflow.models.autoencoder import encode_pictures
from latteflow.pipeline import LatteFlowPipeline
from latteflow.train.encode import EncodeJob, EncodeProgress, encode
from latteflow.train.encode_job import job_of
from latteflow.train.encode_parts import load_encoder, load_prompter
from latteflow.train.recipe import EncodeSection, GeneratorRecipe
from picture_sets import BROKEN, ListSource, encoded, picture, write_image_folder, write_parquet, write_webdataset
from toys import toy_vae


def pictures(number, bad=()):
    """Pictures of all shapes, some of them bad."""
    shapes = [(40, 40), (64, 40), (40, 64), (33, 31), (90, 60)]
    return ListSource({f"{i:03d}": None if i in bad else picture(i, *shapes[i % 5]) for i in range(number)})


def job(parts, folder, source=None, **settings):
    settings = {"shard_size": 8, "batch_size": 3, "quarantine_limit": 0.5, "device": "cpu", "readers": 2, **settings}
    return EncodeJob(source or pictures(20), folder, f"{parts}/autoencoder", 32, **settings)


def files(folder):
    """Every file's bytes, to compare a whole run with another."""
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_latents_are_what_the_autoencoder_says(parts, tmp_path):
    """Each of its own picture, at its own size, scaled by the factor, to the bit."""
    source = pictures(20, bad=(3, 8))
    latents = encode(job(parts, tmp_path, source, buckets=True, batch_size=1, dtype="float32"))
    vae, identity = load_encoder(f"{parts}/autoencoder")
    sizes = bucket_sizes(32, factor=8, most_aspect=2)
    assert latents.sizes == list(sizes)
    assert len(sizes) > 1
    good = [i for i in range(20) if i not in (3, 8)]
    assert [latents.name(i) for i in range(len(latents))] == [f"{i:03d}" for i in good]
    config = type("Config", (), {"latents_mean": (), "latents_std": ()})
    for index, i in enumerate(good):
        sample = source.read(i)
        bucket = nearest_size(*sample.picture.size, sizes)
        with torch.no_grad():
            wanted = encode_pictures(vae, config, as_input(fitted(sample.picture, sizes[bucket]))[None])
        assert torch.equal(latents.latent(index), wanted[0]), i
        assert latents.caption(index) == sample.caption
        assert int(latents.buckets[index]) == bucket
    assert set(latents.buckets.tolist()) == {nearest_size(*shape, sizes) for shape in ((1, 1), (64, 40), (40, 64))}
    manifest = latents.manifest
    assert manifest["autoencoder"] == identity
    assert identity["sha256"] == load_encoder(f"{parts}/autoencoder")[1]["sha256"]
    assert [entry["samples"] for entry in manifest["shards"]] == [7, 7, 4]
    assert (manifest["samples"], manifest["bad"], manifest["size"]) == (18, 2, 32)
    latents.verify()


def test_mean_and_spread_are_of_all_latents(parts, tmp_path):
    latents = encode(job(parts, tmp_path, buckets=True))
    every = torch.cat([latents.latent(i).double().flatten(1) for i in range(len(latents))], dim=1)
    assert torch.allclose(torch.tensor(latents.mean).double(), every.mean(1), atol=1e-12)
    assert torch.allclose(torch.tensor(latents.std).double(), every.std(1, correction=0), atol=1e-12)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_latents_are_kept_as_asked(parts, tmp_path, dtype):
    latents = encode(job(parts, tmp_path, pictures(3), dtype=dtype))
    assert latents.latent(0).dtype == getattr(torch, dtype)
    assert latents.manifest["dtype"] == dtype


def test_the_scale_is_in_the_latents(parts, tmp_path):
    vae = toy_vae()
    vae.register_to_config(scaling_factor=0.5)
    vae.save_pretrained(tmp_path / "half")
    plain = encode(job(parts, tmp_path / "a", dtype="float32"))
    half = encode(dataclasses.replace(job(parts, tmp_path / "b", dtype="float32"), autoencoder=str(tmp_path / "half")))
    assert torch.equal(half.latent(5), plain.latent(5) * 0.5)
    assert half.manifest["autoencoder"]["latent_scale"] == 0.5
    assert half.manifest["autoencoder"]["sha256"] == plain.manifest["autoencoder"]["sha256"]


def whole_job(parts, folder):
    return job(parts, folder, pictures(12, bad=(2,)), buckets=True, shard_size=5, backbone=f"{parts}/backbone")


@pytest.fixture(scope="module")
def straight(parts, tmp_path_factory):
    """What a straight run of ``whole_job`` leaves."""
    folder = tmp_path_factory.mktemp("straight")
    encode(whole_job(parts, folder))
    return files(folder)


class TestGoingOn:
    def test_a_complete_run_is_left_alone(self, parts, tmp_path, monkeypatch):
        encode(job(parts, tmp_path))
        before, times = files(tmp_path), {file: file.stat().st_mtime_ns for file in tmp_path.glob("latents-*")}
        source = pictures(20)
        (tmp_path / ".latents-00001.safetensors.1.partial").mkdir()  # of a process that was killed
        encode(job(parts, tmp_path, source))
        assert files(tmp_path) == before
        assert not list(tmp_path.glob(".*"))
        assert {file: file.stat().st_mtime_ns for file in tmp_path.glob("latents-*")} == times
        assert source.reads == []

    def test_how_work_is_divided_does_not_show(self, parts, tmp_path):
        encode(job(parts, tmp_path / "one", buckets=True))
        encode(job(parts, tmp_path / "other", buckets=True, readers=5))
        assert files(tmp_path / "one") == files(tmp_path / "other")

    @settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(stop=st.integers(0, 16), call=st.sampled_from(["save_file", "os.fsync", "os.replace"]))
    @example(stop=15, call="os.fsync")  # all is there, and the manifest's name is not yet forced to the disk
    def test_killed_anywhere_it_ends_with_the_bytes_of_a_straight_run(
        self, parts, tmp_path_factory, monkeypatch, straight, stop, call
    ):
        folder = tmp_path_factory.mktemp("killed")
        real, calls = eval(f"shards.{call}", {"shards": shards}), []

        def die(*arguments, **settings):
            calls.append(arguments)
            if len(calls) > stop:
                raise KeyboardInterrupt
            return real(*arguments, **settings)

        with monkeypatch.context() as patch:
            patch.setattr(f"latteflow.data.shards.{call}", die)
            try:
                encode(whole_job(parts, folder))
            except KeyboardInterrupt:
                assert not (folder / "manifest.json").exists() or files(folder) == straight
        encode(whole_job(parts, folder))
        assert files(folder) == straight

    def test_a_damaged_shard_is_made_anew_and_others_are_not(self, parts, tmp_path, caplog):
        encode(job(parts, tmp_path))
        before = files(tmp_path)
        damaged = tmp_path / "latents-00001.safetensors"
        data = bytearray(damaged.read_bytes())
        data[-3] ^= 1
        damaged.write_bytes(data)
        source = pictures(20)
        encode(job(parts, tmp_path, source))
        assert files(tmp_path) == before
        assert sorted(source.reads) == list(range(8, 16))
        assert "its hash differs: it is made anew" in caplog.text

    @pytest.mark.parametrize(
        ("changes", "field"),
        [
            ({"dtype": "float16"}, "dtype='bfloat16', and this run has 'float16'"),
            ({"shard_size": 9}, "shard_size"),
            ({"buckets": True}, "sizes"),
            ({"size": 40}, "sizes"),
            ({"autoencoder": "other"}, "autoencoder.sha256"),
        ],
    )
    def test_latents_made_otherwise_are_not_touched(self, parts, tmp_path, changes, field):
        folder = tmp_path / "latents"
        encode(job(parts, folder))
        before = files(folder)
        toy_vae(seed=1).save_pretrained(tmp_path / "other")
        if "autoencoder" in changes:
            changes = {"autoencoder": str(tmp_path / "other")}
        with pytest.raises(UserError, match=f"made with {field}"):
            encode(dataclasses.replace(job(parts, folder), **changes))
        assert files(folder) == before

    def test_another_source_is_not_mixed_in(self, parts, tmp_path):
        encode(job(parts, tmp_path))
        added = pictures(20)
        added.samples = {"000": added.samples["000"], "000b": picture(77), **added.samples}
        with pytest.raises(UserError, match=r"latents-00000\.safetensors is of other samples"):
            encode(job(parts, tmp_path, added))


class TestBadSamples:
    def test_they_are_left_out_and_listed(self, parts, tmp_path):
        folder = write_image_folder(tmp_path / "set", {"cat": 5})
        for name, data in BROKEN.items():
            (folder / "cat" / name).write_bytes(data)
        source = open_source("image_folder", folder)
        latents = encode(job(parts, tmp_path / "out", source, quarantine_limit=0.9))
        assert [latents.name(i) for i in range(len(latents))] == [f"cat/{i:03d}.png" for i in range(5)]
        listed = [json.loads(line) for line in (tmp_path / "out/quarantine.jsonl").read_text().splitlines()]
        assert [entry["name"] for entry in listed] == sorted(f"cat/{name}" for name in BROKEN)
        assert all(entry["reason"] for entry in listed)
        encode(job(parts, tmp_path / "out", source, quarantine_limit=0.9))  # and is the same when it is run again

    def test_past_the_limit_the_run_stops(self, parts, tmp_path):
        with pytest.raises(UserError, match=r"2 of 20 samples are bad, more than data.quarantine_limit=0.05 .*jsonl"):
            encode(job(parts, tmp_path, pictures(20, bad=(1, 9)), quarantine_limit=0.05))
        assert not (tmp_path / "manifest.json").exists()
        assert (tmp_path / "quarantine.jsonl").read_text().count("\n") == 2
        assert len(encode(job(parts, tmp_path, pictures(20, bad=(1, 9)), quarantine_limit=0.1))) == 18

    def test_all_bad(self, parts, tmp_path):
        with pytest.raises(UserError, match="no sample could be encoded"):
            encode(job(parts, tmp_path, pictures(3, bad=range(3)), quarantine_limit=1))

    def test_a_latent_that_is_no_number_is_named(self, parts, tmp_path):
        vae = toy_vae()
        vae.register_to_config(scaling_factor=1e6)
        vae.save_pretrained(tmp_path / "loud")
        loud = dataclasses.replace(job(parts, tmp_path / "out"), autoencoder=str(tmp_path / "loud"), dtype="float16")
        with pytest.raises(UserError, match=r"latent of 000 is not finite in float16"):
            encode(loud)

    def test_a_source_that_fails_as_a_whole_ends_the_run(self, parts, tmp_path):
        class Gone(ListSource):
            def read(self, index):
                raise OSError(116, "Stale file handle")

        with pytest.raises(OSError, match="Stale"):
            encode(job(parts, tmp_path, Gone({"a": picture(0)})))


class TestContexts:
    def test_each_caption_once_as_the_pipeline_reads_it(self, parts, tmp_path):
        captions = ["red", "a red circle", "red", "a blue triangle", "a red circle", "red", "no"]
        source = ListSource({str(i): picture(i) for i in range(7)}, caption=lambda name: captions[int(name)])
        settings = {"backbone": f"{parts}/backbone", "shard_size": 3, "batch_size": 8}
        latents = encode(job(parts, tmp_path, source, **settings))
        contexts = latents.contexts
        assert contexts.numbers(torch.arange(7)).tolist() == [1, 2, 1, 3, 2, 1, 4]
        assert len(contexts) == 5
        backbone, processor, identity = load_prompter(f"{parts}/backbone")
        assert latents.manifest["contexts"]["backbone"] == identity
        LatentShards(tmp_path, {"contexts.backbone.sha256": identity["sha256"]}).verify()
        texts = ["", "red", "a red circle"]  # the first shard's, computed together there too
        wanted = _prompted(backbone, processor, texts)
        found = contexts.read(torch.tensor([0, 1, 2]))
        assert torch.equal(found.mask, wanted.mask)
        assert torch.equal(found.next_position, wanted.next_position)
        where = wanted.mask[:, None, None, :, None]
        assert torch.equal(found.keys, (wanted.keys * where).to(torch.bfloat16))
        assert torch.equal(found.values, (wanted.values * where).to(torch.bfloat16))

    def test_they_can_be_added_later(self, parts, tmp_path):
        encode(job(parts, tmp_path / "a"))
        source = pictures(20)
        encode(job(parts, tmp_path / "a", source, backbone=f"{parts}/backbone"))
        assert source.reads == []
        encode(job(parts, tmp_path / "b", backbone=f"{parts}/backbone"))
        assert files(tmp_path / "a") == files(tmp_path / "b")


def _prompted(backbone, processor, texts):
    """What the pipeline's own encode_prompt returns."""
    from types import SimpleNamespace

    stand_in = SimpleNamespace(backbone=backbone, processor=processor, _execution_device=torch.device("cpu"))
    return LatteFlowPipeline.encode_prompt(stand_in, texts)


class TestStreams:
    @pytest.fixture
    def folder(self, tmp_path):
        images = [{"bytes": encoded(picture(i)), "path": None} for i in range(11)]
        images[4] = {"bytes": BROKEN["cut.png"], "path": None}
        write_parquet(tmp_path / "rows/a.parquet", {"image": images, "caption": [f"picture {i}" for i in range(11)]})
        return tmp_path / "rows"

    @pytest.mark.parametrize("shard_size", [4, 11, 20])
    def test_the_same_latents_as_with_random_access(self, parts, tmp_path, folder, shard_size):
        import datasets

        datasets.disable_progress_bars()
        source = open_source("parquet", folder, cache=tmp_path / "cache")
        encode(job(parts, tmp_path / "a", source, shard_size=shard_size))
        encode(job(parts, tmp_path / "b", ParquetStream(folder), shard_size=shard_size))
        assert files(tmp_path / "a") == files(tmp_path / "b")
        assert len(list((tmp_path / "b").glob("latents-*"))) == math.ceil(11 / shard_size)

    @pytest.mark.parametrize("lost", [[0], [1], [2], [0, 2], [1, 2]])
    def test_taken_up_again(self, parts, tmp_path, folder, lost):
        encode(job(parts, tmp_path / "a", ParquetStream(folder), shard_size=4))
        before = files(tmp_path / "a")
        (tmp_path / "a/manifest.json").unlink()
        for number in lost:
            (tmp_path / f"a/latents-0000{number}.safetensors").unlink()
        encode(job(parts, tmp_path / "a", ParquetStream(folder), shard_size=4))
        assert files(tmp_path / "a") == before

    def test_not_by_many(self, parts, tmp_path, folder):
        with pytest.raises(UserError, match="a stream is read by one process"):
            encode(job(parts, tmp_path / "a", ParquetStream(folder), backend="ray"))


class TestParts:
    def test_every_way_to_name_an_autoencoder(self, parts, saved_pipeline):
        wanted = load_encoder(f"{parts}/autoencoder")[1]["sha256"]
        assert load_encoder(str(saved_pipeline))[1]["sha256"] == wanted
        assert load_encoder("emoji-64")[0].spatial_compression_ratio == 8

    def test_every_way_to_name_a_backbone(self, parts, saved_pipeline):
        wanted = load_prompter(f"{parts}/backbone")[2]["sha256"]
        assert load_prompter(str(saved_pipeline))[2]["sha256"] == wanted

    @pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument")  # diffusers' own
    @pytest.mark.parametrize("name", ["nowhere/at-all", "dc-ae-f32c32-sana-1.1"])
    def test_what_is_not_there(self, name):
        with pytest.raises(UserError, match=f"autoencoder '{name}' cannot be loaded .*give a folder or hub id"):
            load_encoder(name)
        with pytest.raises(UserError, match=f"backbone '{name}' cannot be loaded"):
            load_prompter(name)

    def test_a_device_that_is_not_there(self, parts, tmp_path):
        if torch.cuda.is_available():
            pytest.skip("it is there")
        with pytest.raises(UserError, match="no device 'cuda' on this machine"):
            encode(job(parts, tmp_path, device="cuda"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 33}, "size 33 is not a multiple of 8"),
        ({"patch_size": 3}, "size 32 is not a multiple of 24"),
        ({"dtype": "int8"}, "latents are kept as bfloat16, float16, float32: got 'int8'"),
        ({"workers": 2}, "set encode.backend=ray"),
        ({"source": ListSource({})}, "no sample to encode"),
    ],
)
def test_what_cannot_be_encoded(parts, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        encode(dataclasses.replace(job(parts, tmp_path / "out"), **changes))


def test_all_that_a_recipe_says_of_encoding_is_passed_on(parts, tmp_path):
    said = {"output": "x", "shard_size": 7, "batch_size": 5, "dtype": "float16", "contexts": True, "backend": "ray"}
    said |= {"workers": 3, "device": "cpu", "readers": 2, "cpu_threads": 6}
    assert said.keys() == EncodeSection.model_fields.keys()
    assert all(EncodeSection(output="y").model_dump()[field] != value for field, value in said.items())
    data = {"kind": "shapes", "path": "", "size": 32}
    generator = {"autoencoder": f"{parts}/autoencoder", "backbone": f"{parts}/backbone"}
    recipe = GeneratorRecipe(
        stage="generator", output="z", data=data, train={"steps": 1, "batch_size": 1}, generator=generator, encode=said
    )
    job = job_of(recipe)
    assert (str(job.folder), job.backbone) == (said.pop("output"), generator["backbone"])
    assert said.pop("contexts")
    assert {field: getattr(job, field) for field in said} == said


def test_progress_counts_every_sample_once(parts, tmp_path):
    seen = []
    encode(job(parts, tmp_path, pictures(20, bad=(3,)), backbone=f"{parts}/backbone"), seen.append)
    done = [now.done for now in seen if now.what == "latents"]
    assert done == sorted(done)
    assert seen[len(done) - 1] == EncodeProgress("latents", 20, 20, 1)
    assert seen[-1] == EncodeProgress("contexts", 20, 20)  # 19 captions and the empty prompt


SCRIPT = """
import sys, time
from pathlib import Path
from latteflow.data.sources import open_source
from latteflow.train.encode import EncodeJob, encode

class Slow:  # so that there is a moment to kill it in
    def __init__(self, source):
        self.source = source
    def __len__(self):
        return len(self.source)
    def name(self, index):
        return self.source.name(index)
    def read(self, index):
        time.sleep(float(sys.argv[4]))
        return self.source.read(index)

source = Slow(open_source("webdataset", sys.argv[1]))
encode(EncodeJob(source, Path(sys.argv[2]), sys.argv[3], 32, shard_size=4, batch_size=3, device="cpu"))
"""


@pytest.mark.slow
def test_a_process_killed_twice_and_resumed_leaves_what_a_straight_run_leaves(parts, tmp_path):
    tars = write_webdataset(tmp_path / "tars", shards=5, samples=8)

    def start(folder, pause):
        words = [sys.executable, "-c", SCRIPT, str(tars), str(folder), f"{parts}/autoencoder", str(pause)]
        return subprocess.Popen(words, env={**os.environ, "OMP_NUM_THREADS": "1"})

    assert start(tmp_path / "straight", 0).wait(300) == 0
    folder = tmp_path / "killed"
    for number in (2, 6):
        process = start(folder, 0.3)
        while len(list(folder.glob("latents-*"))) < number:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL
        assert not (folder / "manifest.json").exists()
    assert start(folder, 0).wait(300) == 0
    assert files(folder) == files(tmp_path / "straight")


RAY = """
import json, os, sys
from pathlib import Path
from latteflow.data.sources import open_source
from latteflow.errors import UserError
from latteflow.train.encode import EncodeJob, encode
from latteflow.train.encode_ray import having_ray

source, parts, runs = open_source("image_folder", sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
with having_ray(2):  # once for all runs: it takes its time
    for folder, changes in runs:
        seen, settings = [], {"shard_size": 4, "batch_size": 3, "quarantine_limit": 0.5, "buckets": True, **changes}
        settings = {"device": "cpu", "workers": 1, **settings}
        try:
            encode(EncodeJob(source, Path(folder), f"{parts}/autoencoder", 32, backend="ray", **settings), seen.append)
            print(json.dumps([now.done for now in seen if now.what == "latents"]))
        except UserError as error:
            print(json.dumps(str(error)))
assert not {"RAY_AUTH_TOKEN", "RAY_AUTH_MODE", "RAY_USAGE_STATS_ENABLED"} & set(os.environ)
"""


@pytest.mark.slow
def test_on_ray_it_leaves_the_same_bytes(parts, tmp_path):
    """A fresh run, one that is taken up again and two mistakes, in a process of its own: Ray leaves much behind."""
    pytest.importorskip("ray")
    folder = write_image_folder(tmp_path / "set", {"cat": 9, "dog": 9})
    (folder / "dog/broken.png").write_bytes(BROKEN["cut.png"])
    contexts = {"backbone": f"{parts}/backbone"}
    here = job(parts, tmp_path / "here", open_source("image_folder", folder), buckets=True, shard_size=4)
    encode(dataclasses.replace(here, folder=tmp_path / "again"))
    before = files(tmp_path / "again")
    for lost in ("latents-00001.safetensors", "manifest.json"):
        (tmp_path / "again" / lost).unlink()
    encode(dataclasses.replace(here, **contexts))
    runs = [("fresh", {"workers": 2, **contexts}), ("again", {}), ("here", {"dtype": "float16"})]
    runs.append(("no", {"device": "cuda"}))
    runs = json.dumps([(str(tmp_path / name), changes) for name, changes in runs])
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", RAY, str(folder), str(parts), runs],
        env={**environment, "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    fresh, again, otherwise, no_gpu = [
        json.loads(line) for line in done.stdout.splitlines() if line.startswith(("[", '"'))
    ]
    assert fresh[-1] == again[-1] == 19
    assert files(tmp_path / "fresh") == files(here.folder)
    assert files(tmp_path / "again") == before
    assert "was made with dtype='bfloat16', and this run has 'float16'" in otherwise
    assert "Error" not in otherwise
    if not torch.cuda.is_available():
        assert no_gpu.startswith("1 workers need a GPU each: Ray has 0")
    assert not (tmp_path / ".ray").exists()  # its secret is in no file
