"""The frontier of quality and cost: costs counted, the same noise in every row, the model left as it was."""

from __future__ import annotations

import json

import pytest
import torch

import toys
from latteflow.errors import UserError
from latteflow.evaluate import frontier
from latteflow.evaluate.frontier import Sampling, sampling_frontier


@pytest.mark.parametrize(
    ("sampling", "cost"),
    [
        (Sampling(), (40, 80)),
        (Sampling(guidance_scale=1.0), (40, 40)),
        (Sampling("heun", 6), (11, 22)),
        (Sampling("dpm++", 12), (12, 24)),
        (Sampling("unipc", 8, guidance_interval=(0.25, 1.0)), (8, 14)),  # t = 0 and 1 / 8 are not guided
        (Sampling(steps=4, guidance_interval=(0.25, 0.5)), (4, 6)),
    ],
)
def test_a_cost_is_counted(sampling, cost):
    assert sampling.cost() == cost


def test_a_cost_is_that_of_the_pipelines_call(monkeypatch):
    pipe = toys.toy_pipeline()
    sequences = []
    forward = type(pipe.transformer).forward

    def counted(self, x_t, *args, **named):
        sequences.append(len(x_t))
        return forward(self, x_t, *args, **named)

    monkeypatch.setattr(type(pipe.transformer), "forward", counted)
    sampling = Sampling(steps=8, guidance_interval=(0.3, 0.8))
    pipe("red", num_inference_steps=8, guidance_interval=(0.3, 0.8), generator=torch.Generator().manual_seed(0))
    assert (len(sequences), sum(sequences)) == sampling.cost() == (8, 12)


def test_every_way_draws_the_same_captions_from_the_same_noise(toy_set, tmp_path, monkeypatch):
    data = {"leave_out_groups": [], "leave_out_subgroups": [], "styles": [], "skin_tones": ["none"]}
    (tmp_path / "recipe.json").write_text(json.dumps({"data": data}))
    seen = []

    def measured(pixels):
        seen.append(pixels)
        return {"mean": float(pixels.float().mean())}

    monkeypatch.setattr(frontier, "outside_measures", lambda judge, data, folder, part, watch: [("toy", measured)])
    solvers, drawings_of = [], frontier.drawings_of

    def drawn(pipe, *args, **sampling):
        solvers.append(type(pipe.scheduler).__name__)
        return drawings_of(pipe, *args, **sampling)

    monkeypatch.setattr(frontier, "drawings_of", drawn)
    pipe = toys.toy_pipeline()
    own = pipe.scheduler
    with torch.no_grad():
        for io in pipe.transformer.io:
            io.head.weight.zero_()
            io.head.bias.fill_(0.3)
    ways = [Sampling(steps=4), Sampling("heun", 2), Sampling(steps=4), Sampling(steps=8)]
    real, points = sampling_frontier(pipe, tmp_path, toy_set, tmp_path, ways, drawings=3)
    assert pipe.scheduler is own
    assert [point.sampling for point in points] == ways
    assert [point.calls for point in points] == [4, 3, 4, 8]
    assert ["Heun" in solver for solver in solvers] == [False, True, False, False]
    first, heun, again, finer = seen[:4]
    assert torch.equal(first, again)
    assert (first.int() - heun.int()).abs().max() <= 1  # the velocity is constant: no solver makes a difference
    assert (first.int() - finer.int()).abs().max() <= 1
    assert points[0].figures == points[2].figures == {"mean": float(first.float().mean())}
    assert real == {"mean": float(seen[4].float().mean())}
    with pytest.raises(UserError, match="unknown scheduler 'rk4'"):
        sampling_frontier(pipe, tmp_path, toy_set, tmp_path, [Sampling("rk4")], drawings=3)
    assert pipe.scheduler is own
