"""Latent shards: what is written is what is read, of which autoencoder it is, and every kind of damage found out."""

import json
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latteflow.data.contexts import backbone_identity, context_file, numbers_file, write_contexts
from latteflow.data.latents import (
    MANIFEST,
    Encoded,
    LatentShards,
    autoencoder_identity,
    latent_shard_entry,
    shard_file,
    write_latents,
)
from latteflow.data.shards import (
    ShardDamaged,
    open_shard,
    packed,
    remove_partial,
    sha256_of,
    unpacked,
    verified_shard,
    write_json,
    write_shard,
)
from latteflow.errors import UserError
from latteflow.models.context import compute_context, concatenate
from toys import seeded, shake, toy_vae

SIZES = ((16, 16), (8, 32))
MADE_WITH = {"autoencoder.sha256": "abc", "sizes": SIZES, "dtype": "bfloat16"}
SHAPES = ((4, 2, 2), (4, 1, 4))


def encoded(start: int, number: int, bad: tuple[int, ...] = ()) -> Encoded:
    """Samples start to start + number, in buckets by turns; those at places ``bad`` are bad."""
    good = [i for place, i in enumerate(range(start, start + number)) if place not in bad]
    return Encoded(
        names=[f"{i}.png" for i in good],
        captions=[f"caption {i} é" for i in good],
        buckets=[i % 2 for i in good],
        latents=[torch.randn(SHAPES[i % 2], generator=seeded(i)).to(torch.bfloat16) for i in good],
        skipped=[(place, f"{start + place}.png", "broken") for place in bad],
    )


def write_folder(folder, **more):
    """Two shards: samples 0 to 4 without 3, and 5 to 7."""
    entries = []
    for number, samples in enumerate((encoded(0, 5, (3,)), encoded(5, 3))):
        file = shard_file(folder, number)
        write_latents(file, samples, SIZES, MADE_WITH)
        entries.append(latent_shard_entry(file, MADE_WITH))
    manifest = {
        "format": 1,
        "autoencoder": {"name": "toy", "revision": None, "sha256": "abc"},
        "size": 16,
        "sizes": SIZES,
        "latents_mean": [0.0] * 4,
        "latents_std": [1.0] * 4,
        "shards": entries,
        **more,
    }
    write_json(folder / MANIFEST, manifest)
    return folder


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path)


GOOD = [0, 1, 2, 4, 5, 6, 7]


def test_what_is_read_is_what_was_written(folder):
    latents = LatentShards(folder)
    assert len(latents) == len(GOOD)
    assert latents.sizes == list(SIZES)
    assert latents.buckets.tolist() == [i % 2 for i in GOOD]
    for index, i in enumerate(GOOD):
        assert latents.name(index) == f"{i}.png"
        assert latents.caption(index) == f"caption {i} é"
        found = latents.latent(index)
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, torch.randn(SHAPES[i % 2], generator=seeded(i)).to(torch.bfloat16))
    same_bucket = torch.tensor([6, 1, 4])
    batch = latents.batch(same_bucket)
    assert batch.shape == (3, *SHAPES[1])
    assert torch.equal(batch[2], latents.latent(4))
    for index in (-1, 7):
        with pytest.raises(IndexError):
            latents.latent(index)
    latents.verify()


def test_which_samples_of_the_source_are_there(folder, tmp_path, monkeypatch):
    assert LatentShards(folder).good.tolist() == [i in GOOD for i in range(8)]
    assert LatentShards(write_folder(tmp_path / "told", bad=1)).good.tolist() == [i in GOOD for i in range(8)]
    whole = LatentShards(write_folder(tmp_path / "whole", bad=0))
    monkeypatch.setattr("latteflow.data.latents.open_shard", None)  # no shard is looked into for that
    assert whole.good.tolist() == [True] * 7


def test_other_processes_map_the_files_for_themselves(folder):
    latents = LatentShards(folder)
    unopened = pickle.dumps(latents)
    latents.latent(0)
    sent = pickle.dumps(latents)
    assert sent == unopened
    assert torch.equal(pickle.loads(sent).latent(6), latents.latent(6))

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return len(latents)

        def __getitem__(self, index):
            return latents.caption(index), latents.latent(index).float().numpy()

    loader = torch.utils.data.DataLoader(Rows(), batch_size=None, num_workers=2, collate_fn=lambda row: row)
    for index, (caption, latent) in enumerate(loader):
        assert caption == latents.caption(index)
        assert torch.equal(torch.from_numpy(latent), latents.latent(index).float())


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks Linux what is mapped")
def test_shards_are_mapped_not_read(tmp_path):
    """Opening a thousand large shards has to cost nothing."""
    write_shard(tmp_path / "a", {"x": torch.zeros(2**22, dtype=torch.uint8)}, {})
    tensors, _ = open_shard(tmp_path / "a")
    assert str(tmp_path / "a") in Path("/proc/self/maps").read_text()
    assert tensors["x"].sum() == 0


