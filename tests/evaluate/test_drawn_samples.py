"""Shards of drawn pictures: the same bits whoever makes them, and never made twice."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from latteflow.errors import UserError
from latteflow.evaluate.samples import Samples, SampleWork, balanced, draw_samples
from latteflow.models.quantization import quantization_config
from toys import toy_pipeline

PROMPTS = ("a red circle", "a blue square, solid style", "a green cross")


@pytest.fixture(scope="module")
def pipe():
    return toy_pipeline()


def work_in(folder, **changes):
    settings = {"prompts": PROMPTS, "number": 10, "steps": 2, "batch_size": 2, "shard_size": 4, "device": "cpu"}
    return SampleWork(folder, "toy", **{**settings, **changes})


def drawn(folder, pipe, *, share=None, **changes):
    draw_samples(work_in(folder, **changes), pipe, share=share)
    return folder


def pixels(folder):
    return torch.cat(list(Samples(folder).chunks()))


@pytest.fixture(scope="module")
def straight(pipe, tmp_path_factory):
    return drawn(tmp_path_factory.mktemp("samples") / "straight", pipe)


def bytes_of(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_a_set_says_what_it_is(straight):
    samples = Samples(straight)
    assert (samples.number, samples.size) == (10, (32, 32))
    assert [len(chunk) for chunk in samples.chunks(3)] == [3, 1, 3, 1, 2]
    facts = samples.made_with
    assert {"model": "toy", "steps": 2, "guidance_scale": 4.0, "dtype": "float32", "seed": 0}.items() <= facts.items()
    assert len(set(map(tuple, pixels(straight).flatten(1).tolist()))) == 10


def test_a_picture_is_the_one_that_its_prompt_and_seed_give_alone(straight, pipe):
    """Up to rounding in a batch of another size."""
    found = pixels(straight)
    for i in (0, 5, 9):
        alone = pipe(
            PROMPTS[i % 3], num_inference_steps=2, generator=torch.Generator().manual_seed(i), output_type="pil"
        ).images[0]
        apart = found[i].permute(1, 2, 0).int() - torch.from_numpy(np.array(alone)).int()
        assert apart.abs().max() <= 1


@pytest.mark.parametrize("changes", [{"shard_size": 2}, {"shard_size": 10}, {"number": 12, "shard_size": 8}])
def test_how_shards_are_cut_changes_no_bit(straight, pipe, tmp_path, changes):
    assert torch.equal(pixels(drawn(tmp_path, pipe, **changes))[:10], pixels(straight))


def test_the_batch_size_changes_rounding_alone(straight, pipe, tmp_path):
    found = pixels(drawn(tmp_path, pipe, batch_size=4))
    assert (found.int() - pixels(straight).int()).abs().max() <= 1


def test_processes_leave_the_same_bytes(straight, pipe, tmp_path):
    drawn(tmp_path, pipe, share=(1, 2))
    assert sorted(bytes_of(tmp_path)) == ["samples-00001.safetensors"]
    drawn(tmp_path, pipe, share=(0, 2))
    assert bytes_of(tmp_path) == bytes_of(straight)


def test_what_is_there_is_not_drawn_again_and_what_is_damaged_is(straight, pipe, tmp_path, monkeypatch, caplog):
    for name, content in bytes_of(straight).items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "samples-00001.safetensors").unlink()
    damaged = tmp_path / "samples-00002.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    done = []
    batch = SampleWork._batch
    monkeypatch.setattr(SampleWork, "_batch", lambda self, i: done.append(list(i)) or batch(self, i))
    seen = []
    draw_samples(work_in(tmp_path), pipe, watch=seen.append)
    assert done == [[4, 5], [6, 7], [8, 9]]
    assert seen == [4, 4, 2]
    assert "its hash differs: it is made anew" in caplog.text
    assert bytes_of(tmp_path) == bytes_of(straight)


def test_more_pictures_go_on_from_those_that_are_there(straight, pipe, tmp_path):
    drawn(tmp_path, pipe)
    before = (tmp_path / "samples-00000.safetensors").stat().st_mtime_ns
    drawn(tmp_path, pipe, number=13)
    assert (tmp_path / "samples-00000.safetensors").stat().st_mtime_ns == before
    assert torch.equal(pixels(tmp_path)[:10], pixels(straight))
    assert Samples(tmp_path).number == 13


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"guidance_scale": 1}, "guidance_scale=4.0, and this is 1.0"),
        ({"steps": 3}, "steps=2, and this is 3"),
        ({"seed": 1}, "seed=0, and this is 1"),
        ({"prompts": PROMPTS[:2]}, "prompts="),
        ({"batch_size": 1}, "batch_size=2, and this is 1"),
    ],
)
def test_a_folder_of_other_pictures_is_left_alone(straight, pipe, changes, said):
    before = bytes_of(straight)
    with pytest.raises(UserError, match=f"was drawn with {said}"):
        draw_samples(work_in(straight, **changes), pipe)
    assert bytes_of(straight) == before


def test_another_models_pictures_are_told_by_its_weights(straight):
    other = toy_pipeline(2)
    with torch.no_grad():
        next(other.vae.parameters()).view(-1)[0] += 0.1
    with pytest.raises(UserError, match="was drawn with weights="):
        draw_samples(work_in(straight), other)


def test_guidance_and_prompt_matter(straight, pipe, tmp_path):
    unguided = pixels(drawn(tmp_path / "a", pipe, guidance_scale=1))
    assert not torch.equal(unguided, pixels(straight))
    assert not torch.equal(pixels(drawn(tmp_path / "b", pipe, prompts=PROMPTS[::-1])), pixels(straight))


def test_classes_are_shown_equally_often(pipe, tmp_path):
    prompts = balanced(["circle", "cross"], 6, "a red {}")
    assert prompts == ["a red circle", "a red cross"]
    work = work_in(tmp_path, prompts=prompts, number=6)
    asked = []

    def watched(prompts, **settings):
        asked.extend(prompts)
        return pipe(prompts, **settings)

    work.load(pipe)
    work._pipe = watched
    for number in work.shards:
        work(number)
    assert asked == prompts * 3
    for names, number in ((["circle", "cross"], 7), (["circle"], 0), ([], 4)):
        with pytest.raises(UserError, match="equally often"):
            balanced(names, number)


def test_another_size_is_drawn_and_kept(pipe, tmp_path):
    assert Samples(drawn(tmp_path, pipe, number=2, size=(32, 64))).size == (32, 64)


def test_pictures_that_are_not_finite_are_no_shard(pipe, tmp_path):
    class Broken:
        def __call__(self, prompts, **settings):
            found = pipe(prompts, **settings)
            found.images[1] = float("nan")
            return found

    work = work_in(tmp_path)
    work.load(pipe)
    work._pipe = Broken()
    with pytest.raises(UserError, match="picture 5 is not finite in float32"):
        work(1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prompts": ()}, "10 pictures of 0 prompts"),
        ({"number": 0}, "0 pictures of 3 prompts"),
        ({"batch_size": 3}, "shard_size=4 is no multiple of batch_size=3"),
        ({"batch_size": 0}, "shard_size=4 is no multiple of batch_size=0"),
        ({"dtype": "int8"}, "no dtype 'int8'"),
    ],
)
def test_work_that_cannot_be_is_refused(tmp_path, changes, said):
    with pytest.raises(UserError, match=said):
        work_in(tmp_path, **changes)


def test_ways_to_share_that_do_not_go_together_are_refused(pipe, tmp_path):
    with pytest.raises(UserError, match="2 workers are Ray's"):
        draw_samples(work_in(tmp_path), pipe, workers=2)
    with pytest.raises(UserError, match="leave pipe and share out"):
        draw_samples(work_in(tmp_path), pipe, backend="ray")
    with pytest.raises(UserError, match="no share 2 of 2"):
        draw_samples(work_in(tmp_path), pipe, share=(2, 2))


def test_quantised_weights_are_refused(saved_pipeline, tmp_path):
    pytest.importorskip("torchao")
    from latteflow.pipeline import LatteFlowPipeline

    quantised = LatteFlowPipeline.from_pretrained(str(saved_pipeline), quantization_config=quantization_config("int8"))
    with pytest.raises(UserError, match="without quantisation"):
        work_in(tmp_path).load(quantised)


def test_sets_that_are_not_whole_are_refused(straight, tmp_path):
    with pytest.raises(UserError, match="holds no samples: draw them first"):
        Samples(tmp_path)
    for name, content in bytes_of(straight).items():
        (tmp_path / name).write_bytes(content)
    last = tmp_path / "samples-00002.safetensors"
    last.unlink()
    with pytest.raises(UserError, match=r"samples-00002.* is missing or damaged"):
        Samples(tmp_path)
    last.write_bytes((tmp_path / "samples-00001.safetensors").read_bytes())
    with pytest.raises(UserError, match="does not hold 10 pictures"):
        Samples(tmp_path)


def test_shards_of_two_sets_are_not_taken_for_one(straight, pipe, tmp_path):
    drawn(tmp_path, pipe, guidance_scale=1)
    (tmp_path / "samples-00001.safetensors").write_bytes((straight / "samples-00001.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"was drawn with guidance_scale=4\.0, and this is 1\.0"):
        Samples(tmp_path)


def test_the_export_is_adms_array(straight, tmp_path):
    Samples(straight).export(tmp_path / "samples.npz")
    with np.load(tmp_path / "samples.npz") as loaded:
        np.testing.assert_array_equal(loaded["arr_0"], pixels(straight).permute(0, 2, 3, 1).numpy())


SCRIPT = """
import sys
from pathlib import Path
from latteflow.errors import UserError
from latteflow.evaluate.samples import SampleWork, draw_samples

