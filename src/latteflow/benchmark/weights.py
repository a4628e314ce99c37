"""Random weights at the speed of a copy.

A speed does not depend on which random numbers are multiplied, but two billion drawn one by one take minutes on a CPU.
So a block of about a million normal numbers is drawn once and repeated, each weight from another place. No weight is
zero or denormal, and the block's length shares no factor with matrices' widths: no two rows are alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

_BLOCK = 1_048_573
"""A prime."""
_STRIDE = 104_729
"""From the start of one weight in the block to that of the next."""
_DRAWING = {torch.Tensor.normal_, torch.Tensor.uniform_, torch.Tensor.erfinv_, nn.init.trunc_normal_}

_Model = TypeVar("_Model", bound=nn.Module)


class _NotDrawn(TorchFunctionMode):
    """Leaves alone what a constructor would fill with random numbers."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func in _DRAWING else func(*args, **(kwargs or {}))


def with_random_weights(
    build: Callable[[], _Model], device: torch.device, dtype: torch.dtype, *, std: float = 0.02, seed: int = 0
) -> _Model:
    """Build a model in a dtype and on a device, and give it random weights; buffers are what its constructor makes.

    Args:
        build: its constructor.
        device: where.
        dtype: of its weights. No copy in another dtype is made on the way.
        std: spread of matrices, kernels and biases; norms are 1 with that spread.
        seed: of the numbers.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device, _NotDrawn(), torch.no_grad():
            model = build()
    finally:
        torch.set_default_dtype(default)
    fill(model, std=std, seed=seed)
    return model.requires_grad_(False).eval()


@torch.no_grad()
def fill(model: nn.Module, *, std: float = 0.02, seed: int = 0) -> None:
    """Give a model random weights in place.

    Args:
        model: of any dtype and device.
        std: as in ``with_random_weights``.
        seed: of the numbers.
    """
    drawn = torch.randn(_BLOCK, generator=torch.Generator().manual_seed(seed)) * std
    drawn[drawn.abs() < 1e-6] = 1e-6
    for number, (name, parameter) in enumerate(model.named_parameters()):
        block = drawn.to(parameter.device, parameter.dtype).roll(-number * _STRIDE % _BLOCK)
        flat = parameter.view(-1)
        whole = flat.numel() // _BLOCK * _BLOCK
        flat[:whole].view(-1, _BLOCK).copy_(block)
        flat[whole:].copy_(block[: flat.numel() - whole])
        if parameter.ndim == 1 and not name.endswith("bias"):
            parameter.add_(1.0)
