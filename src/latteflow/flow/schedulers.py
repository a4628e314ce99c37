"""Solvers: diffusers' schedulers, driven in our convention. The only file in which the two conventions meet.

=============  =======================  ==============================
               here                     diffusers
=============  =======================  ==============================
time           t, 0 noise to 1 data     sigma = 1 - t
prediction     v = data - noise         model output = noise - data
=============  =======================  ==============================

A call's time comes from ``scheduler.sigmas``, never from ``scheduler.timesteps``: those are float32 or truncated to
integers, and t = 1 - timestep / 1000 falls on the wrong side of an expert's edge.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_heun_discrete import FlowMatchHeunDiscreteScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from latteflow.errors import UserError

_Number = TypeVar("_Number", float, Tensor)


def _flow_multistep(cls: Callable[..., SchedulerMixin]) -> SchedulerMixin:
    """Return a multistep solver, by default one of noise-predicting diffusion, set up for flow matching."""
    return cls(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0)


SCHEDULERS: dict[str, Callable[[], SchedulerMixin]] = {
    "euler": lambda: FlowMatchEulerDiscreteScheduler(),
    "heun": lambda: FlowMatchHeunDiscreteScheduler(),
    "dpm++": lambda: _flow_multistep(DPMSolverMultistepScheduler),
    "unipc": lambda: _flow_multistep(UniPCMultistepScheduler),
}


def make_scheduler(name: str) -> SchedulerMixin:
    """Return a new scheduler by its name in ``SCHEDULERS``.

    Args:
        name: "euler" (order 1), "heun" (order 2, two calls an interval but for the last), "dpm++" or "unipc" (order 2,
            one call an interval).

    Raises:
        UserError: If there is no such name.
    """
    if name not in SCHEDULERS:
        raise UserError(f"unknown scheduler {name!r}; choose one of {', '.join(SCHEDULERS)}")
    return SCHEDULERS[name]()


def time_of_sigma(sigma: _Number) -> _Number:
    """Return t in [0, 1] of diffusers' ``sigma`` in [0, 1], ``t = 1 - sigma``."""
    return 1 - sigma


def sigma_of_time(t: _Number) -> _Number:
    """Return diffusers' ``sigma`` in [0, 1] of ``t`` in [0, 1], ``sigma = 1 - t``."""
    return 1 - t


def model_output_of_velocity(v: Tensor) -> Tensor:
    """Return what ``scheduler.step`` wants as the model's output: noise - data, hence ``-v``, any shape."""
    return -v


def set_schedule(scheduler: SchedulerMixin, num_inference_steps: int, device: torch.device | str | None = None) -> None:
    """Prepare ``scheduler`` for a new run over ``num_inference_steps`` intervals, uniform in t where it allows.

    The intervals run from ``t_i = i / N`` to ``t_{i+1}``, before whatever shift the scheduler's own configuration adds.
    diffusers' default grids differ: Euler's and Heun's end with a step of length 0.001, DPM-Solver++'s starts at
    t = 0.001, and none puts its calls on the edges of the experts' intervals.

    - With one call an interval (all but Heun) ``num_inference_steps`` is the number of network calls.
    - Heun calls the network at both ends of an interval, but at t = 1 not at all: 2 N - 1 calls. Call
      ``num_network_calls`` afterwards to know.
    - A scheduler that takes ``sigmas=`` gets the uniform grid (UniPC moves its first time to 1e-6); Heun and
      DPM-Solver++ do not take it and have theirs replaced; any other keeps its own grid, and so does one that was
      configured with a spacing of its own (Karras and the like) or to end before sigma 0.

    Args:
        scheduler: Any diffusers flow-matching scheduler. Its state, not its configuration, is changed.
        num_inference_steps: N, at least 1.
        device: Where ``scheduler.timesteps`` shall lie; None leaves it to the scheduler.

    Raises:
        UserError: If ``num_inference_steps`` is below 1, the scheduler is not one of flow matching from noise to data,
            or it shifts dynamically (it then needs a number that only its user knows: call its ``set_timesteps``).
    """
    _require_flow_matching(scheduler)
    if num_inference_steps < 1:
        raise UserError(f"num_inference_steps must be at least 1, not {num_inference_steps}")
    if _config(scheduler).get("use_dynamic_shifting", False):
        raise UserError(f"{type(scheduler).__name__}: use_dynamic_shifting is not supported; set a fixed shift")
    sigmas = torch.arange(num_inference_steps, 0, -1, dtype=torch.float64) / num_inference_steps
    solver: Any = scheduler
    if _has_own_spacing(scheduler):
        solver.set_timesteps(num_inference_steps, device=device)
    elif "sigmas" in inspect.signature(solver.set_timesteps).parameters:
        # An array, not a list: UniPC multiplies it. No num_inference_steps beside it: the grid's length says it.
        solver.set_timesteps(sigmas=sigmas.numpy(), device=device)
    else:
        solver.set_timesteps(num_inference_steps, device=device)
        _replace_grid(scheduler, sigmas)
    # Otherwise the first step looks its timestep up, and takes the second of two that truncate to one integer.
    solver.set_begin_index(0)