def test_the_same_samples_give_the_same_bytes(tmp_path):
    for name in ("one", "other"):
        write_folder(tmp_path / name)
    for file in sorted((tmp_path / "one").iterdir()):
        assert file.read_bytes() == (tmp_path / "other" / file.name).read_bytes(), file
    assert len(list((tmp_path / "one").iterdir())) == 3  # and nothing is left half written


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.text()))
def test_texts_are_packed_and_unpacked(texts):
    data, ends = packed(texts)
    assert [unpacked(data, ends, i) for i in range(len(texts))] == texts


def test_statistics_are_of_what_is_kept(folder):
    about = open_shard(shard_file(folder, 0))[1]["statistics"]
    kept = torch.cat([LatentShards(folder).latent(i).double().flatten(1) for i in range(4)], dim=1)
    assert about["number"] == kept.shape[1]
    assert torch.allclose(torch.tensor(about["sum"]).double(), kept.sum(1))
    assert torch.allclose(torch.tensor(about["squares"]).double(), kept.square().sum(1))


class TestExpectations:
    def test_what_agrees_goes(self, folder):
        expected = {"autoencoder.sha256": "abc", "size": 16, "sizes": SIZES, "autoencoder.name": None}
        assert len(LatentShards(folder, expected)) == 7

    @pytest.mark.parametrize(
        ("field", "wanted"),
        [
            ("autoencoder.sha256", "def"),
            ("autoencoder.name", "dc-ae"),
            ("autoencoder.revision", "main"),
            ("size", 32),
            ("sizes", [(16, 16)]),
            ("contexts.backbone.sha256", "x"),
        ],
    )
    def test_the_field_that_does_not_is_named(self, folder, field, wanted):
        with pytest.raises(UserError, match=rf"have {field}=.*the recipe asks for .*encode anew"):
            LatentShards(folder, {"size": 16, field: wanted})


class TestDamage:
    def test_no_manifest(self, tmp_path):
        with pytest.raises(UserError, match=r"no latents in .*latteflow encode"):
            LatentShards(tmp_path)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{", "cannot be read"),
            ("[]", "cannot be read"),
            ("{}", "cannot be read"),
            ('{"format": 2}', "format 2"),
            ('{"format": 1, "shards": []}', "says nothing of autoencoder"),
        ],
    )
    def test_a_manifest_that_is_none(self, folder, text, message):
        (folder / MANIFEST).write_text(text)
        with pytest.raises(UserError, match=message):
            LatentShards(folder)

    def test_a_shard_missing_or_cut_short(self, folder):
        file = shard_file(folder, 1)
        data = file.read_bytes()
        file.write_bytes(data[:-1])
        with pytest.raises(UserError, match=r"latents-00001\.safetensors is missing or not whole"):
            LatentShards(folder)
        file.unlink()
        with pytest.raises(UserError, match=r"latents-00001\.safetensors is missing or not whole"):
            LatentShards(folder)

    def test_every_changed_byte_is_found(self, folder):
        file = shard_file(folder, 0)
        whole = file.read_bytes()
        verified_shard(file)
        for place in [*range(8, len(whole), 97), len(whole) - 1]:
            changed = bytearray(whole)
            changed[place] ^= 1
            file.write_bytes(changed)
            with pytest.raises(ShardDamaged, match="latents-00000"):
                verified_shard(file)
            with pytest.raises(UserError, match="its hash differs"):
                LatentShards(folder).verify()
        file.write_bytes(whole)
        LatentShards(folder).verify()

    def test_a_shard_of_noise_is_named_when_it_is_read(self, folder):
        file = shard_file(folder, 1)
        file.write_bytes(b"\xff" * file.stat().st_size)
        latents = LatentShards(folder)
        latents.latent(0)
        with pytest.raises(UserError, match=r"latents-00001.*encode again"):
            latents.latent(5)

    def test_a_foreign_safetensors_file_is_no_shard(self, tmp_path):
        from safetensors.torch import save_file

        save_file({"x": torch.zeros(2)}, tmp_path / "x")
        with pytest.raises(ShardDamaged):
            open_shard(tmp_path / "x")


