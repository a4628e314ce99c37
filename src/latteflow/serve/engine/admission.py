"""What waits, how much work it is, and when there is too much of it."""

from __future__ import annotations

import threading
import time
from collections import deque

from latteflow.errors import UserError
from latteflow.models.request import check_sampling, check_size
from latteflow.pipeline import LatteFlowPipeline
from latteflow.serve.engine.requests import ChatRequest, DrawRequest, QueueFull, Ticket
from latteflow.serve.engine.settings import EngineSettings

_STEPS = 40
_MOST_SECONDS = 120.0


class Queue:
    """Tickets that wait, pictures apart from answers, bounded in step-tokens; for any thread to call.

    A step-token is one token of one picture in one network call; guidance takes two calls a step.

    Args:
        pipe: whose sizes count.
        settings: the bounds.
    """

    def __init__(self, pipe: LatteFlowPipeline, settings: EngineSettings) -> None:
        config, factor = pipe.transformer.config, pipe.spatial_factor
        self._factor, self._side = factor, config.sample_size * pipe.vae.spatial_compression_ratio
        self._settings = settings
        self.most_work = settings.max_queued_pictures * 2 * _STEPS * (self._side // factor) ** 2
        self.drawings: deque[Ticket] = deque()
        self.chats: deque[Ticket] = deque()
        self.work = 0
        """Step-tokens of pictures that wait."""
        self._lock = threading.Lock()
        self._done, self._since = 0.0, time.monotonic()

    def size_of(self, request: DrawRequest) -> tuple[int, int]:
        """Return a picture's height and width in pixels."""
        return request.height or self._side, request.width or self._side

    def work_of(self, request: DrawRequest) -> int:
        """Return the step-tokens of a picture."""
        height, width = self.size_of(request)
        tokens = (height // self._factor) * (width // self._factor)
        return request.num_inference_steps * (2 if request.guidance_scale != 1 else 1) * tokens

    def check(self, request: DrawRequest) -> None:
        """Refuse what can never be drawn.

        Raises:
            UserError: a size or a number that cannot be.
        """
        check_size(*self.size_of(request), factor=self._factor)
        check_sampling(request.num_inference_steps, request.guidance_scale, request.guidance_interval, 1)
        if not 0 <= request.seed < 2**63:
            raise UserError(f"seed has to be 0 to 2**63 - 1: got {request.seed}")

    def put_drawings(self, tickets: list[Ticket], requests: list[DrawRequest]) -> None:
        """Let pictures wait, all or none.

        Raises:
            QueueFull: that would be too much work now.
            UserError: it would always be.
        """
        work = sum(map(self.work_of, requests))
        if work > self.most_work:
            raise UserError("that is more work than the whole queue may hold: draw fewer, smaller or in fewer steps")
        with self._lock:
            if self.work + work > self.most_work:
                raise QueueFull(self.retry_after(work))
            self.work += work
            self.drawings.extend(tickets)

    def put_chat(self, ticket: Ticket) -> None:
        """Let a conversation wait.

        Raises:
            QueueFull: too many do.
        """
        with self._lock:
            if len(self.chats) >= self._settings.max_queued_chats:
                raise QueueFull(self.retry_after(0))
            self.chats.append(ticket)

    def take_drawings(self, number: int) -> list[tuple[Ticket, DrawRequest]]:
        """Return, and remove, the pictures that have waited longest."""
        with self._lock:
            tickets = [self.drawings.popleft() for _ in range(min(number, len(self.drawings)))]
            taken = [(ticket, ticket.request) for ticket in tickets if isinstance(ticket.request, DrawRequest)]
            self.work -= sum(self.work_of(request) for _, request in taken)
        return taken

    def take_chat(self) -> tuple[Ticket, ChatRequest] | None:
        """Return, and remove, the conversation that has waited longest; None if none does."""
        with self._lock:
            ticket = self.chats.popleft() if self.chats else None
        return None if ticket is None else (ticket, ticket.request)  # type: ignore[return-value]

    def remove(self, unwanted: set[Ticket]) -> None:
        """Forget tickets."""
        with self._lock:
            for ticket in unwanted:
                if ticket in self.drawings and isinstance(ticket.request, DrawRequest):
                    self.work -= self.work_of(ticket.request)
                    self.drawings.remove(ticket)
                elif ticket in self.chats:
                    self.chats.remove(ticket)

    def waiting(self) -> list[Ticket]:
        """Return all that wait."""
        with self._lock:
            return [*self.drawings, *self.chats]

    def did(self, work: float) -> None:
        """Note that step-tokens were worked off, for ``retry_after``."""
        now = time.monotonic()
        # Halved every ten seconds or so, so that what was long ago counts little.
        if now - self._since > 10:
            self._done, self._since = self._done / 2, now - (now - self._since) / 2
        self._done += work

    def retry_after(self, work: int = 0) -> float:
        """Return seconds until what waits, and as much more, is done, as fast as things went lately; 1 to 120."""
        seconds = time.monotonic() - self._since
        rate = self._done / seconds if seconds > 0 else 0.0
        return min(max((self.work + work) / rate, 1.0), _MOST_SECONDS) if rate > 0 else 1.0
