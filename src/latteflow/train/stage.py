"""What the loop asks of a stage."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from torch import nn


class Stage(Protocol):
    """One thing to train: the loop knows nothing of pictures, words or velocities."""

    model: nn.Module
    """The module being trained; all its parameters that require a gradient are."""
    number: int
    """How many training samples there are."""

    def to(self, device: torch.device) -> None:
        """Move what the stage holds beside ``model`` to the device."""
        ...

    def loss(
        self, model: nn.Module, index: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        """Return the scalar loss of samples ``index`` and figures to log; every draw comes from ``generator``."""
        ...

    def validate(self) -> dict[str, float]:
        """Return figures on data that no step sees, with the weights that ``model`` holds now."""
        ...

    def preview(self) -> Image.Image | None:
        """Return a picture grid that shows a person where training stands."""
        ...

    def export(self, folder: Path) -> None:
        """Write what ``model`` holds now in the form that later stages and users load."""
        ...
