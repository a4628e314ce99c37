"""What an engine is asked and what it tells: the language between it and whoever stands in front of it."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from PIL import Image

from latteflow.models.processor import Message


@dataclass(frozen=True)
class DrawRequest:
    """One picture."""

    prompt: str | Sequence[Message]
    """Words, or a conversation that ends with a user's turn (messages as ``LatteFlowPipeline.chat`` takes them)."""
    negative_prompt: str = ""
    """What to steer away from."""
    seed: int = 0
    """0 to 2**63 - 1: the noise is that of a pipeline's call with a generator of this seed."""
    height: int | None = None
    """In pixels; left out, the model's own."""
    width: int | None = None
    num_inference_steps: int = 40
    """Intervals of the solver, as in the pipeline's call."""
    guidance_scale: float = 4.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """First and last t that are guided."""
    preview_every: int = 0
    """Steps between previews of the clean picture as it is predicted; 0 for none."""
    timeout: float | None = None
    """Seconds from admission; what is not finished by then fails with ``DeadlineExceeded``."""


@dataclass(frozen=True)
class ChatRequest:
    """The assistant's next words."""

    messages: Sequence[Message]
    """A conversation that ends with a user's turn."""
    max_new_tokens: int = 512
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    """Sample from the most likely tokens that make up this share."""
    seed: int = 0
    """Of sampling: the same request gives the same words, whatever else runs."""
    timeout: float | None = None


@dataclass(frozen=True)
class Progress:
    """A drawing went one step further."""

    step: int
    """Network calls made so far, from 1."""
    steps: int
    """Network calls in all."""
    group: int
    """The expert that ran."""
    t: float
    """The time it ran at, in [0, 1]."""
    seconds: float
    """What the forward took, with all that shared it."""
    batch: int
    """How many drawings shared it."""
    preview: Image.Image | None = None
    """The clean picture as predicted at this step, roughly."""


@dataclass(frozen=True)
class Words:
    """An answer went on."""

    text: str


@dataclass(frozen=True)
class Finished:
    """The request is done."""

    image: Image.Image | None = None
    """Of a ``DrawRequest``, RGB."""
    text: str | None = None
    """Of a ``ChatRequest``: the whole answer."""
    finish_reason: str = "stop"
    """"stop", or "length" for an answer that was cut at ``max_new_tokens``."""
    prompt_tokens: int = 0
    """That the backbone read: words, and pictures in a conversation; a negative prompt's do not count."""
    completion_tokens: int = 0
    """Of an answer."""
    seconds_queued: float = 0.0
    seconds: float = 0.0
    """From admission to the end."""


@dataclass(frozen=True)
class Failed:
    """The request is over without a result."""

    error: Exception
    """``Refused`` or one of its kinds, or ``UserError``."""


Event: TypeAlias = Progress | Words | Finished | Failed


class Refused(Exception):
    """A request that is not served, for a reason that is not its author's mistake; the message may be shown to them."""


class QueueFull(Refused):
    """Too much is waiting."""

    def __init__(self, retry_after: float) -> None:
        super().__init__(f"the queue is full: try again in {retry_after:.0f} s")
        self.retry_after = retry_after
        """Seconds until about as much has been done as was asked."""


class Draining(Refused):
    """The engine takes no more, because it is about to stop."""


class Cancelled(Refused):
    """Whoever asked does not want it any more."""


class DeadlineExceeded(Refused):
    """It was not finished in its time."""


class EngineFailed(Refused):
    """The engine, or the process that did the work, broke down; asking again may help."""


class OutOfMemory(Refused):
    """The request alone needs more memory than there is; asking again will not help."""


@dataclass(eq=False)
class Ticket:
    """What whoever asked holds of a request. Its methods may be called from any thread."""

    request: DrawRequest | ChatRequest
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    submitted_at: float = field(default_factory=time.monotonic)
    _events: list[Event] = field(default_factory=list)
    _listeners: list[Callable[[Event], None]] = field(default_factory=list)
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _cancelled: bool = False
    _wake: Callable[[], None] = lambda: None

    def subscribe(self, listener: Callable[[Event], None]) -> None:
        """Have a function called with every event in order, those that were before included; it must not block.

        It is called in the engine's threads. The last event is ``Finished`` or ``Failed``.
        """
        with self._changed:
            for event in self._events:
                listener(event)
            self._listeners.append(listener)

    def cancel(self) -> None:
        """Give the request up: it takes no part in any later step, and fails with ``Cancelled`` unless it is done."""
        self._cancelled = True
        self._wake()

    @property
    def cancelled(self) -> bool:
        """Whether it was given up."""
        return self._cancelled

    @property
    def deadline(self) -> float:
        """When it has to be done, on ``time.monotonic``'s clock."""
        return float("inf") if self.request.timeout is None else self.submitted_at + self.request.timeout

    @property
    def done(self) -> bool:
        """Whether the last event has happened."""
        return bool(self._events) and isinstance(self._events[-1], Finished | Failed)

    @property
    def last(self) -> Event:
        """The latest event; there is one."""
        return self._events[-1]

    def result(self, timeout: float | None = None) -> Finished:
        """Wait for the end and return it.

        Raises:
            TimeoutError: it takes longer than ``timeout`` seconds.
            Refused: it failed.
            UserError: it asked for something that cannot be.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self.done, timeout):
                raise TimeoutError(f"the request was not done within {timeout} s")
        last = self._events[-1]
        if isinstance(last, Failed):
            raise last.error
        return last  # type: ignore[return-value]

    def tell(self, event: Event) -> None:
        """Add an event; for the engine. After the last one, nothing is added."""
        with self._changed:
            if self.done:
                return
            # Late subscribers need no preview of what is past, and pictures are what weighs.
            heard = isinstance(event, Progress) and self._listeners
            self._events.append(replace(event, preview=None) if heard else event)
            for listener in self._listeners:
                listener(event)
            self._changed.notify_all()
