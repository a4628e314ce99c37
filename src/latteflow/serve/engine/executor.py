"""What makes the steps of pictures: here, in this process."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch

from latteflow.models.transformer import LatteFlowTransformer
from latteflow.serve.engine.batched_step import BatchedStep
from latteflow.serve.engine.drawing import Drawing
from latteflow.serve.engine.policy import choose
from latteflow.serve.engine.requests import OutOfMemory, Refused
from latteflow.serve.engine.settings import EngineSettings


@dataclass(frozen=True)
class Stepped:
    """A picture went one step further."""

    id: str
    step: int
    """Network calls made so far, from 1."""
    steps: int
    group: int
    t: float
    """The time of the call."""
    seconds: float
    """Of the forward, with all that shared it."""
    batch: int
    clean: torch.Tensor | None
    """Where a preview is due: the clean latents as predicted here, x + (1 - t) v, (1, channels, H, W)."""
    x_1: torch.Tensor | None
    """After the last step: the finished latents."""


@dataclass(frozen=True)
class Lost:
    """A picture cannot be finished."""

    id: str
    error: Refused


Outcome: TypeAlias = Stepped | Lost


class Executor(Protocol):
    """What an engine hands prepared pictures to. Only the engine's loop calls it, but for ``trouble``."""

    def add(self, drawing: Drawing) -> None:
        """Take a picture; it advances from now on."""

    def remove(self, id: str) -> None:
        """Give a picture up; nothing more is heard of it."""

    def advance(self) -> list[Outcome]:
        """Do some of the work, a forward at most, and return what has come of it."""
        ...

    def trouble(self) -> str | None:
        """Say why pictures stand still just now; None while they do not. Any thread may ask."""
        ...

    def close(self) -> None:
        """Let go of processes and devices."""


class LocalExecutor:
    """Steps in this process, one forward at a time.

    Args:
        transformer: the replica.
        settings: of the engine.
    """

    def __init__(self, transformer: LatteFlowTransformer, settings: EngineSettings) -> None:
        self._settings = settings
        self._step = BatchedStep(transformer, 2 * settings.max_batch if settings.deterministic else None)
        self._drawings: dict[str, Drawing] = {}

    def __len__(self) -> int:
        return len(self._drawings)

    def add(self, drawing: Drawing) -> None:
        """Take a picture; it advances from now on."""
        self._drawings[drawing.id] = drawing

    def remove(self, id: str) -> None:
        """Give a picture up, or let it go elsewhere; if it is not here, do nothing."""
        self._drawings.pop(id, None)
        if not self._drawings:
            self._step.forget()

    def advance(self) -> list[Outcome]:
        """Make one forward for those that can share it; without pictures do nothing."""
        if not self._drawings:
            return []
        chosen = choose(
            list(self._drawings.values()),
            self._step.kind,
            max_batch=self._settings.max_batch,
            patience=self._settings.patience,
        )
        return self._advance(chosen)

    def _advance(self, drawings: Sequence[Drawing]) -> list[Outcome]:
        """Make one forward; where memory does not suffice, two of half the pictures each."""
        begin = time.perf_counter()
        try:
            group, velocities = self._step.kind(drawings[0])[0], self._step(drawings)
        except torch.OutOfMemoryError:
            velocities = None  # and out of the handler, whose traceback holds tensors
        if velocities is None:
            return self._in_halves(drawings)
        return [
            self._moved(drawing, v, group, len(drawings), begin)
            for drawing, v in zip(drawings, velocities.split(1), strict=True)
        ]

    def _in_halves(self, drawings: Sequence[Drawing]) -> list[Outcome]:
        self._step.forget()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(drawings) == 1:
            self.remove(drawings[0].id)
            return [Lost(drawings[0].id, OutOfMemory("the picture needs more memory than there is: draw smaller"))]
        middle = len(drawings) // 2
        return self._advance(drawings[:middle]) + self._advance(drawings[middle:])

    def _moved(self, drawing: Drawing, v: torch.Tensor, group: int, batch: int, begin: float) -> Stepped:
        t, x_t = drawing.t, drawing.x_t
        drawing.x_t = drawing.solver.advance(drawing.step, v, x_t)
        drawing.step += 1
        if drawing.finished:
            self.remove(drawing.id)
        return Stepped(
            drawing.id,
            drawing.step,
            drawing.steps,
            group,
            t,
            time.perf_counter() - begin,
            batch,
            clean=x_t + (1 - t) * v if drawing.wants_preview() else None,
            x_1=drawing.x_t if drawing.finished else None,
        )

    def trouble(self) -> str | None:
        """Return None: where there is no other process, there is none to be down."""
        return None

    def close(self) -> None:
        """Give up what is under way."""
        self._drawings.clear()
        self._step.forget()