class TestWriting:
    def test_other_samples_or_settings_are_refused(self, folder):
        file = shard_file(folder, 0)
        names = [f"{i}.png" for i in range(5)]
        assert latent_shard_entry(file, MADE_WITH, names)["samples"] == 4
        for other in (names[:4], names + ["5.png"], ["x.png", *names[1:]], [*names[:3], "x.png", "4.png"], names[::-1]):
            with pytest.raises(UserError, match="of other samples than the source has there now"):
                latent_shard_entry(file, MADE_WITH, other)
        with pytest.raises(UserError, match=r"made with dtype='bfloat16', and this run has 'float16'"):
            latent_shard_entry(file, {**MADE_WITH, "dtype": "float16"})

    def test_names_may_repeat(self, tmp_path):
        """Two captions of one picture, one of them empty: a bad sample and a good one of one name."""
        samples = Encoded(["a", "a"], ["x", "y"], [0, 0], [torch.zeros(4, 2, 2)] * 2, [(1, "a", "no caption")])
        write_latents(tmp_path / "s", samples, SIZES, MADE_WITH)
        assert latent_shard_entry(tmp_path / "s", MADE_WITH, ["a", "a", "a"])["samples"] == 2

    def test_a_shard_without_a_good_sample(self, tmp_path):
        write_latents(tmp_path / "s", encoded(0, 2, (0, 1)), SIZES, MADE_WITH)
        entry = latent_shard_entry(tmp_path / "s", MADE_WITH, ["0.png", "1.png"])
        assert (entry["samples"], len(entry["skipped"])) == (0, 2)

    @pytest.mark.parametrize("failing", ["save_file", "os.fsync", "os.replace"])
    def test_what_cannot_be_written_leaves_nothing(self, folder, monkeypatch, failing):
        from safetensors import SafetensorError

        from latteflow.data import shards

        before = {file.name: sha256_of(file) for file in folder.iterdir()}
        error = SafetensorError("No space left on device") if failing == "save_file" else OSError("No space left")

        def fail(*arguments, **settings):
            raise error

        monkeypatch.setattr(f"latteflow.data.shards.{failing}", fail)
        with pytest.raises(OSError, match="No space left"):
            shards.write_shard(shard_file(folder, 0), {"x": torch.zeros(3)}, {})
        monkeypatch.undo()
        assert {file.name: sha256_of(file) for file in folder.iterdir()} == before

    def test_whoever_may_read_other_files_may_read_shards(self, folder, tmp_path):
        """Training may be another user's."""
        (tmp_path / "plain").touch()
        for file in (shard_file(folder, 0), folder / MANIFEST):
            assert file.stat().st_mode == (tmp_path / "plain").stat().st_mode

    def test_nothing_is_written_elsewhere_in_the_folder(self, tmp_path, monkeypatch):
        """What a library leaves behind when it is killed has to be found again."""
        from latteflow.data import shards

        seen = []
        monkeypatch.setattr(shards, "sync", lambda path: seen.append({entry.name for entry in tmp_path.iterdir()}))
        write_shard(tmp_path / "s", {"x": torch.zeros(3)}, {})
        assert seen == [{f".s.{os.getpid()}.partial"}, {f".s.{os.getpid()}.partial", "s"}]

    def test_what_a_killed_run_left_is_removed(self, folder):
        partial = folder / ".latents-00002.safetensors.17.partial"
        partial.mkdir()
        (partial / ".tmpAbCdEf").write_bytes(b"half")  # as safetensors calls them
        remove_partial(folder)
        assert len(list(folder.iterdir())) == 3


class TestIdentity:
    def test_the_encoder_and_its_scale_count_and_nothing_else(self):
        one = autoencoder_identity(toy_vae(), "a", "main")
        assert (one["name"], one["revision"], one["latent_scale"]) == ("a", "main", 1.0)
        same, other, decoder = toy_vae(), toy_vae(), toy_vae()
        assert autoencoder_identity(same, "b")["sha256"] == one["sha256"]
        shake(decoder.decoder, seeded(1))
        assert autoencoder_identity(decoder, "a")["sha256"] == one["sha256"]
        with torch.no_grad():
            next(other.encoder.parameters()).view(-1)[3] += 1e-6
        assert autoencoder_identity(other, "a")["sha256"] != one["sha256"]

    def test_the_backbone_and_its_prompts_count(self, backbone, processor):
        one = backbone_identity(backbone, processor, "a")
        assert backbone_identity(backbone, processor, "b", "main")["sha256"] == one["sha256"]

        class Otherwise:
            chat_prompt = staticmethod(lambda words: f"Draw: {words}")
            __call__ = staticmethod(processor.__call__)

        assert backbone_identity(backbone, Otherwise(), "a")["sha256"] != one["sha256"]


