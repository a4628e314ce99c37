"""The matrix products of a call, alone: what is left of its time is what a framework costs.

A call is run once and every product in it is noted, with the very tensors it took; ``Products`` runs them again in that
order and nothing else: no norms, activations, softmax, copies or concatenations. Weights are the model's own, so they
come from memory as they did in the call. An attention that PyTorch does in one kernel counts as one product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
_PRODUCTS = {
    _aten.mm,
    _aten.addmm,
    _aten._addmm_activation,
    _aten.bmm,
    _aten.baddbmm,
    _aten.linear,
    _aten.convolution,
    _aten._scaled_dot_product_flash_attention_for_cpu,
    _aten._scaled_dot_product_flash_attention,
    _aten._scaled_dot_product_efficient_attention,
    _aten._scaled_dot_product_cudnn_attention,
}


class _Noting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.noted: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket in _PRODUCTS:
            self.noted.append((func, args, kwargs))
        return func(*args, **kwargs)


class Products:
    """The matrix products of one call.

    Args:
        call: what makes them; it is run once, uncompiled.
    """

    def __init__(self, call: Callable[[], object]) -> None:
        with torch.no_grad(), _Noting() as noting:
            call()
        self._noted = noting.noted

    def __len__(self) -> int:
        return len(self._noted)

    @torch.no_grad()
    def __call__(self, number: int = 0) -> None:
        """Run them all; ``number`` is not looked at."""
        for product, args, kwargs in self._noted:
            product(*args, **kwargs)
