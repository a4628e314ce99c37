"""The engine: one loop that advances every request by one step at a time.

A turn of the loop drops what nobody wants any more, lets waiting pictures begin, makes one forward for the pictures
that share an expert, and gives every answer one token. So a request joins, leaves or is overtaken at any step, and
neither words nor pictures wait for the other.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from latteflow.errors import UserError
from latteflow.flow.guidance import Guidance
from latteflow.flow.noise import initial_noise
from latteflow.pipeline import LatteFlowPipeline
from latteflow.serve.engine.admission import Queue
from latteflow.serve.engine.answering import Answer
from latteflow.serve.engine.decoding import DecodingThread
from latteflow.serve.engine.drawing import Drawing, Solver
from latteflow.serve.engine.executor import Executor, LocalExecutor, Lost, Stepped
from latteflow.serve.engine.preview import Preview
from latteflow.serve.engine.prompts import Prompts
from latteflow.serve.engine.requests import (
    Cancelled,
    ChatRequest,
    DeadlineExceeded,
    Draining,
    DrawRequest,
    EngineFailed,
    Event,
    Failed,
    Finished,
    Progress,
    Refused,
    Ticket,
)
from latteflow.serve.engine.settings import EngineSettings, EngineStatus, Observer

_IDLE_SECONDS = 0.25
"""How long an idle loop sleeps before it looks again: deadlines of what waits are seen in time."""

_WARM_UP_PICTURES = 16


@dataclass
class _Job:
    """A picture from the end of its waiting to its last event."""

    ticket: Ticket
    request: DrawRequest
    started_at: float
    work_a_step: float
    prompt_tokens: int = 0
    decoding: bool = False


class Engine:
    """Draws and answers for many at a time.

    Usage:

        engine = Engine(pipe)
        engine.start()
        engine.warm_up()
        [ticket] = engine.draw([DrawRequest("a red apple, noto style")])
        image = ticket.result().image

    Args:
        pipe: the model; nobody else may use it while the engine runs.
        settings: bounds and habits.
        observer: who counts.
        executor: what makes the steps; left out, this process.
    """

    def __init__(
        self,
        pipe: LatteFlowPipeline,
        settings: EngineSettings = EngineSettings(),  # noqa: B008  (frozen)
        observer: Observer | None = None,
        executor: Executor | None = None,
    ) -> None:
        self.pipe, self.settings = pipe, settings
        self._observer = observer
        self._executor = LocalExecutor(pipe.transformer, settings) if executor is None else executor
        self._prompts = Prompts(pipe, alone=settings.deterministic)
        self._queue = Queue(pipe, settings)
        self._jobs: dict[str, _Job] = {}
        self._answers: list[Answer] = []
        self._preview: Preview | None = None
        self._wake = threading.Condition()
        self._stopping = self._draining = self._warm = False
        self._failed: str | None = None
        self._turned_at = time.monotonic()
        self._decoding: DecodingThread | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the loop and the decoder's thread."""
        most = 1 if self.settings.deterministic else self.settings.max_batch
        self._decoding = DecodingThread(self.pipe.decode, self._decoded, self._fail, most)  # type: ignore[arg-type]
        self._thread = threading.Thread(target=self._run, name="latteflow-engine", daemon=True)
        self._thread.start()

    def warm_up(self) -> None:
        """Draw a few pictures and fit the preview to them; from then on ``status().ready`` is true.

        Raises:
            Refused: they were not drawn.
        """
        steps = 2 * self.pipe.transformer.config.num_groups  # so that every expert runs
        number = min(_WARM_UP_PICTURES, self.settings.max_queued_pictures)
        plain = [DrawRequest("", seed=i, num_inference_steps=steps, guidance_scale=1.0) for i in range(number)]
        images = [image for ticket in self.draw(plain) if (image := ticket.result().image) is not None]
        self._preview = Preview.fit(self.pipe.vae, self.pipe.transformer.config, images)
        # Few pictures, unlike ones, long prompts: other kinds of call, which a compiled model compiles one by one.
        words = ("", "a", "a picture " * 20)
        guided = [DrawRequest(each, num_inference_steps=steps + i) for i, each in enumerate(words)]
        for together in (plain[:1], guided[:1], guided):
            for ticket in self.draw(together[: self.settings.max_queued_pictures]):
                ticket.result()
        self._warm = True

    def draw(self, requests: Sequence[DrawRequest]) -> list[Ticket]:
        """Have pictures drawn; all are taken, or none.

        Raises:
            UserError: one cannot be drawn.
            QueueFull: too much is waiting.
            Draining: no more is taken.
            EngineFailed: the engine broke down.
        """
        for request in requests:
            self._queue.check(request)
        tickets = [Ticket(request, _wake=self._notify) for request in requests]
        self._refuse_if_closed()
        self._queue.put_drawings(tickets, list(requests))
        self._notify()
        self._refuse_late(tickets)
        return tickets

    def chat(self, request: ChatRequest) -> Ticket:
        """Have a conversation answered; raises as ``draw`` does."""
        if not request.messages or request.messages[-1].get("role") != "user":
            raise UserError("a conversation has to end with a user's turn")
        ticket = Ticket(request, _wake=self._notify)
        self._refuse_if_closed()
        self._queue.put_chat(ticket)
        self._notify()
        self._refuse_late([ticket])
        return ticket

    def ahead_of(self, ticket: Ticket) -> int:
        """Return how many of its kind wait before a ticket; 0 if it does not wait."""
        for waiting in (list(self._queue.drawings), list(self._queue.chats)):
            if ticket in waiting:
                return waiting.index(ticket)
        return 0

    def status(self) -> EngineStatus:
        """Return how things stand."""
        trouble = self._executor.trouble()
        closed = self._draining or self._stopping or self._failed is not None
        return EngineStatus(
            ready=self._warm and not closed and trouble is None,
            draining=self._draining,
            failed=self._failed,
            silent_for=time.monotonic() - self._turned_at,
            queued=len(self._queue.drawings),
            active=len(self._jobs),
            chats=len(self._queue.chats) + len(self._answers),
            queued_work=self._queue.work,
            retry_after=self._queue.retry_after(),
            trouble=trouble,
        )

    def drain(self, timeout: float) -> bool:
        """Take no more, refuse what waits, finish what is under way; return whether that took no longer than allowed.

        What is left after ``timeout`` seconds fails with ``Draining``.
        """
        with self._wake:
            self._draining = True
            self._wake.notify_all()
            done = self._wake.wait_for(lambda: not (self._jobs or self._answers or self._queue.waiting()), timeout)
        if not done:
            self.stop()
        return done

    def stop(self) -> None:
        """End the threads; what is not done fails with ``Draining``."""
        self._draining = self._stopping = True
        self._notify()
        if self._thread is not None:
            self._thread.join()
        if self._decoding is not None:
            self._decoding.close()
        self._executor.close()

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._turned_at = time.monotonic()
                if not self._turn():
                    with self._wake:
                        self._wake.wait_for(self._has_news, _IDLE_SECONDS)
            self._end_all(Draining("the server is about to stop: try again in a moment"))
        finally:
            if (error := sys.exc_info()[1]) is not None:
                self._fail(error)

    @torch.no_grad()
    def _turn(self) -> bool:
        """Advance everything by one step; return whether there was anything to do."""
        self._drop_unwanted()
        self._begin_drawings()
        self._begin_answers()
        outcomes = self._executor.advance()
        for outcome in outcomes:
            if outcome.id in self._jobs:  # not given up meanwhile
                self._tell(outcome)
        for answer in list(self._answers):
            if not answer.advance():
                self._answers.remove(answer)
                # Nothing, where it has told its end itself.
                self._finish(answer.ticket, Failed(EngineFailed("the answer broke down: try again")))
        return bool(self._answers) or any(not job.decoding for job in list(self._jobs.values()))

    def _has_news(self) -> bool:
        return self._stopping or bool(self._queue.drawings or self._queue.chats or self._jobs_unwanted())

    def _drop_unwanted(self) -> None:
        now = time.monotonic()
        waiting = self._queue.waiting()
        refused = {ticket: error for ticket in waiting if (error := _unwanted(ticket, now, self._draining))}
        self._queue.remove(set(refused))
        for ticket, error in refused.items():
            self._finish(ticket, Failed(error))
        for job in self._jobs_unwanted():
            self._executor.remove(job.ticket.id)
            self._finish(job.ticket, Failed(_unwanted(job.ticket, now) or Cancelled("it was given up")))
        for answer in list(self._answers):
            error = _unwanted(answer.ticket, now)
            if error is not None:
                answer.ticket.tell(Failed(error))
                answer.give_up()
                self._answers.remove(answer)
                self._ended(answer.ticket)

    def _jobs_unwanted(self) -> list[_Job]:
        now = time.monotonic()
        return [job for job in list(self._jobs.values()) if _unwanted(job.ticket, now) and not job.decoding]

    def _begin_drawings(self) -> None:
        taken = self._queue.take_drawings(self.settings.max_active - len(self._jobs))
        if not taken:
            return
        for ticket, request in taken:
            work = self._queue.work_of(request) / request.num_inference_steps
            self._jobs[ticket.id] = _Job(ticket, request, time.monotonic(), work)
        for (ticket, request), contexts in zip(taken, self._prompts.read([r for _, r in taken]), strict=True):
            if isinstance(contexts, UserError):
                self._finish(ticket, Failed(contexts))
                continue
            self._jobs[ticket.id].prompt_tokens = int(contexts[0].mask.sum())
            height, width = self._queue.size_of(request)
            factor = self.pipe.vae.spatial_compression_ratio
            shape = (self.pipe.transformer.config.latent_channels, height // factor, width // factor)
            x_t = initial_noise(shape, 1, torch.Generator().manual_seed(request.seed)).to(contexts[0].mask.device)
            solver = Solver(self.pipe.scheduler, request.num_inference_steps, x_t.device)
            guidance = Guidance(request.guidance_scale, *request.guidance_interval)
            self._executor.add(Drawing(ticket.id, x_t, solver, *contexts, guidance, request.preview_every))

    def _begin_answers(self) -> None:
        while len(self._answers) < self.settings.max_chats:
            taken = self._queue.take_chat()
            if taken is None:
                return
            self._answers.append(Answer(*taken, self.pipe.backbone, self.pipe.processor))

    def _tell(self, outcome: Stepped | Lost) -> None:
        job = self._jobs[outcome.id]
        if isinstance(outcome, Lost):
            self._finish(job.ticket, Failed(outcome.error))
            return
        self._queue.did(job.work_a_step)
        if self._observer is not None:
            self._observer.stepped(outcome.group, outcome.batch, outcome.seconds)
        preview = None
        if outcome.clean is not None and self._preview is not None and outcome.x_1 is None:
            preview = self._preview(outcome.clean)
        job.ticket.tell(
            Progress(
                outcome.step, outcome.steps, outcome.group, outcome.t, outcome.seconds, outcome.batch, preview=preview
            )
        )
        if outcome.x_1 is not None and self._decoding is not None:
            job.decoding = True
            self._decoding.put(job.ticket, outcome.x_1)

    def _decoded(self, ticket: Ticket, image: Image.Image) -> None:
        job = self._jobs.get(ticket.id)
        if job is None:  # the engine has ended meanwhile, and has said so
            return
        queued = job.started_at - ticket.submitted_at
        seconds = time.monotonic() - ticket.submitted_at
        end = Finished(image=image, prompt_tokens=job.prompt_tokens, seconds_queued=queued, seconds=seconds)
        self._finish(ticket, end)

    def _finish(self, ticket: Ticket, event: Event) -> None:
        """Tell a picture's, or a waiting answer's, last event."""
        ticket.tell(event)
        self._ended(ticket)

    def _ended(self, ticket: Ticket) -> None:
        job = self._jobs.pop(ticket.id, None)
        self._notify()
        if self._observer is None:
            return
        last = ticket.last
        outcome = type(last.error).__name__ if isinstance(last, Failed) else "finished"
        now = time.monotonic()
        queued = (now if job is None else job.started_at) - ticket.submitted_at
        kind = "draw" if isinstance(ticket.request, DrawRequest) else "chat"
        self._observer.ended(kind, outcome, queued, now - ticket.submitted_at)

    def _refuse_if_closed(self) -> None:
        if self._failed is not None:
            raise EngineFailed("the engine broke down: it has to be started anew")
        if self._draining:
            raise Draining("the server is about to stop: try again in a moment")

    def _refuse_late(self, tickets: Sequence[Ticket]) -> None:
        """Fail what came in while the loop ended: nobody would look at it any more."""
        if self._stopping or self._failed is not None:
            self._queue.remove(set(tickets))
            for ticket in tickets:
                ticket.tell(Failed(EngineFailed("the engine has ended")))

    def _fail(self, error: BaseException) -> None:
        """Break down: nothing hangs, and nothing more is taken."""
        self._failed = type(error).__name__
        self._end_all(EngineFailed("the engine broke down: try again"))

    def _end_all(self, error: Refused) -> None:
        for ticket in [*self._queue.waiting(), *(job.ticket for job in list(self._jobs.values()))]:
            self._queue.remove({ticket})
            self._finish(ticket, Failed(error))
        for answer in self._answers:
            answer.ticket.tell(Failed(error))
            answer.give_up()
        self._answers.clear()

    def _notify(self) -> None:
        with self._wake:
            self._wake.notify_all()


def _unwanted(ticket: Ticket, now: float, draining: bool = False) -> Refused | None:
    """Return why a ticket should go no further; None if it should."""
    if ticket.cancelled:
        return Cancelled("it was given up")
    if now > ticket.deadline:
        return DeadlineExceeded("it was not done in its time")
    return Draining("the server is about to stop: try again in a moment") if draining else None
