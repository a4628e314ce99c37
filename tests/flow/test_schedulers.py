"""Solvers: each expert gets its share of the calls, and each solver converges at its order to the exact solution."""

import math

import diffusers
import pytest
import torch

from latteflow.errors import UserError
from latteflow.flow.intervals import Intervals
from latteflow.flow.path import interpolate, target_velocity
from latteflow.flow.schedulers import (
    SCHEDULERS,
    make_scheduler,
    model_output_of_velocity,
    num_network_calls,
    schedule_times,
    set_schedule,
    sigma_of_time,
    time_of_sigma,
)

# DPM-Solver's set_timesteps converts a tensor by numpy 1's protocol.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

GROUPS_AND_STEPS = [(k, n) for k in (1, 2, 4, 7, 14, 28) for n in sorted({k, 2 * k, 28, 56}) if n % k == 0]
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
NO_FLOW = [
    diffusers.DDIMScheduler(prediction_type="flow_prediction"),  # has no sigmas
    diffusers.EulerDiscreteScheduler(),
    diffusers.DPMSolverMultistepScheduler(),
    diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction"),
    diffusers.UniPCMultistepScheduler(use_flow_sigmas=True),
    diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
]


def prepared(name, num_inference_steps):
    scheduler = make_scheduler(name)
    set_schedule(scheduler, num_inference_steps)
    return scheduler


def integrate(scheduler, velocity, x):
    """Drive the scheduler from noise ``x`` at t = 0 to the data at t = 1."""
    for t, timestep in zip(schedule_times(scheduler), scheduler.timesteps, strict=True):
        x = scheduler.step(model_output_of_velocity(velocity(x, t)), timestep, x).prev_sample
    return x


def gaussian_error(scheduler, mean=1.0, std=1.0):
    """Return the error of the flow to N(mean, std^2), known in closed form.

    x_t = (1 - t) x_0 + t x_1 has mean t m and variance w = (1 - t)^2 + t^2 s^2. Regressing u = x_1 - x_0 on x_t gives
    u(x, t) = m + (t s^2 - (1 - t)) / w * (x - t m), and d/dt sqrt(w) = (t s^2 - (1 - t)) / sqrt(w), hence the flow
    x(t) = t m + sqrt(w) x_0.
    """

    def velocity(x, t):
        variance = (1 - t) ** 2 + t**2 * std**2
        return mean + (t * std**2 - (1 - t)) / variance * (x - t * mean)

    x_0 = torch.tensor([[-1.5], [0.5], [2.0]], dtype=torch.float64)
    return (integrate(scheduler, velocity, x_0) - (mean + std * x_0)).abs().max().item()


def test_the_two_conventions_are_each_others_mirror():
    assert time_of_sigma(1.0) == 0
    assert time_of_sigma(0.0) == 1
    t = torch.tensor([0.0, 0.25, 1.0])
    assert torch.equal(time_of_sigma(sigma_of_time(t)), t)
    assert sigma_of_time(0.25) == 0.75
    assert model_output_of_velocity(torch.tensor([1.0, -2.0])).tolist() == [-1, 2]


def test_names_that_do_not_exist_are_refused_with_the_choice():
    with pytest.raises(UserError, match=r"'ddim'.*euler, heun, dpm\+\+, unipc"):
        make_scheduler("ddim")


def test_each_make_is_a_new_scheduler():
    assert make_scheduler("euler") is not make_scheduler("euler")


@pytest.mark.parametrize("name", ["euler", "dpm++", "unipc"])
@pytest.mark.parametrize(("num_groups", "step_count"), GROUPS_AND_STEPS)
def test_each_group_gets_the_same_number_of_calls_in_order(name, num_groups, step_count):
    scheduler = prepared(name, step_count)
    times = schedule_times(scheduler)
    assert num_network_calls(scheduler) == len(times) == step_count
    assert times == pytest.approx([i / step_count for i in range(step_count)], abs=1.1e-6)
    groups = [Intervals.uniform(num_groups).group_of(t) for t in times]
    assert groups == [k for k in range(num_groups) for _ in range(step_count // num_groups)]


@pytest.mark.parametrize(("num_groups", "step_count"), GROUPS_AND_STEPS)
def test_heun_calls_each_group_twice_a_step_but_the_first_once_less(num_groups, step_count):
    """A corrector is called where the next step starts; of 2 N calls only the one at t = 1 is not made."""
    scheduler = prepared("heun", step_count)
    times = schedule_times(scheduler)
    assert num_network_calls(scheduler) == len(times) == 2 * step_count - 1
    assert times == pytest.approx([(i + 1) // 2 / step_count for i in range(2 * step_count - 1)], abs=1e-7)
    groups = [Intervals.uniform(num_groups).group_of(t) for t in times]
    assert groups == sorted(groups)
    share = 2 * step_count // num_groups
    assert [groups.count(k) for k in range(num_groups)] == [share - 1] + [share] * (num_groups - 1)


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2), ("dpm++", 2), ("unipc", 2)])
def test_solvers_converge_to_the_exact_flow_at_their_order(name, order):
    coarse, fine = (gaussian_error(prepared(name, step_count)) for step_count in (64, 128))
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.25)
    assert fine < (3e-2 if order == 1 else 3e-4)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("std", [0.5, 2.0])
