"""Muon beside AdamW: who gets which parameter, and that the pair is saved, resumed and scheduled as one."""

import copy

import pytest
import torch
from torch import nn

from latteflow.train.optimizer import Together, build_optimizer, hidden_matrices
from latteflow.train.recipe import TrainSection


class Reader(nn.Module):
    reads_out = True

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 3)


class Words(nn.Module):
    """An embedding tied to the output layer, two hidden matrices, a norm, a reader."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.inner = nn.Linear(4, 6)
        self.norm = nn.LayerNorm(6)
        self.back = nn.Linear(6, 4, bias=False)
        self.reader = Reader()
        self.out = nn.Linear(4, 5, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, ids):
        hidden = self.norm(self.inner(self.embedding(ids)))
        return self.out(self.back(hidden)).logsumexp(-1).mean() + self.reader.head(hidden).square().mean()


def settings(**changes):
    return TrainSection(steps=4, batch_size=1, optimizer="muon", weight_decay=0.1, **changes)


def test_only_matrices_between_layers_are_hidden():
    model = Words()
    assert [id(weight) for weight in hidden_matrices(model)] == [id(model.inner.weight), id(model.back.weight)]


def test_every_trained_parameter_has_one_optimizer():
    model = Words()
    model.back.requires_grad_(False)
    optimizer = build_optimizer(model, settings())
    assert isinstance(optimizer, Together)
    muon, adamw = optimizer.parts
    assert [id(p) for group in muon.param_groups for p in group["params"]] == [id(model.inner.weight)]
    rest = [id(p) for group in adamw.param_groups for p in group["params"]]
    assert sorted(rest) == sorted(id(p) for p in model.parameters() if p.requires_grad and p is not model.inner.weight)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1, 0.0]
    assert isinstance(build_optimizer(model, settings().model_copy(update={"optimizer": "adamw"})), torch.optim.AdamW)


def steps(model, optimizer, schedule, number):
    for _ in range(number):
        model(torch.tensor([0, 1, 2, 3])).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def made(model):
    optimizer = build_optimizer(model, settings(learning_rate=0.1))
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)


def test_a_schedule_reaches_every_part_and_a_resumed_run_repeats_the_straight_one():
    straight = Words()
    broken = copy.deepcopy(straight)
    broken.out.weight = broken.embedding.weight
    optimizer, schedule = made(straight)
    steps(straight, optimizer, schedule, 4)
    assert {group["lr"] for part in optimizer.parts for group in part.param_groups} == {0.1 / 16}

    first, its_schedule = made(broken)
    steps(broken, first, its_schedule, 2)
    second, resumed_schedule = made(broken)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    resumed_schedule.load_state_dict(its_schedule.state_dict())
    steps(broken, second, resumed_schedule, 2)
    assert {group["lr"] for part in second.parts for group in part.param_groups} == {0.1 / 16}
    for expected, found in zip(straight.parameters(), broken.parameters(), strict=True):
        assert torch.equal(found, expected)


def test_a_closure_is_refused():
    with pytest.raises(ValueError, match="closure"):
        build_optimizer(Words(), settings()).step(lambda: 0.0)
