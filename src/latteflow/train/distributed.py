"""One process or many: how a stage's model is spread, and how its state is brought together again.

DDP comes from accelerate. FSDP2 is PyTorch's ``fully_shard``, layer by layer: parameters become ``DTensor``s in place,
so that optimizer, clipping and averaging work on them as on any tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import distributed, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from latteflow.models.transformer import LatteFlowTransformer
from latteflow.nn.block import ReplicaLayer

Strategy = Literal["ddp", "fsdp2"]


def shard(model: nn.Module, accelerator: Accelerator, *, half: bool) -> None:
    """Shard a model's layers (the classes in ``_no_split_modules``), then what is around them, over all processes.

    Args:
        model: on its device, with the weights it starts from.
        accelerator: which knows the processes.
        half: gather weights in bfloat16 for computing; they are kept, and gradients reduced, in float32.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    # Inputs stay as they are: bfloat16 has 8 bits, which would send times to other experts.
    half_weights = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32, "cast_forward_inputs": False}
    policy = MixedPrecisionPolicy(**half_weights) if half else MixedPrecisionPolicy()
    # The outermost module too, or what a preview gathered there, averaged weights, would be what trains on.
    settings: dict[str, Any] = {"mesh": mesh, "mp_policy": policy, "reshard_after_forward": True}
    names = tuple(getattr(model, "_no_split_modules", None) or ())
    for module in model.modules():
        if type(module).__name__ in names:
            fully_shard(module, **settings)
        if isinstance(module, ReplicaLayer):  # previews ask ahead for what t and the prompt do
            for method in ("modulation_of", "prompt_of"):
                register_fsdp_forward_method(module, method)
    fully_shard(model, **settings)
    if isinstance(model, LatteFlowTransformer):
        model.run_groups_of_all_processes = True


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's full value, which for a sharded one every process has to ask for at once."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_state(state: Any) -> Any:
    """Return an optimizer's state with every sharded tensor brought together, for a checkpoint of any world size."""
    if isinstance(state, torch.Tensor):
        return whole(state)
    if isinstance(state, Mapping):
        return {key: whole_state(value) for key, value in state.items()}
    if isinstance(state, list):
        return [whole_state(value) for value in state]
    return state


def load_whole(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """Copy a full value into a parameter, sharded or not."""
    parameter.copy_(like(value, parameter))


def like(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Return a full value spread as ``parameter`` is."""
    if isinstance(parameter, DTensor):
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value


def sharded_optimizer_state(state: dict[str, Any], parameters: Iterable[torch.Tensor]) -> dict[str, Any]:
    """Return a whole optimizer state spread as its parameters are, in the optimizer's order.

    Of several optimizers handled as one, each takes its own parameters, one after the other.
    """
    if "parts" in state:
        rest = iter(parameters)
        numbers = [sum(len(group["params"]) for group in part["param_groups"]) for part in state["parts"]]
        own = [list(islice(rest, number)) for number in numbers]
        return {"parts": [sharded_optimizer_state(*pair) for pair in zip(state["parts"], own, strict=True)]}
    numbered = dict(enumerate(parameters))
    spread = {
        number: {
            key: like(value, numbered[number]) if torch.is_tensor(value) and value.ndim else value
            for key, value in entries.items()
        }
        for number, entries in state["state"].items()
    }
    return {**state, "state": spread}


def anywhere(flag: bool, accelerator: Accelerator) -> bool:
    """Return whether ``flag`` is set in any process, so that all do the same."""
    if accelerator.num_processes == 1:
        return flag
    value = torch.tensor(float(flag), device=accelerator.device)
    distributed.all_reduce(value, op=distributed.ReduceOp.MAX)
    return bool(value.item())


def summed(value: torch.Tensor, accelerator: Accelerator) -> torch.Tensor:
    """Return the sum of a number over all processes."""
    if accelerator.num_processes > 1:
        distributed.all_reduce(value)
    return value


def averaged(figures: Mapping[str, float], accelerator: Accelerator) -> dict[str, float]:
    """Return the mean of each figure over the processes that have it."""
    if accelerator.num_processes == 1:
        return dict(figures)
    told: dict[str, list[float]] = {}
    for theirs in gather_object([dict(figures)]):
        for name, value in theirs.items():
            told.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in sorted(told.items())}
