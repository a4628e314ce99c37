"""The loop by itself, on a regression of three numbers: resuming, averaging, accumulating, stopping."""

import itertools
import json
import os
import re
import signal

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from latteflow.errors import UserError
from latteflow.train import checkpoint, loop
from latteflow.train.checkpoint import checkpoint_folders
from latteflow.train.guard import TrainingDiverged
from latteflow.train.loop import train
from latteflow.train.recipe import AutoencoderRecipe
from latteflow.train.stage import Stage

PARTS = {"model.safetensors", "ema.safetensors", "optimizer.pt", "state.json", "manifest.json"}


class Regression(Stage):
    """y = W x + b on 12 fixed samples; the parameter ``frozen`` does not train."""

    number = 12

    def __init__(self, outputs=1, noise=0.0):
        torch.manual_seed(0)
        self.model = nn.Linear(3, outputs)
        self.model.register_parameter("frozen", nn.Parameter(torch.ones(2), requires_grad=False))
        self.x = torch.randn(self.number, 3)
        self.y = self.x @ torch.tensor([[1.0], [-2.0], [0.5]]) + 3
        self.noise = noise
        self.seen, self.validated, self.poison = [], [], None

    def to(self, device):
        assert device.type == "cpu"

    def loss(self, model, samples, data):
        index = samples.index
        self.seen.append(index.tolist())
        y = self.y[index] + self.noise * samples.randn("noise", (1,))
        loss = (model(self.x[index]) - y).square().mean() * samples.share
        if self.poison is not None and len(self.seen) >= self.poison:
            loss = loss * float("nan")
        return loss, {"samples": torch.tensor(float(len(index)))}

    def validate(self):
        assert not self.model.training
        assert not torch.is_grad_enabled()
        self.validated.append(self.model.weight.detach().clone())
        return {"error": 0.25}

    def preview(self):
        from PIL import Image

        return Image.new("RGB", (4, 4))

    def export(self, folder):
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self.model.state_dict(), folder / "weights.pt")


def recipe(output, **changes):
    settings = {
        "steps": 20,
        "batch_size": 5,
        "learning_rate": 0.05,
        "weight_decay": 0.1,
        "warmup_steps": 3,
        "mixed_precision": "no",
        "log_every": 1,
        "preview_every": 10,
        "checkpoint_every": 5,
        "keep_checkpoints": 2,
        "ema_decay": 0.8,
        "tracker": "none",
        "cpu_threads": 1,
    }
    return AutoencoderRecipe(stage="autoencoder", output=str(output), train={**settings, **changes})


class Stopped(Exception):
    """Stands for the user's Ctrl-C."""


def stop_after(step):
    def watch(progress):
        if progress.step == step:
            raise Stopped

    return watch


def newest(output):
    folder = checkpoint_folders(output)[-1]
    return folder.name, load_file(folder / "model.safetensors"), load_file(folder / "ema.safetensors")


