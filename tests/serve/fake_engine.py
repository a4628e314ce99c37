"""An engine that draws noise step by step on a thread of its own, and can be told to hold, to fail, and to hang."""

import threading
import time

import numpy as np
from PIL import Image

from latteflow.serve.engine.admission import Queue
from latteflow.serve.engine.requests import (
    Cancelled,
    ChatRequest,
    DeadlineExceeded,
    Draining,
    DrawRequest,
    Failed,
    Finished,
    Progress,
    QueueFull,
    Ticket,
    Words,
)
from latteflow.serve.engine.settings import EngineSettings, EngineStatus

ANSWER = ["a ", "red ", "heart, ", "noto ", "style"]


class FakeEngine:
    def __init__(self, pipe, settings=None, observer=None):
        self.pipe, self.settings, self.observer = pipe, settings or EngineSettings(), observer
        self.step_seconds = 0.0
        self.going = threading.Event()  # cleared: requests wait
        self.going.set()
        self.refuses = None  # raised at admission
        self.fails = None  # what requests end with
        self.failed = None  # the engine itself
        self.silent = 0.0
        self.ready = False
        self.warming = threading.Event()  # cleared: warm_up waits
        self.warming.set()
        self.seen = []
        self.waiting, self.active = [], []
        self._lock = threading.Lock()
        self._draining = self._stopped = False
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self):
        self._thread.start()

    def warm_up(self):
        self.warming.wait()
        self.ready = True

    def stop(self):
        self._stopped = True
        self.going.set()
        self._thread.join()
        self.warming.set()
        for ticket in [*self.active, *self.waiting]:
            ticket.tell(Failed(Draining("gone")))

    def draw(self, requests):
        queue = Queue(self.pipe, self.settings)
        for request in requests:
            queue.check(request)
        queue.put_drawings([], requests)
        return self._admit(requests)

    def chat(self, request):
        return self._admit([request])[0]

    def ahead_of(self, ticket):
        return self.waiting.index(ticket) if ticket in self.waiting else 0

    def status(self):
        return EngineStatus(
            ready=self.ready and not self._draining and self.failed is None,
            draining=self._draining,
            failed=self.failed,
            silent_for=self.silent,
            queued=len(self.waiting),
            active=len(self.active),
            chats=0,
            queued_work=len(self.waiting) * 1000,
            retry_after=2.0,
        )

    def drain(self, timeout):
        self._draining = True
        end = time.monotonic() + timeout
        while (self.waiting or self.active) and time.monotonic() < end:
            time.sleep(0.01)
        return not (self.waiting or self.active)

    @property
    def idle(self):
        return not (self.waiting or self.active)

    def _admit(self, requests):
        self.seen += requests
        if self.refuses is not None:
            raise self.refuses
        with self._lock:
            if self._draining:
                raise Draining("about to stop")
            if len(self.waiting) + len(requests) > self.settings.max_queued_pictures:
                raise QueueFull(2.5)
            tickets = [Ticket(request) for request in requests]
            self.waiting += tickets
        return tickets

    def _run(self):
        progress = {}
        while not self._stopped:
            time.sleep(0.001)
            self._drop()
            if not self.going.is_set():
                continue
            with self._lock:
                while self.waiting and len(self.active) < self.settings.max_active:
                    self.active.append(self.waiting.pop(0))
            if self.active:
                time.sleep(self.step_seconds)
            for ticket in list(self.active):
                progress[ticket.id] = progress.get(ticket.id, 0) + 1
                if self._advance(ticket, progress[ticket.id]):
                    self.active.remove(ticket)

    def _drop(self):
        for queue in (self.waiting, self.active):
            for ticket in list(queue):
                late = time.monotonic() > ticket.deadline
                if ticket.cancelled or late:
                    queue.remove(ticket)
                    ticket.tell(Failed(DeadlineExceeded("late") if late else Cancelled("given up")))
                    if self.observer:
                        self.observer.ended("draw", "DeadlineExceeded" if late else "Cancelled", 0.1, 0.2)

    def _advance(self, ticket, step):
        request = ticket.request
        if self.fails is not None:
            ticket.tell(Failed(self.fails))
            return True
        if isinstance(request, ChatRequest):
            return self._say(ticket, step)
        steps = request.num_inference_steps
        group = (step - 1) * 2 // steps
        shown = request.preview_every and step % request.preview_every == 0
        if self.observer:
            self.observer.stepped(group, len(self.active), 0.001)
        preview = noise(request, step) if shown else None
        ticket.tell(Progress(step, steps, group, (step - 1) / steps, 0.001, len(self.active), preview))
        if step < steps:
            return False
        if self.observer:
            self.observer.ended("draw", "finished", 0.1, 0.2)
        ticket.tell(Finished(image=noise(request, 0), prompt_tokens=7, seconds_queued=0.1, seconds=0.2))
        return True

    def _say(self, ticket, step):
        words = ANSWER[: ticket.request.max_new_tokens]
        if step <= len(words):
            ticket.tell(Words(words[step - 1]))
            return False
        reason = "length" if len(words) < len(ANSWER) else "stop"
        ticket.tell(Finished(text="".join(words), finish_reason=reason, prompt_tokens=9, completion_tokens=len(words)))
        return True


def noise(request: DrawRequest, step: int) -> Image.Image:
    """What the fake draws."""
    numbers = np.random.default_rng([request.seed, step])
    return Image.fromarray(numbers.integers(0, 256, (request.height, request.width, 3), dtype=np.uint8))
