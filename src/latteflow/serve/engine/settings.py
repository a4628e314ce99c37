"""How an engine is set up, what it says of itself, and who listens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias, get_args

from latteflow.errors import UserError

Placement: TypeAlias = Literal["local", "pipeline", "auto"]


@dataclass(frozen=True)
class EngineSettings:
    """Bounds and habits of an engine.

    Raises:
        UserError: a number that cannot be.
    """

    max_batch: int = 16
    """Pictures that share a forward, at most."""
    max_active: int = 32
    """Pictures under way, at most: each holds its context and its latents."""
    max_queued_pictures: int = 64
    """What may wait, counted in step-tokens: as much work as this many pictures of the model's own size, in 40 guided
    steps. What is under way does not count."""
    max_chats: int = 4
    """Answers under way, at most."""
    max_queued_chats: int = 32
    patience: int = 32
    """Forwards that may pass a picture over before its turn comes, however few share it. Fewer than an interval's steps
    of a few groups tear apart pictures that would share their forwards."""
    deterministic: bool = False
    """Pad every forward to ``max_batch``: a picture has the same bits whatever shares its forwards, and costs more."""
    placement: Placement = "local"
    """Steps are made in the engine's process; in one process for each expert group; or where a measured cost model
    (serve/executors/placement.py) says that pictures are done sooner. ``build_executor`` reads it."""
    devices: tuple[str, ...] = ()
    """Of the pipeline's stages, one for each group or one for all; left out, where the model is."""
    load: float = 0.7
    """Share of the throughput that "auto" chooses for, in (0, 1)."""

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_active", "max_queued_pictures", "max_chats", "max_queued_chats", "patience"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} has to be 1 or more: got {getattr(self, name)}")
        if self.placement not in get_args(Placement):
            raise UserError(f"placement is {', '.join(get_args(Placement))}: got {self.placement!r}")
        if not 0 < self.load < 1:
            raise UserError(f"load has to be above 0 and below 1: got {self.load}")


@dataclass(frozen=True)
class EngineStatus:
    """An engine at one moment."""

    ready: bool
    """Whether requests are taken, and would be worked on."""
    draining: bool
    failed: str | None
    """Why it is broken down; None while it is not."""
    silent_for: float
    """Seconds since it last went around its loop; grows while a forward runs, or hangs."""
    queued: int
    """Pictures waiting."""
    active: int
    """Pictures under way, the ones being decoded included."""
    chats: int
    """Answers waiting or under way."""
    queued_work: int
    """Step-tokens waiting."""
    retry_after: float
    """Seconds until what waits is done, as fast as things went lately."""
    trouble: str | None = None
    """Why pictures stand still just now, though they will go on; None while they do not."""


class Observer(Protocol):
    """Who counts. Called in the engine's threads; must not block."""

    def stepped(self, group: int, batch: int, seconds: float) -> None:
        """A forward of a group was shared by a number of pictures."""

    def ended(self, kind: str, outcome: str, seconds_queued: float, seconds: float) -> None:
        """A request ended: kind "draw" or "chat", outcome "finished" or the name of an exception's class."""