def assert_same(one, other):
    assert one[0] == other[0]
    for mine, theirs in zip(one[1:], other[1:], strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine:
            assert torch.equal(mine[name], theirs[name])


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize("stop", [10, 13])
def test_an_interrupted_run_resumes_to_the_same_bits(tmp_path, stop, schedule):
    straight, resumed = (recipe(tmp_path / name, schedule=schedule) for name in ("straight", "resumed"))
    train(straight, Regression(noise=0.5))
    with pytest.raises(Stopped):
        train(resumed, Regression(noise=0.5), watch=stop_after(stop))
    again = Regression(noise=0.5)
    train(resumed, again)
    assert len(again.seen) == 10  # 13 was after the checkpoint of step 10: steps 11 to 13 are taken again
    assert_same(newest(tmp_path / "resumed"), newest(tmp_path / "straight"))
    exported = [torch.load(tmp_path / name / "final" / "weights.pt") for name in ("straight", "resumed")]
    assert torch.equal(exported[0]["weight"], exported[1]["weight"])


def test_a_finished_run_is_only_exported_again(tmp_path):
    train(recipe(tmp_path), Regression())
    before = torch.load(tmp_path / "final" / "weights.pt")
    again = Regression()
    assert train(recipe(tmp_path), again) == tmp_path / "final"
    assert again.seen == []
    assert torch.equal(torch.load(tmp_path / "final" / "weights.pt")["weight"], before["weight"])


def test_averaged_weights_have_their_closed_form(tmp_path):
    stage, steps = Regression(), []
    train(recipe(tmp_path), stage, watch=lambda _: steps.append(stage.model.weight.detach().clone()))
    average = steps[0]
    for number, weight in enumerate(steps[1:], start=1):
        decay = min(0.8, 1 - (1 + number) ** -0.75)
        average = decay * average + (1 - decay) * weight
    _, model, ema = newest(tmp_path)
    assert torch.equal(model["weight"], steps[-1])
    torch.testing.assert_close(ema["weight"], average)
    assert not torch.allclose(average, steps[-1], atol=1e-3)
    # What is shown and exported is the average; what trains on is not.
    assert torch.equal(stage.validated[-1], ema["weight"])
    assert torch.equal(torch.load(tmp_path / "final" / "weights.pt")["weight"], ema["weight"])
    assert torch.equal(stage.model.weight, steps[-1])
    assert stage.model.training


@pytest.mark.parametrize("parts", [2, 3])
def test_accumulated_gradients_are_those_of_the_batch(tmp_path, parts):
    """Also where the parts are of unequal size: 7 samples in 2 or 3."""
    whole, pieces = Regression(), Regression()
    train(recipe(tmp_path / "whole", batch_size=7), whole)
    train(recipe(tmp_path / "pieces", batch_size=7, gradient_accumulation_steps=parts), pieces)
    assert len(pieces.seen) == parts * len(whole.seen)
    torch.testing.assert_close(pieces.model.weight, whole.model.weight, rtol=0, atol=1e-5)
    assert [i for part in pieces.seen[:parts] for i in part] == whole.seen[0]


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    train(recipe(tmp_path, keep_checkpoints=3), Regression())
    names = sorted(folder.name for folder in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000010", "step-00000015", "step-00000020"]
    assert {file.name for file in (tmp_path / "checkpoints" / names[0]).iterdir()} == PARTS
    state = json.loads((tmp_path / "checkpoints" / names[0] / "state.json").read_text())
    assert state["step"] == 10
    assert state["recipe"]["train"]["ema_decay"] == 0.8
    assert state["recipe"]["autoencoder"]["latent_channels"] == 16  # defaults are written out


def test_checkpoints_come_when_due_however_often_figures_are_logged(tmp_path):
    seen = []
    train(
        recipe(tmp_path, log_every=7, checkpoint_every=5, preview_every=9, keep_checkpoints=9),
        Regression(),
        watch=lambda progress: seen.append((progress.step, "validation/error" in progress.figures)),
    )
    assert [folder.name[-2:] for folder in checkpoint_folders(tmp_path)] == ["05", "10", "15", "20"]
    assert seen == [(7, False), (9, True), (14, False), (18, True), (20, True)]
    previews = sorted(file.name for file in (tmp_path / "previews").iterdir())
    assert previews == ["step-00000009.png", "step-00000018.png", "step-00000020.png"]


def test_watchers_get_the_figures(tmp_path):
    seen = []
    train(recipe(tmp_path), Regression(), watch=seen.append)
    assert [progress.step for progress in seen] == list(range(1, 21))
    assert seen[0].figures.keys() == {"samples", "learning_rate", "gradient_norm", "samples_per_second"}
    assert seen[-1].loss < seen[0].loss
    assert seen[1].figures["learning_rate"] == pytest.approx(0.05 * 2 / 3)  # warming up over 3 steps
    assert seen[-1].figures["learning_rate"] == pytest.approx(0, abs=1e-4)  # cosine, to nothing


def test_only_what_trains_is_trained_and_only_matrices_decay(tmp_path):
    stage = Regression()
    train(recipe(tmp_path), stage)
    assert torch.equal(stage.model.frozen, torch.ones(2))
    assert newest(tmp_path)[1].keys() == {"weight", "bias"}
    optimizer = torch.load(checkpoint_folders(tmp_path)[-1] / "optimizer.pt", weights_only=True)["optimizer"]
    assert [group["weight_decay"] for group in optimizer["param_groups"]] == [0.1, 0.0]


def failing_saves(*numbers):
    """Return a ``save_file`` whose given calls fail, counted from 1: two a checkpoint."""
    written, save_file = [], checkpoint.save_file

    def fails(tensors, file):
        written.append(file)
        if len(written) in numbers:
            raise OSError("no space left on device")
        save_file(tensors, file)

    return fails


def test_a_save_that_fails_is_said_and_training_goes_on(tmp_path, monkeypatch, caplog):
    failing = failing_saves(4, 5)  # the second checkpoint's averaged weights, the third's weights
    monkeypatch.setattr(checkpoint, "save_file", failing)
    train(recipe(tmp_path, keep_checkpoints=9), Regression())
    assert [folder.name for folder in checkpoint_folders(tmp_path)] == ["step-00000005", "step-00000020"]
    assert not list((tmp_path / "checkpoints").glob(".*"))
    said = [record.message for record in caplog.records if record.levelname == "ERROR"]
    assert len(said) == 2
    assert re.search(r"step-00000010 cannot be written: no space left .* the last good checkpoint is kept", said[0])
    train(recipe(tmp_path / "straight"), Regression())
    assert_same(newest(tmp_path), newest(tmp_path / "straight"))


def test_a_last_save_that_fails_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "save_file", failing_saves(7))
    with pytest.raises(OSError, match="step-00000020 cannot be written: no space left"):
        train(recipe(tmp_path), Regression())
    assert [folder.name for folder in checkpoint_folders(tmp_path)] == ["step-00000010", "step-00000015"]
    assert not (tmp_path / "final").exists()
    monkeypatch.undo()
    train(recipe(tmp_path), Regression())
    train(recipe(tmp_path / "straight"), Regression())
    assert_same(newest(tmp_path), newest(tmp_path / "straight"))


DAMAGE = {
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "flipped": lambda file: file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:]),
    "empty": lambda file: file.write_bytes(b""),
    "missing": lambda file: file.unlink(),
}


