"""The optimizer of a run: AdamW for everything, or Muon for the matrices inside the network and AdamW for the rest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate

from latteflow.train.recipe import TrainSection


class Together(torch.optim.Optimizer):
    """Several optimizers of different parameters, handled as one."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts
        # The groups held are the parts' own, so that a schedule reaches them.
        super().__init__([group for part in parts for group in part.param_groups], {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take a step with every part."""
        if closure is not None:
            raise ValueError("a closure would be called once a part")
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the parts' states in their order."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the parts' states."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


class ShardedMuon(torch.optim.Muon):
    """Muon of matrices that are sharded over processes.

    Orthogonalised part by part, in bfloat16, a matrix would get another step on every number of processes. So each
    process brings a matrix's update together, orthogonalises it whole, and keeps its own part. Momentum stays sharded.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take a step; every process has to, with gradients of the same matrices."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p.grad)
                momentum = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
                step = DTensor.from_local(_whole_step(update.full_tensor(), group), p.device_mesh, [Replicate()])
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(step.redistribute(placements=p.placements))


def _whole_step(update: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
    """Return what PyTorch's Muon adds to a matrix for an update in which momentum is already."""
    matrix = nn.Parameter(torch.zeros_like(update))
    matrix.grad = update
    settings = {name: group[name] for name in ("lr", "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn")}
    torch.optim.Muon([matrix], weight_decay=0.0, momentum=0.0, nesterov=False, **settings).step()
    return matrix.detach()


def build_optimizer(model: nn.Module, settings: TrainSection) -> torch.optim.Optimizer:
    """Return the optimizer that a recipe asks for, over all parameters of ``model`` that are trained.

    Muon's steps are scaled to the size of AdamW's, so that one learning rate serves both.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    betas = (0.9, settings.beta2)
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(_decay_groups(parameters, settings.weight_decay), settings.learning_rate, betas)
    inner = [parameter for parameter in hidden_matrices(model) if parameter.requires_grad]
    chosen = {id(parameter) for parameter in inner}
    others = [parameter for parameter in parameters if id(parameter) not in chosen]
    muon = ShardedMuon if any(isinstance(parameter, DTensor) for parameter in inner) else torch.optim.Muon
    return Together(
        muon(inner, settings.learning_rate, weight_decay=settings.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(_decay_groups(others, settings.weight_decay), settings.learning_rate, betas),
    )


def hidden_matrices(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the weights of linear layers between layers: none that is also an embedding, none that reads classes out.

    A module says that it reads out by an attribute ``reads_out`` that is true.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    reading = {
        id(parameter)
        for module in model.modules()
        if getattr(module, "reads_out", False)
        for parameter in module.parameters()
    }
    for module in model.modules():
        if isinstance(module, nn.Linear) and id(module.weight) not in embeddings | reading:
            yield module.weight  # type: ignore[misc]


def _decay_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Decay matrices and kernels only: norms, biases and gates have one dimension or none."""
    parameters = list(parameters)
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
