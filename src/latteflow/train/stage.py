"""What the loop asks of a stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from latteflow.train.samples import Samples


class Stage:
    """One thing to train: the loop knows nothing of pictures, words or velocities.

    Subclasses set ``model`` and ``number`` and say what a step's loss is; the rest has defaults.
    """

    model: nn.Module
    """The module being trained; all its parameters that require a gradient are."""
    number: int
    """How many training samples there are."""

    def to(self, device: torch.device) -> None:
        """Move what the stage holds beside ``model`` to the device."""

    def indices(self, step: int, batch_size: int, seed: int) -> torch.Tensor | None:
        """Return the samples of a step, int64 (batch_size,); None for the loop's own order."""
        return None

    def chosen(self, batch_size: int, seed: int, step: int) -> torch.Tensor | None:
        """Return the places of a batch that are trained on, int64; None for all."""
        return None

    def read(self, samples: Samples) -> Any:
        """Return what a loss needs from the disk; called in worker processes where the recipe has some."""
        return None

    def loss(self, model: nn.Module, samples: Samples, data: Any) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        """Return what these samples add to the step's loss, and figures to log.

        The parts of a step add up to its loss: a mean over the step is a mean over the samples times
        ``samples.share``. Every draw comes from ``samples``.
        """
        raise NotImplementedError

    def clipped_together(self) -> Sequence[tuple[str, Sequence[nn.Parameter]]]:
        """Return the parameters whose gradients are clipped, and watched, as one; by name."""
        return [("all", [p for p in self.model.parameters() if p.requires_grad])]

    def describe(self, samples: Samples) -> dict[str, list[Any]]:
        """Return what is worth knowing of samples whose loss is no number, such as their t."""
        return {}

    def flops_per_sample(self) -> float | None:
        """Return the operations of one sample's forward and backward pass, where a formula says."""
        return None

    def validate(self) -> dict[str, float]:
        """Return figures on data that no step sees, with the weights that ``model`` holds now."""
        return {}

    def preview(self) -> Image.Image | None:
        """Return a picture grid that shows a person where training stands."""
        return None

    def export(self, folder: Path) -> None:
        """Write what ``model`` holds now in the form that later stages and users load."""
        raise NotImplementedError
