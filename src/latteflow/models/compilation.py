"""Compiled groups: one graph from patches to velocity, which serves every group.

The groups differ in weights alone, and weights are inputs of the graph. So it is compiled once for each kind of call
(batch size, picture size, with a mask or without), not once a group; PyTorch makes sizes that change symbols.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch._dynamo.exc import TorchDynamoException

from latteflow.errors import UserError
from latteflow.models.transformer import LatteFlowTransformer

_log = logging.getLogger(__name__)


def compile_groups(transformer: LatteFlowTransformer, **settings: Any) -> None:
    """Compile what a group does, from its next call on. Where that fails, one warning is logged, and eager goes on.

    Args:
        transformer: the replica.
        **settings: of ``torch.compile``, such as ``mode``. On a CUDA device ``mode`` is "reduce-overhead" if left out:
            calls are captured as CUDA graphs, one for each group and kind of call.

    Raises:
        UserError: it is compiled already.
    """
    if isinstance(transformer._through, _CompiledOrEager):
        raise UserError("the groups are compiled already")
    if transformer.device.type == "cuda" and not settings.keys() & {"mode", "options"}:
        settings["mode"] = "reduce-overhead"
    transformer._through = _CompiledOrEager(transformer._through, settings)  # type: ignore[method-assign]


def runs_compiled(transformer: LatteFlowTransformer) -> bool:
    """Return whether groups run compiled: not where nobody asked for it, nor where compiling has failed."""
    through = transformer._through
    return isinstance(through, _CompiledOrEager) and through.call is not through.eager


class _CompiledOrEager:
    """A function that is compiled, until compiling fails."""

    def __init__(self, eager: Any, settings: dict[str, Any]) -> None:
        self.eager = eager
        self.call = torch.compile(eager, **settings)

    def __call__(self, *given: Any) -> torch.Tensor:
        if torch.is_grad_enabled():  # training compiles layers, by a recipe's field
            return self.eager(*given)
        try:
            # A graph's output is overwritten by its next replay.
            return self.call(*given).clone()
        except TorchDynamoException as error:
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            _log.warning("the groups cannot be compiled here, and run as they are: %s", reason)
            self.call = self.eager
            return self.eager(*given)
