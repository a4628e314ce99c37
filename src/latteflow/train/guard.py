"""What happens before the weights do: gradients are clipped, and an update that is no number is not made."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from torch import nn

from latteflow.train.distributed import anywhere, whole
from latteflow.train.samples import Samples
from latteflow.train.stage import Stage

_log = logging.getLogger(__name__)


class TrainingDiverged(RuntimeError):
    """The loss or its gradient is no longer a finite number."""


class Guard:
    """Clips each set of parameters by its own norm; on a non-finite loss or norm it stops, or skips the set's update.

    Args:
        stage: whose parameters are clipped together, and who can describe samples.
        accelerator: all processes decide alike.
        clip: the largest norm.
        policy: "stop", or "skip" up to ``patience`` updates in a row.
        patience: how many; one more stops the run.
        folder: where the samples of such a step are written down.
    """

    def __init__(
        self,
        stage: Stage,
        accelerator: Accelerator,
        *,
        clip: float,
        policy: Literal["stop", "skip"],
        patience: int,
        folder: Path,
    ) -> None:
        self.stage, self.accelerator, self.clip = stage, accelerator, clip
        self.policy, self.patience, self.folder = policy, patience, folder
        self.sets = [(name, list(parameters)) for name, parameters in stage.clipped_together()]
        self.skipped = {name: 0 for name, _ in self.sets}

    def clip_gradients(
        self, losses: dict[str, torch.Tensor], samples: Sequence[Samples], done: int
    ) -> dict[str, torch.Tensor]:
        """Clip, and return each set's norm before; a set that is not to be updated is left without gradients.

        Args:
            losses: the step's loss in this process; and, under "loss/" and a set's name, the set's own.
            samples: what this process took.
            done: the step's number, counted from 1.

        Raises:
            TrainingDiverged: something is not finite, and is not to be skipped (any more).
        """
        norms = {}
        for name, parameters in self.sets:
            graded = [p for p in parameters if p.grad is not None]
            norm = self._norm(graded)
            norms[name] = norm
            # A set without samples here has no loss of its own: the others' must not be held against it.
            loss = losses["all"] if name == "all" else losses.get(f"loss/{name}", torch.zeros(()))
            if anywhere(not bool(torch.isfinite(loss) & torch.isfinite(norm)), self.accelerator):
                self._refuse(name, graded, float(loss), float(norm), samples, done)
            elif graded:
                self.skipped[name] = 0
                torch.nn.utils.clip_grads_with_norm_(graded, self.clip, norm)
        return norms

    @staticmethod
    def _norm(graded: Sequence[nn.Parameter]) -> torch.Tensor:
        if not graded:
            return torch.zeros(())
        return whole(torch.nn.utils.get_total_norm([p.grad for p in graded if p.grad is not None]))

    def _refuse(
        self,
        name: str,
        graded: Sequence[nn.Parameter],
        loss: float,
        norm: float,
        samples: Sequence[Samples],
        done: int,
    ) -> None:
        file = self._write_down(name, loss, norm, samples, done)
        self.skipped[name] += 1
        of = "" if name == "all" else f" of {name}"
        what = f"step {done}: the loss{of} is {loss}, its gradient's norm {norm} (samples in {file})"
        if self.policy == "stop" or self.skipped[name] > self.patience:
            times = f", {self.skipped[name]} times in a row" if self.skipped[name] > 1 else ""
            raise TrainingDiverged(f"{what}{times}; lower train.learning_rate")
        for parameter in graded:
            parameter.grad = None

    def _write_down(self, name: str, loss: float, norm: float, samples: Sequence[Samples], done: int) -> Path:
        file = self.folder / f"step-{done:08d}-{name}-process-{self.accelerator.process_index}.json"
        parts = [
            {"samples": part.index.tolist(), "places": part.places.tolist(), **self.stage.describe(part)}
            for part in samples
            if part.counted
        ]
        told = {"step": done, "set": name, "loss": loss, "gradient_norm": norm, "parts": parts}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(told))
        except OSError as error:  # of one process alone, which has to go on with the others
            _log.error("%s cannot be written (%s): %s", file, error, told)
        return file
