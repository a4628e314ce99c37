"""The guard by itself: sets of parameters are clipped, and left out, each for itself."""

import json
import re

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from latteflow.train.guard import Guard, TrainingDiverged
from latteflow.train.samples import Samples
from latteflow.train.stage import Stage

NAN, INF = float("nan"), float("inf")


class Pair(Stage):
    """Two sets of parameters."""

    def __init__(self):
        self.model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})

    def clipped_together(self):
        return [(name, list(module.parameters())) for name, module in self.model.items()]

    def describe(self, samples):
        return {"t": [0.5] * len(samples)}


@pytest.fixture
def stage():
    return Pair()


@pytest.fixture
def guard(stage, tmp_path):
    return Guard(stage, Accelerator(cpu=True), clip=1.0, policy="skip", patience=2, folder=tmp_path / "nonfinite")


def set_gradients(stage, **sizes):
    """Let every gradient of a set have this value; None leaves none."""
    for name, size in sizes.items():
        for parameter in stage.model[name].parameters():
            parameter.grad = None if size is None else torch.full_like(parameter, size)


def gradients(stage, name):
    return [parameter.grad for parameter in stage.model[name].parameters()]


def samples(*places, counted=True):
    places = torch.tensor(places)
    return Samples(10 * places, places, 4, 4, 0, 6, counted)


def losses(total=1.0, **own):
    return {"all": torch.tensor(total), **{f"loss/{name}": torch.tensor(value) for name, value in own.items()}}


def test_each_set_is_clipped_by_its_own_norm(stage, guard):
    set_gradients(stage, a=10.0, b=0.1)
    norms = guard.clip_gradients(losses(), [samples(0, 1)], 7)
    assert float(norms["a"]) == pytest.approx(10 * 6**0.5)  # of six elements, before clipping
    assert float(norms["b"]) == pytest.approx(0.1 * 6**0.5)
    assert torch.cat([g.flatten() for g in gradients(stage, "a")]).norm() == pytest.approx(1, rel=1e-5)
    assert all(torch.equal(g, torch.full_like(g, 0.1)) for g in gradients(stage, "b"))


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("where", ["gradient", "loss"])
def test_a_set_that_is_no_number_is_left_out_and_the_other_is_not(stage, guard, tmp_path, bad, where):
    set_gradients(stage, a=bad if where == "gradient" else 0.1, b=10.0)
    own = {"a": bad if where == "loss" else 1.0, "b": 1.0}
    guard.clip_gradients(losses(bad, **own), [samples(0, 1), samples(2, 3)], 7)
    assert gradients(stage, "a") == [None, None]
    assert torch.cat([g.flatten() for g in gradients(stage, "b")]).norm() == pytest.approx(1, rel=1e-5)
    assert guard.skipped == {"a": 1, "b": 0}
    (file,) = (tmp_path / "nonfinite").iterdir()
    assert file.name == "step-00000007-a-process-0.json"
    told = json.loads(file.read_text())
    assert (told["step"], told["set"]) == (7, "a")
    assert told["parts"] == [
        {"samples": [0, 10], "places": [0, 1], "t": [0.5, 0.5]},
        {"samples": [20, 30], "places": [2, 3], "t": [0.5, 0.5]},
    ]


def test_a_set_is_not_answerable_for_the_others_loss(stage, guard):
    """The step's loss is NaN because of a; b has no samples here, hence no loss of its own."""
    set_gradients(stage, a=NAN, b=0.1)
    guard.clip_gradients(losses(NAN, a=NAN), [samples(0)], 7)
    assert guard.skipped == {"a": 1, "b": 0}
    assert all(g is not None for g in gradients(stage, "b"))


def test_gradients_so_large_that_their_norm_is_infinite_are_left_out(stage, guard):
    set_gradients(stage, a=1e30, b=0.1)
    guard.clip_gradients(losses(), [samples(0)], 7)
    assert gradients(stage, "a") == [None, None]


def test_only_updates_in_a_row_are_counted_and_each_set_for_itself(stage, guard):
    def step(a, b):
        set_gradients(stage, a=a, b=b)
        guard.clip_gradients(losses(a=1.0, b=1.0), [samples(0)], 7)
        return guard.skipped["a"], guard.skipped["b"]

    assert [step(NAN, 1.0), step(NAN, NAN), step(1.0, NAN), step(NAN, 1.0)] == [(1, 0), (2, 1), (0, 2), (1, 0)]
    assert step(None, NAN) == (1, 1)  # a step without samples is neither good nor bad
    assert step(NAN, None) == (2, 1)
    with pytest.raises(TrainingDiverged, match=r"step 7: the loss of a is 1\.0, .*norm nan .*3 times in a row; lower"):
        step(NAN, 1.0)


def test_a_step_without_any_gradient_is_fine(stage, guard):
    set_gradients(stage, a=None, b=None)
    norms = guard.clip_gradients({"all": torch.zeros(())}, [], 7)
    assert {name: float(norm) for name, norm in norms.items()} == {"a": 0, "b": 0}
    assert guard.skipped == {"a": 0, "b": 0}


def test_to_stop_is_to_leave_all_gradients_unused(stage, tmp_path):
    guard = Guard(stage, Accelerator(cpu=True), clip=1.0, policy="stop", patience=9, folder=tmp_path)
    set_gradients(stage, a=0.1, b=NAN)
    with pytest.raises(TrainingDiverged, match=r"step 7: the loss of b is 1\.0, .* \(samples in .*b-process-0\.json\)"):
        guard.clip_gradients(losses(b=1.0), [samples(0)], 7)


def test_samples_that_do_not_count_are_not_suspected(stage, guard, tmp_path):
    set_gradients(stage, a=NAN, b=0.1)
    guard.clip_gradients(losses(), [samples(0), samples(1, counted=False)], 7)
    (file,) = (tmp_path / "nonfinite").iterdir()
    assert [part["places"] for part in json.loads(file.read_text())["parts"]] == [[0]]


def test_where_nothing_can_be_written_it_is_said_instead(stage, guard, tmp_path, caplog):
    """One process's disk must not make it leave the others."""
    (tmp_path / "nonfinite").write_text("in the way")
    set_gradients(stage, a=NAN, b=0.1)
    guard.clip_gradients(losses(), [samples(0, 3)], 7)
    assert gradients(stage, "a") == [None, None]
    assert re.search(r"step-00000007-a-process-0\.json cannot be written .*'places': \[0, 3\]", caplog.text)


def test_everything_is_one_set_by_default(tmp_path):
    stage = Stage()
    stage.model = nn.Linear(2, 1)
    stage.model.bias.requires_grad_(False)
    guard = Guard(stage, Accelerator(cpu=True), clip=1.0, policy="stop", patience=1, folder=tmp_path)
    assert [(name, [id(p) for p in parameters]) for name, parameters in guard.sets] == [
        ("all", [id(stage.model.weight)])
    ]