@pytest.mark.parametrize("part", sorted(PARTS))
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, part, damage, caplog):
    with pytest.raises(Stopped):
        train(recipe(tmp_path), Regression(), watch=stop_after(10))
    file = checkpoint_folders(tmp_path)[-1] / part
    DAMAGE[damage](file)
    stage = Regression()
    train(recipe(tmp_path), stage)
    assert len(stage.seen) == 15  # from step 5 on
    assert str(file) in caplog.text
    assert "going back to an older checkpoint" in caplog.text
    train(recipe(tmp_path / "straight"), Regression())
    assert_same(newest(tmp_path), newest(tmp_path / "straight"))


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_anew(tmp_path):
    with pytest.raises(Stopped):
        train(recipe(tmp_path), Regression(), watch=stop_after(10))
    for folder in checkpoint_folders(tmp_path):
        DAMAGE["truncated"](folder / "ema.safetensors")
    with pytest.raises(UserError, match=r"no checkpoint of .* is whole .*ema\.safetensors has .*: delete") as caught:
        train(recipe(tmp_path), Regression())
    assert "\n" not in str(caught.value)


def test_older_checkpoints_stay_until_the_new_one_reads_back_right(tmp_path, monkeypatch):
    with pytest.raises(Stopped):
        train(recipe(tmp_path), Regression(), watch=stop_after(10))
    sync = checkpoint.sync

    def lying_disk(path):
        """Loses a byte behind the manifest's back."""
        if path.name == "manifest.json":
            DAMAGE["truncated"](path.parent / "model.safetensors")
        sync(path)

    monkeypatch.setattr(checkpoint, "sync", lying_disk)
    with pytest.raises(checkpoint.CheckpointDamaged, match=r"step-00000015.model\.safetensors has"):
        train(recipe(tmp_path), Regression())
    kept = [folder.name for folder in checkpoint_folders(tmp_path)]
    assert kept == ["step-00000005", "step-00000010", "step-00000015"]


def test_a_checkpoint_of_other_shapes_is_named(tmp_path):
    train(recipe(tmp_path), Regression())
    with pytest.raises(UserError, match=r"step-00000020 does not fit this recipe: weight is \(1, 3\).*\(2, 3\)"):
        train(recipe(tmp_path, steps=30), Regression(outputs=2))


def test_a_checkpoint_of_another_model_is_named(tmp_path):
    train(recipe(tmp_path), Regression())
    other = Regression()
    other.model.register_parameter("extra", nn.Parameter(torch.ones(2)))
    with pytest.raises(UserError, match=r"step-00000020 does not fit this recipe \(weight 'extra'\)"):
        train(recipe(tmp_path, steps=30), other)


@pytest.mark.parametrize("poison", [1, 13, 15, 20])
def test_a_loss_that_is_no_number_stops_before_the_update(tmp_path, poison):
    stage, weights = Regression(), []
    stage.poison = poison
    with pytest.raises(TrainingDiverged, match=rf"step {poison}: the loss is nan.*lower train\.learning_rate"):
        train(recipe(tmp_path, log_every=1), stage, watch=lambda _: weights.append(stage.model.weight.detach().clone()))
    assert len(weights) == poison - 1
    if weights:
        assert torch.equal(stage.model.weight, weights[-1])
    (file,) = (tmp_path / "nonfinite").iterdir()
    told = json.loads(file.read_text())
    assert told["step"] == poison
    assert [i for part in told["parts"] for i in part["samples"]] == stage.seen[-1]
    assert not (tmp_path / "final").exists()


class Poisoned(Regression):
    """Its gradient is no number in the given calls, though its loss is."""

    def __init__(self, *calls, **settings):
        super().__init__(**settings)
        self.calls = calls

    def loss(self, model, samples, data):
        loss, figures = super().loss(model, samples, data)
        if len(self.seen) in self.calls:
            loss = loss + (model.weight.sum() * 0).sqrt() * 0
        return loss, figures


