"""Figures of speed, by plain arithmetic; and that measuring changes nothing."""

import pytest
import torch
from test_loop import Regression, assert_same, newest, recipe

from latteflow.train import meter
from latteflow.train.loop import train
from latteflow.train.meter import Meter, matrix_rate


@pytest.fixture
def clock(monkeypatch):
    """A clock that is set by hand."""
    times = {"now": 100.0}
    monkeypatch.setattr(meter.time, "monotonic", lambda: times["now"])
    return times


def test_speed_is_of_the_time_since_the_last_reading(clock):
    found = Meter(None, None)
    clock["now"] += 2
    found.count(30)
    found.count(10)
    assert found.reading() == {"samples_per_second": 20}
    clock["now"] += 4
    found.count(10)
    assert found.reading() == {"samples_per_second": 2.5}
    assert found.seconds == 6


def test_mfu_is_the_work_done_over_the_work_that_could_be(clock):
    found = Meter(flops_per_sample=3e9, rate=1e12)
    clock["now"] += 0.5
    found.count(50)
    assert found.reading() == {"samples_per_second": 100, "mfu": pytest.approx(0.3)}


def test_two_readings_at_one_moment_are_no_error(clock):
    found = Meter(None, None)
    found.reading()
    assert found.reading()["samples_per_second"] == 0


def test_the_rate_is_of_the_fastest_product_and_the_first_one_warms_up(monkeypatch):
    """Six products of 10, 5, 4, 2, 8 and 8 seconds; of size n one takes 2 n^3 operations."""
    moments = [m for start, took in enumerate((10, 5, 4, 2, 8, 8)) for m in (100.0 * start, 100.0 * start + took)]
    monkeypatch.setattr(meter.time, "perf_counter", lambda: moments.pop(0))
    assert matrix_rate(torch.device("cpu"), torch.float32, size=10) == 2 * 10**3 / 2
    assert not moments


def test_a_measured_rate_is_plausible():
    rate = matrix_rate(torch.device("cpu"), torch.float32, size=256)
    assert 1e8 < rate < 1e14


class Dropping(Regression):
    """Draws from torch's own generator, as dropout does."""

    def loss(self, model, samples, data):
        loss, figures = super().loss(model, samples, data)
        return loss * (1 + torch.rand(())), figures


class Metered(Dropping):
    def flops_per_sample(self):
        return 18.0


def test_a_run_logs_its_mfu_and_learns_what_it_would_without(tmp_path, monkeypatch):
    """The measurement draws from torch's own generator too."""
    rates = []

    def measured(device, dtype):
        rates.append(dtype)
        torch.rand(7)
        return 1e6

    monkeypatch.setattr("latteflow.train.loop.matrix_rate", measured)
    seen = []
    train(recipe(tmp_path / "metered"), Metered(noise=0.5), watch=seen.append)
    assert rates == [torch.float32]
    for progress in seen:
        figures = progress.figures
        assert figures["mfu"] == pytest.approx(figures["samples_per_second"] * 18 / 1e6)
    train(recipe(tmp_path / "plain"), Dropping(noise=0.5))
    assert_same(newest(tmp_path / "metered"), newest(tmp_path / "plain"))
