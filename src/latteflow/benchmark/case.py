"""What is timed: one model's denoising, told in figures, and callables for its parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.exc import InductorError

from latteflow.benchmark.measure import timed


@dataclass
class Case:
    """A model at real geometry with random weights."""

    name: str
    what: str
    """Which classes run, and what is left out."""
    resolution: int
    tokens: int
    """Of a picture, by one sequence."""
    steps: int
    """Network calls a picture, one after the other."""
    passes: int
    """Sequences of a step: 2 with guidance."""
    parameters: int
    """Of what denoises."""
    active_parameters: int
    """Of those, what a step reads."""
    step_flops: float
    """Of a whole step, by formula."""
    weight_bytes: int
    """What a whole step reads of weights."""
    step: Callable[[int], torch.Tensor]
    """Runs a step by its number, all of its sequences; of stand-ins perhaps a slice of the layers."""
    prefill: Callable[[], object] | None = None
    """Reads the prompt."""
    decode: Callable[[], torch.Tensor] | None = None
    """Latents or tokens to pixels."""
    slice: float = 1.0
    """Which part of a step's layers ``step`` runs."""
    steps_worth: float | None = None
    """Timed steps that a picture costs, where some cost less than the one timed; left out, ``steps``."""
    blocks: Sequence[nn.Module] = field(default_factory=tuple)
    """Layers that ``torch.compile`` may be given one by one."""

    @property
    def steps_timed(self) -> float:
        """What a timed step is multiplied by for a whole picture's denoising."""
        return (self.steps if self.steps_worth is None else self.steps_worth) / self.slice

    @property
    def image_flops(self) -> float:
        """Of all steps, by formula."""
        return self.step_flops * self.steps_timed * self.slice


def count(module: nn.Module) -> int:
    """Return the number of a module's parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def matrix_numbers(*modules: nn.Module) -> int:
    """Return the numbers in the matrices of all linear layers: multiply-adds a token."""
    return sum(part.weight.numel() for module in modules for part in module.modules() if isinstance(part, nn.Linear))


def faster_setting(case: Case, device: torch.device, *, tries: int = 3) -> dict[str, float]:
    """Leave a case in its faster setting, eager or compiled layer by layer, and return the best seconds of both.

    Args:
        case: its ``blocks`` are compiled if that is the faster.
        device: where it runs.
        tries: of each; the first of all calls, and that which compiles, do not count.
    """
    with torch.no_grad():
        best = {"eager": _best(case, device, tries)}
        if not case.blocks:
            return best
        compile_blocks(case, device)
        try:
            best["compiled"] = _best(case, device, tries)
        except (TorchDynamoException, InductorError):  # no compiler on this machine, or a layer it cannot take
            best["compiled"] = float("inf")
    if best["compiled"] >= best["eager"]:
        leave_uncompiled(case)
    return best


def compile_blocks(case: Case, device: torch.device) -> None:
    """Compile a case's layers in place, one graph for all that are alike; on CUDA kernels are tuned as well."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * len(case.blocks))
    settings: dict[str, Any] = {"mode": "max-autotune-no-cudagraphs"} if device.type == "cuda" else {}
    for block in case.blocks:
        block.compile(dynamic=False, **settings)


def leave_uncompiled(case: Case) -> None:
    """Undo ``compile_blocks``."""
    for block in case.blocks:
        block._compiled_call_impl = None


def _best(case: Case, device: torch.device, tries: int) -> float:
    case.step(0)
    return min(timed(lambda number=number: case.step(number), device) for number in range(1, tries + 1))