class TestContexts:
    @pytest.fixture
    def contexts(self, backbone, processor):
        """Of four captions of different lengths, computed together."""
        captions = ["", "a red circle", "red", "an emoji of a red circle drawn in solid style"]
        words = processor([processor.chat_prompt(caption) for caption in captions], padding_side="right")
        found = compute_context(backbone, words["input_ids"], words["attention_mask"])
        return replace(found, next_position=found.next_position + 5)  # as after a picture, whose tokens share positions

    @pytest.fixture
    def folder(self, tmp_path, contexts):
        entries = []
        for number, part in enumerate(torch.arange(4).split(3)):
            file = context_file(tmp_path, number)
            write_contexts(file, contexts.select(part), {})
            entries.append({"file": file.name, "captions": len(part), **self.state(file)})
        write_shard(numbers_file(tmp_path), {"numbers": torch.tensor([1, 3, 3, 2, 1, 1, 2])}, {})
        numbers = {"file": numbers_file(tmp_path).name, **self.state(numbers_file(tmp_path))}
        backbone = {"name": "runs/one", "revision": None, "sha256": "x"}
        return write_folder(tmp_path, contexts={"shards": entries, "numbers": numbers, "backbone": backbone})

    @staticmethod
    def state(file):
        return {"bytes": file.stat().st_size, "sha256": sha256_of(file)}

    def test_what_is_read_is_what_the_backbone_computed(self, folder, contexts):
        latents = LatentShards(folder, {"contexts.backbone.sha256": "x"})
        assert len(latents.contexts) == 4
        numbers = latents.contexts.numbers(torch.tensor([0, 1, 3]))
        assert numbers.tolist() == [1, 3, 2]
        found = latents.contexts.read(numbers)
        wanted = contexts.select(numbers).to(torch.bfloat16)
        assert torch.equal(found.mask, wanted.mask)
        assert torch.equal(found.next_position, wanted.next_position)
        for layer in range(4):
            for one, other in zip(found.layer(layer), wanted.layer(layer), strict=True):
                where = wanted.mask[:, None, :, None]
                assert torch.equal(one, other * where)  # and padding is zero
        latents.verify()

    def test_they_are_padded_to_the_longest_only(self, folder, contexts):
        latents = pickle.loads(pickle.dumps(LatentShards(folder)))
        for numbers in ([0], [2, 0], [3, 1]):
            index = torch.tensor(numbers)
            found = latents.contexts.read(index)
            assert found.mask.shape == (len(numbers), int(contexts.mask[index].sum(1).max()))
            trimmed = contexts.select(index).trim()
            assert found.keys.shape == trimmed.keys.shape
            joined = concatenate([found, found])
            assert len(joined) == 2 * len(numbers)

    def test_those_of_another_backbone_are_refused(self, folder):
        contexts = LatentShards(folder).contexts
        contexts.require({"name": "another/place", "sha256": "x"})
        reason = (
            r"are of backbone 'runs/one' \(sha256 x\), and the recipe's is 'runs/two' \(sha256 y{12}\): encode anew"
        )
        with pytest.raises(UserError, match=reason) as mistake:
            contexts.require({"name": "runs/two", "sha256": "y" * 64})
        assert "\n" not in str(mistake.value)

    @pytest.mark.parametrize("damaged", ["contexts-00001.safetensors", "context-numbers.safetensors"])
    def test_damage_is_named(self, folder, damaged, tmp_path):
        data = (folder / damaged).read_bytes()
        copy = shutil.copytree(folder, tmp_path / "copy")
        (copy / damaged).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(UserError, match=f"{damaged} is not what was written"):
            LatentShards(copy).verify()
        (copy / damaged).write_bytes(data[:-1])
        with pytest.raises(UserError, match=f"{damaged} is missing or not whole"):
            LatentShards(copy)


def test_the_manifest_is_for_people_too(folder):
    text = (folder / MANIFEST).read_text()
    assert json.loads(text)["autoencoder"]["name"] == "toy"
    assert text.count("\n") > 10
