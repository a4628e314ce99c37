"""Classifier-free guidance: the formula, its neutral scale, and the interval it may be limited to."""

import math

import pytest
import torch

from latteflow.errors import UserError
from latteflow.flow.guidance import guidance_is_active, guide
from latteflow.flow.schedulers import make_scheduler, schedule_times, set_schedule


def velocities(dtype=torch.float32):
    return torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scale_1_returns_the_conditional_velocity_bit_for_bit(dtype):
    v_cond, v_uncond = velocities(dtype)
    assert not torch.equal(v_uncond + (v_cond - v_uncond), v_cond)  # the formula alone would round
    assert torch.equal(guide(v_cond, v_uncond, 1.0), v_cond)


def test_scale_moves_along_the_line_through_both_velocities():
    v_cond, v_uncond = torch.tensor([3.0, -1.0]), torch.tensor([1.0, 1.0])
    assert guide(v_cond, v_uncond, 0.0).tolist() == [1, 1]
    assert guide(v_cond, v_uncond, 0.5).tolist() == [2, 0]
    assert guide(v_cond, v_uncond, 4.0).tolist() == [9, -7]


def test_velocities_are_never_broadcast():
    with pytest.raises(ValueError, match="one shape"):
        guide(torch.zeros(4, 3), torch.zeros(1, 3), 2.0)


def test_guidance_is_active_at_all_times_unless_the_scale_is_1():
    assert all(guidance_is_active(t, 4.0) for t in (0.0, 0.5, 1.0))
    assert guidance_is_active(0.5, 0.0)
    assert not any(guidance_is_active(t, 1.0) for t in (0.0, 0.5, 1.0))


@pytest.mark.parametrize("name", ["euler", "unipc"])
def test_an_interval_guides_the_calls_that_start_in_it(name):
    scheduler = make_scheduler(name)
    set_schedule(scheduler, 10)
    times = schedule_times(scheduler)
    for lo, hi in ((0.0, 0.3), (0.3, 0.8), (0.7, 1.0)):
        guided = [i for i, t in enumerate(times) if guidance_is_active(t, 4.0, (lo, hi))]
        assert guided == list(range(round(10 * lo), round(10 * hi)))


def test_an_empty_interval_guides_nothing():
    assert not any(guidance_is_active(t, 4.0, (0.5, 0.5)) for t in (0.0, 0.5, 1.0))


@pytest.mark.parametrize("interval", [(0.8, 0.2), (-0.1, 1.0), (0.0, 1.1), (math.nan, 1.0)])
def test_intervals_outside_the_flow_are_refused(interval):
    with pytest.raises(UserError, match="guidance interval"):
        guidance_is_active(0.5, 4.0, interval)
