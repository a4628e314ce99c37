"""The loop by itself, on a regression of three numbers: resuming, averaging, accumulating, stopping."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from latteflow.errors import UserError
from latteflow.train import checkpoint
from latteflow.train.checkpoint import checkpoint_folders
from latteflow.train.loop import TrainingDiverged, train
from latteflow.train.recipe import AutoencoderRecipe

PARTS = {"model.safetensors", "ema.safetensors", "optimizer.pt", "state.json"}


class Regression:
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

    def loss(self, model, index, generator):
        self.seen.append(index.tolist())
        y = self.y[index] + self.noise * torch.randn(len(index), 1, generator=generator)
        loss = (model(self.x[index]) - y).square().mean()
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
    assert seen[0].figures.keys() == {"samples", "learning_rate", "gradient_norm"}
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


def test_an_interrupted_save_leaves_no_visible_checkpoint(tmp_path, monkeypatch):
    written, save_file = [], checkpoint.save_file

    def fails_later(tensors, file):
        written.append(file)
        if len(written) == 4:  # the averaged weights of the second checkpoint
            raise OSError("disk full")
        save_file(tensors, file)

    monkeypatch.setattr(checkpoint, "save_file", fails_later)
    with pytest.raises(OSError, match="disk full"):
        train(recipe(tmp_path), Regression())
    assert [folder.name for folder in checkpoint_folders(tmp_path)] == ["step-00000005"]
    assert [folder.name for folder in (tmp_path / "checkpoints").glob("[!.]*")] == ["step-00000005"]
    monkeypatch.undo()
    train(recipe(tmp_path), Regression())
    train(recipe(tmp_path / "straight"), Regression())
    assert_same(newest(tmp_path), newest(tmp_path / "straight"))
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_an_incomplete_folder_is_no_checkpoint(tmp_path):
    with pytest.raises(Stopped):
        train(recipe(tmp_path), Regression(), watch=stop_after(10))
    (checkpoint_folders(tmp_path)[-1] / "optimizer.pt").unlink()
    assert [folder.name for folder in checkpoint_folders(tmp_path)] == ["step-00000005"]


@pytest.mark.parametrize("part", sorted(PARTS))
@pytest.mark.parametrize("damage", ["truncated", "foreign", "empty"])
def test_a_damaged_checkpoint_is_named(tmp_path, part, damage):
    with pytest.raises(Stopped):
        train(recipe(tmp_path), Regression(), watch=stop_after(10))
    file = checkpoint_folders(tmp_path)[-1] / part
    content = file.read_bytes()
    file.write_bytes({"truncated": content[: len(content) // 2], "foreign": b"[1, 2] not it", "empty": b""}[damage])
    with pytest.raises(UserError, match=r"step-00000010.* cannot be read .*: delete it") as caught:
        train(recipe(tmp_path), Regression())
    assert "\n" not in str(caught.value)


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


def test_a_loss_that_is_no_number_ends_the_run_and_spares_the_checkpoint(tmp_path):
    stage = Regression()
    stage.poison = 13
    with pytest.raises(TrainingDiverged, match=r"step 15: .*nan.*lower train\.learning_rate"):
        train(recipe(tmp_path, log_every=100), stage)
    name, model, ema = newest(tmp_path)
    assert name == "step-00000010"
    assert all(tensor.isfinite().all() for tensors in (model, ema) for tensor in tensors.values())
    assert not (tmp_path / "final").exists()


def test_a_gradient_that_is_no_number_is_never_saved(tmp_path):
    """The loss of the step is finite still; the weights after it are not."""
    stage = Regression()

    class Root(torch.autograd.Function):
        @staticmethod
        def forward(context, x):
            return x.clone()

        @staticmethod
        def backward(context, gradient):
            return gradient * float("inf") if len(stage.seen) == 10 else gradient

    loss = stage.loss
    stage.loss = lambda *given: (Root.apply(loss(*given)[0]), {})
    with pytest.raises(TrainingDiverged, match="step 10"):
        train(recipe(tmp_path, log_every=100), stage)
    assert newest(tmp_path)[0] == "step-00000005"


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