def test_more_steps_are_better_for_narrow_and_wide_data(name, std):
    errors = [gaussian_error(prepared(name, step_count), std=std) for step_count in (4, 16, 64)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("step_count", [1, 2, 3, 14, 15, 16])
def test_a_straight_path_ends_at_the_data_whatever_the_number_of_steps(name, step_count):
    x_0, x_1 = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    u = target_velocity(x_0, x_1)
    x = integrate(prepared(name, step_count), lambda x, t: u, x_0)
    torch.testing.assert_close(x, x_1, rtol=0, atol=1e-5)


def test_euler_lands_on_the_data_exactly_and_passes_through_the_path():
    x_0, x_1 = torch.tensor([[0.5, -2.0, 1.25]]), torch.tensor([[3.0, 0.75, -1.5]])  # exact in binary, as are eighths
    u = target_velocity(x_0, x_1)
    visited = []
    x = integrate(prepared("euler", 8), lambda x, t: visited.append((x, t)) or u, x_0)
    assert torch.equal(x, x_1)
    assert [t for _, t in visited] == [i / 8 for i in range(8)]
    assert all(torch.equal(x_t, interpolate(x_0, x_1, torch.tensor([t]))) for x_t, t in visited)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_can_be_used_again(name):
    scheduler = prepared(name, 8)
    first = gaussian_error(scheduler)
    set_schedule(scheduler, 5)
    gaussian_error(scheduler)
    set_schedule(scheduler, 8)
    assert gaussian_error(scheduler) == first


def test_more_steps_than_integer_timesteps_skip_none():
    x_0, x_1 = torch.zeros(1, 2), torch.tensor([[1.0, -1.0]])
    scheduler = prepared("unipc", 1200)
    assert len(scheduler.timesteps.unique()) < 1200
    x = integrate(scheduler, lambda x, t: x_1 - x_0, x_0)
    torch.testing.assert_close(x, x_1, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0),
        diffusers.DPMSolverMultistepScheduler(flow_shift=3.0, **FLOW),
        diffusers.UniPCMultistepScheduler(flow_shift=3.0, **FLOW),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_a_users_shift_is_applied_once(scheduler):
    set_schedule(scheduler, 10)
    sigmas = [3 * s / (1 + 2 * s) for s in (1 - i / 10 for i in range(10))]
    assert sorted(set(schedule_times(scheduler))) == pytest.approx([1 - s for s in sigmas], abs=1.1e-6)
    scaled = [1000 * sigma_of_time(t) for t in schedule_times(scheduler)]
    assert scheduler.timesteps.tolist() == pytest.approx(scaled, abs=1)
    assert gaussian_error(scheduler) < 0.4


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_schedule_the_user_set_themself_is_read_as_it_is(name):
    scheduler = make_scheduler(name)
    scheduler.set_timesteps(12)
    times = schedule_times(scheduler)
    assert len(times) == len(scheduler.timesteps) == num_network_calls(scheduler)
    assert times == sorted(times)
    assert times == pytest.approx([1 - s for s in scheduler.sigmas[:-1].tolist()], abs=1e-7)
    assert gaussian_error(scheduler) < 0.4


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.FlowMatchLCMScheduler(),
        diffusers.DEISMultistepScheduler(**FLOW),
        diffusers.DPMSolverSinglestepScheduler(**FLOW),
        diffusers.UniPCMultistepScheduler(use_karras_sigmas=True, **FLOW),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_other_flow_schedulers_are_routed_by_their_own_grid(scheduler):
    set_schedule(scheduler, 12)
    times = schedule_times(scheduler)
    groups = [Intervals.uniform(4).group_of(t) for t in times]
    assert num_network_calls(scheduler) == 12
    assert groups == sorted(groups)


def test_sigmas_that_are_no_times_are_refused():
    scheduler = diffusers.DPMSolverMultistepScheduler(use_karras_sigmas=True, **FLOW)  # diffusers gives it sigma = 157
    set_schedule(scheduler, 12)
    with pytest.raises(UserError, match=r"outside \[0, 1\]"):
        schedule_times(scheduler)


@pytest.mark.parametrize("cls", [diffusers.DPMSolverMultistepScheduler, diffusers.UniPCMultistepScheduler])
@pytest.mark.parametrize("option", [{"final_sigmas_type": "sigma_min"}, {"use_karras_sigmas": True}])
def test_a_spacing_the_user_asked_for_is_kept(cls, option):
    scheduler = cls(**option, **FLOW)
    scheduler.set_timesteps(12)
    grid = scheduler.sigmas.clone()
    set_schedule(scheduler, 12)
    assert torch.equal(scheduler.sigmas, grid)


@pytest.mark.parametrize("scheduler", NO_FLOW, ids=lambda scheduler: type(scheduler).__name__)
def test_schedulers_of_another_kind_are_refused(scheduler):
    with pytest.raises(UserError, match=type(scheduler).__name__):
        set_schedule(scheduler, 10)
    with pytest.raises(UserError, match=type(scheduler).__name__):
        schedule_times(scheduler)


def test_dynamic_shifting_is_refused():
    with pytest.raises(UserError, match="use_dynamic_shifting"):
        set_schedule(diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), 10)


@pytest.mark.parametrize("step_count", [0, -3])
def test_no_steps_are_refused(step_count):
    with pytest.raises(UserError, match="at least 1"):
        set_schedule(make_scheduler("euler"), step_count)