backend, workers, folder, model, prompts = sys.argv[1], int(sys.argv[2]), *sys.argv[3:]
work = SampleWork(Path(folder), model, prompts.split(";"), 10, steps=2, batch_size=2, shard_size=4, device="cpu")
draw_samples(work, backend=backend, workers=workers)
"""


def start(launcher, *arguments, tmp_path):
    """Run the script in processes of its own; they draw with one thread, as this one does."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.run(
        [sys.executable, *launcher, str(script), *arguments],
        env={**environment, "OMP_NUM_THREADS": "1", "HOME": str(tmp_path), "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.fixture(scope="module")
def saved(saved_pipeline, tmp_path_factory):
    """What this process draws with the saved model."""
    folder = tmp_path_factory.mktemp("samples") / "saved"
    work = dataclasses.replace(work_in(folder), model=str(saved_pipeline))
    return draw_samples(work)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "backend", "workers"),
    [
        (["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"], "local", "0"),
        ([], "ray", "2"),
    ],
    ids=["accelerate", "ray"],
)
def test_processes_of_their_own_leave_the_same_bytes(saved, saved_pipeline, tmp_path, launcher, backend, workers):
    pytest.importorskip("accelerate" if launcher else "ray")
    folder = tmp_path / "samples"
    done = start(launcher, backend, workers, str(folder), str(saved_pipeline), ";".join(PROMPTS), tmp_path=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert bytes_of(folder) == bytes_of(saved)
    assert json.loads((folder / "samples.json").read_text())["number"] == 10