def test_a_gradient_that_is_no_number_stops_before_the_update(tmp_path):
    stage = Poisoned(10)
    with pytest.raises(TrainingDiverged, match=r"step 10: the loss is [0-9.]+, its gradient's norm nan"):
        train(recipe(tmp_path, log_every=100), stage)
    assert newest(tmp_path)[0] == "step-00000005"
    assert stage.model.weight.isfinite().all()


def test_updates_that_are_no_numbers_are_left_out(tmp_path):
    stage, weights = Poisoned(7, 8), []
    train(
        recipe(tmp_path, nonfinite="skip", nonfinite_patience=2),
        stage,
        watch=lambda _: weights.append(stage.model.weight.detach().clone()),
    )
    assert len(weights) == 20
    same = [i for i, pair in enumerate(itertools.pairwise(weights), start=2) if torch.equal(*pair)]
    assert same == [7, 8]
    assert len(list((tmp_path / "nonfinite").iterdir())) == 2


def test_too_many_updates_in_a_row_stop_the_run(tmp_path):
    with pytest.raises(TrainingDiverged, match=r"step 9: .*, 3 times in a row"):
        train(recipe(tmp_path, nonfinite="skip", nonfinite_patience=2), Poisoned(7, 8, 9))
    train(recipe(tmp_path / "apart", nonfinite="skip", nonfinite_patience=2), Poisoned(5, 6, 8, 9, 12))


def test_sigterm_saves_the_step_at_hand_and_stops(tmp_path):
    stage = Regression(noise=0.5)

    def terminate(progress):
        if progress.step == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(loop.Stopped, match=r"stopped after step 8 of 20, saved"):
        train(recipe(tmp_path), stage, watch=terminate)
    assert newest(tmp_path)[0] == "step-00000008"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    train(recipe(tmp_path), Regression(noise=0.5))
    train(recipe(tmp_path / "straight"), Regression(noise=0.5))
    assert_same(newest(tmp_path), newest(tmp_path / "straight"))


class Reading(Regression):
    """Reads its samples in ``read``, which may be another process."""

    def read(self, samples):
        return self.x[samples.index], self.y[samples.index], samples.index.tolist(), os.getpid()

    def loss(self, model, samples, data):
        x, y, index, process = data
        self.seen.append(index)
        self.processes = {process} | getattr(self, "processes", set())
        return (model(x) - y - self.noise * samples.randn("noise", (1,))).square().mean() * samples.share, {}


@pytest.mark.parametrize("stop", [10, 13])
def test_worker_processes_change_nothing(tmp_path, stop):
    """12 samples, 5 a step: stopped in the middle of an epoch, resumed across its end."""
    straight, read = Reading(noise=0.5), Reading(noise=0.5)
    train(recipe(tmp_path / "straight"), straight)
    with pytest.raises(Stopped):
        train(recipe(tmp_path / "read", workers=2), read, watch=stop_after(stop))
    again = Reading(noise=0.5)
    train(recipe(tmp_path / "read", workers=2), again)
    assert read.seen[:10] + again.seen == straight.seen
    assert straight.processes == {os.getpid()}
    assert os.getpid() not in again.processes
    assert len(again.processes) == 2
    assert_same(newest(tmp_path / "read"), newest(tmp_path / "straight"))


def test_gradients_are_clipped(tmp_path):
    """With plain numbers: Adam does not see the scale, so the moments in the checkpoint tell."""
    train(recipe(tmp_path, steps=1, gradient_clip=1e-3), Regression())
    state = torch.load(checkpoint_folders(tmp_path)[-1] / "optimizer.pt", weights_only=True)["optimizer"]["state"]
    norm = torch.cat([(state[i]["exp_avg"] / 0.1).flatten() for i in state]).norm()
    assert norm == pytest.approx(1e-3, rel=1e-3)


def test_tensorboard_gets_the_figures(tmp_path):
    train(recipe(tmp_path, steps=2, tracker="tensorboard"), Regression())
    events = list((tmp_path / "logs").rglob("events.out.tfevents.*"))
    assert len(events) == 1
    assert b"gradient_norm" in events[0].read_bytes()


def test_bfloat16_keeps_weights_in_float32(tmp_path):
    stage = Regression()
    train(recipe(tmp_path, mixed_precision="bf16"), stage)
    assert stage.model.weight.dtype == torch.float32
    plain = Regression()
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    train(recipe(tmp_path / "plain"), plain)
    assert not torch.equal(plain.model.weight, stage.model.weight)
    torch.testing.assert_close(plain.model.weight, stage.model.weight, rtol=0, atol=0.05)


def test_the_recipe_is_left_beside_the_weights(tmp_path):
    final = train(recipe(tmp_path, seed=7), Regression())
    assert json.loads((final / "recipe.json").read_text())["train"]["seed"] == 7