def num_network_calls(scheduler: SchedulerMixin) -> int:
    """Return the number of network calls a sequence that ``scheduler``, once prepared, asks for."""
    return len(schedule_times(scheduler))


def schedule_times(scheduler: SchedulerMixin) -> list[float]:
    """Return the time t of each network call, in order.

    The scheduler may be prepared by ``set_schedule`` or by its own ``set_timesteps``, with any shift. Heun stores its
    sigmas interleaved like its timesteps (each inner one twice), so call i is at ``sigmas[i]`` in every scheduler.

    Args:
        scheduler: A diffusers flow-matching scheduler, prepared.

    Returns:
        Non-decreasing times in [0, 1], as many as ``scheduler.timesteps``, in float64 from float32 sigmas: within 1e-7.

    Raises:
        UserError: If the scheduler is not one of flow matching from noise to data, or its sigmas are outside [0, 1]
            (DPM-Solver++ with Karras' and other spacings, in spite of ``use_flow_sigmas``).
    """
    _require_flow_matching(scheduler)
    solver: Any = scheduler
    sigmas = solver.sigmas[: len(solver.timesteps)].tolist()  # the last sigma, 0, is where the data is: no call there
    if not all(0 <= sigma <= 1 for sigma in sigmas):
        raise UserError(f"{type(scheduler).__name__}: its sigmas are outside [0, 1], up to {max(sigmas):.4g}")
    return [time_of_sigma(sigma) for sigma in sigmas]


def _replace_grid(scheduler: SchedulerMixin, sigmas: Tensor) -> None:
    """Put the grid ``sigmas`` (N noise levels, 1 first, without the final 0) into a scheduler that cannot be given one.

    Changes ``scheduler.sigmas`` and ``scheduler.timesteps`` after ``set_timesteps``, keeping their dtypes and devices;
    both are public, and ``step`` reads nothing else of the grid. The scheduler's own shift is applied, once (Heun's
    ``set_timesteps`` applies it twice). Schedulers other than Heun and DPM-Solver++ are left as they are.
    """
    config = _config(scheduler)
    if isinstance(scheduler, FlowMatchHeunDiscreteScheduler):
        grid = _shifted(sigmas, config["shift"])
        # A step's corrector is called where the next step begins: every level but the first twice.
        grid = torch.cat([grid[:1], grid[1:].repeat_interleave(2)])
    elif isinstance(scheduler, DPMSolverMultistepScheduler):
        grid = _shifted(sigmas, config["flow_shift"])
    else:
        return
    scheduler.sigmas = torch.cat([grid, grid.new_zeros(1)]).to(scheduler.sigmas)
    scheduler.timesteps = (grid * config["num_train_timesteps"]).to(scheduler.timesteps)


def _has_own_spacing(scheduler: SchedulerMixin) -> bool:
    """Say whether the user configured where the sigmas lie. UniPC would even run backwards from a given grid then."""
    config = _config(scheduler)
    spacings = ("use_karras_sigmas", "use_lu_lambdas", "use_exponential_sigmas", "use_beta_sigmas")
    return any(config.get(name, False) for name in spacings) or config.get("final_sigmas_type", "zero") != "zero"


def _shifted(sigmas: Tensor, shift: float) -> Tensor:
    """Return noise levels moved towards noise by diffusers' (Stable Diffusion 3's) ``shift``; 1 changes nothing."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def _require_flow_matching(scheduler: SchedulerMixin) -> None:
    """Refuse a scheduler whose sigmas are not 1 - t, or whose model is not a velocity: it would sample nonsense."""
    config, name = _config(scheduler), type(scheduler).__name__
    is_flow = config.get("prediction_type", "flow_prediction") == "flow_prediction" and config.get(
        "use_flow_sigmas", True
    )
    if not hasattr(scheduler, "sigmas") or not is_flow:
        raise UserError(
            f"{name} is not set up for flow matching; choose one of {', '.join(SCHEDULERS)}, or a diffusers scheduler"
            " with prediction_type='flow_prediction' and use_flow_sigmas=True"
        )
    if config.get("invert_sigmas", False):
        raise UserError(f"{name}: invert_sigmas runs from data to noise; t = 0 must be noise")


def _config(scheduler: SchedulerMixin) -> dict[str, Any]:
    """Return the configuration, which ``ConfigMixin`` and not ``SchedulerMixin`` declares."""
    solver: Any = scheduler
    return dict(solver.config)
