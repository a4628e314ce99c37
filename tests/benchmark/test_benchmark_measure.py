"""Turns, medians, weights and bare products."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from latteflow.benchmark.measure import Timing, copy_bandwidth, interleaved, peak_bytes, read_bandwidth
from latteflow.benchmark.products import Products
from latteflow.benchmark.weights import fill, with_random_weights

CPU = torch.device("cpu")


class Clock:
    """Seconds that pass only where a case says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_cases_take_turns_and_every_round_starts_with_the_next():
    calls = []
    cases = {name: lambda number, name=name: calls.append((number, name)) for name in "abc"}
    timings = interleaved(cases, rounds=3, device=CPU, warm_up=1)
    assert "".join(name for _, name in calls) == "abcbcacababc"
    assert [number for number, _ in calls] == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert {name: len(timing.seconds) for name, timing in timings.items()} == {"a": 3, "b": 3, "c": 3}


def test_warm_up_does_not_count_and_each_case_gets_its_own_seconds():
    clock = Clock()

    def case(seconds):
        def call(number):
            clock.now += 100.0 if number == 0 else seconds * number

        return call

    timings = interleaved({"fast": case(1.0), "slow": case(4.0)}, rounds=3, device=CPU, clock=clock)
    assert timings["fast"].seconds == (1.0, 2.0, 3.0)
    assert timings["slow"].seconds == (4.0, 8.0, 12.0)


def test_a_budget_ends_the_rounds_but_not_before_the_least():
    clock = Clock()

    def call(number):
        clock.now += 10.0

    given = {"device": CPU, "clock": clock, "rounds": 9, "warm_up": 0}
    assert len(interleaved({"a": call}, seconds=35.0, least=1, **given)["a"].seconds) == 4
    assert len(interleaved({"a": call}, seconds=0.0, least=3, **given)["a"].seconds) == 3


def test_median_and_percentiles():
    timing = Timing(tuple(float(value) for value in (9, 1, 2, 3, 4, 5, 6, 7, 8, 100)))
    assert (timing.median, timing.low, timing.high) == (5.5, 2.0, 9.0)
    assert (Timing((3.0,)).low, Timing((3.0,)).high) == (3.0, 3.0)


def test_rates_and_memory_are_numbers_of_this_machine():
    assert copy_bandwidth(CPU, size=2**16) > 0
    assert read_bandwidth(CPU, size=2**16) > 0
    assert peak_bytes(CPU) > 10**7


_CHILD = "import torch; from latteflow.benchmark.measure import peak_bytes; print(peak_bytes(torch.device('cpu')))"


def test_a_process_does_not_tell_its_parents_peak():
    much = torch.ones(2**30, dtype=torch.uint8)  # touched, so that it is resident
    assert peak_bytes(CPU) > much.nbytes
    child = subprocess.run([sys.executable, "-c", _CHILD], capture_output=True, text=True, check=True)
    assert 10**7 < int(child.stdout) < much.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_weights_are_neither_zero_nor_denormal_nor_alike(dtype):
    model = with_random_weights(lambda: nn.Sequential(nn.Linear(1100, 1000), nn.LayerNorm(1000)), CPU, dtype)
    weight = model[0].weight
    assert all(parameter.dtype == dtype and not parameter.requires_grad for parameter in model.parameters())
    assert all((parameter.abs() >= 1e-7).all() for parameter in model.parameters())
    assert weight.float().std() == pytest.approx(0.02, rel=0.02)
    assert model[1].weight.float().mean() == pytest.approx(1.0, abs=0.01)
    assert torch.linalg.matrix_rank(weight.float()) == 1000
    assert torch.get_default_dtype() == torch.float32


def test_weights_longer_than_the_block_repeat_it_from_different_places():
    model = nn.ModuleList(nn.Linear(1024, 1100, bias=False) for _ in range(2))
    fill(model)
    first, second = (layer.weight.detach().view(-1) for layer in model)
    assert torch.equal(first[:1000], first[1_048_573:1_049_573])
    assert not torch.equal(first[:1000], second[:1000])


def test_constructors_draw_nothing_and_keep_their_buffers():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.empty(4, 4))
            self.register_buffer("places", torch.arange(4.0))
            self.weight.data.normal_(std=1e9)

    model = with_random_weights(Model, CPU, torch.bfloat16)
    assert model.weight.abs().max() < 1
    assert model.places.tolist() == [0, 1, 2, 3]


def test_products_are_those_of_the_call_and_no_others(monkeypatch):
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 2, bias=False))
    x = torch.randn(3, 4)
    products = Products(lambda: model(x).softmax(-1))
    assert [product.overloadpacket for product, _, _ in products._noted] == [torch.ops.aten.addmm, torch.ops.aten.mm]
    seen = []
    products._noted = [(lambda *args, **kwargs: seen.append(args), args, kwargs) for _, args, kwargs in products._noted]
    products(5)
    assert len(seen) == len(products) == 2
    assert seen[1][1].data_ptr() == model[3].weight.data_ptr()


def test_programs_read_peaks_in_one_way():
    """A child's ``ru_maxrss`` begins with its parent's."""
    programs = list((Path(__file__).parents[2] / "benchmarks").glob("*.py"))
    assert len(programs) > 5
    assert [file.name for file in programs if "getrusage" in file.read_text(encoding="utf-8")] == []
