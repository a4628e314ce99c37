"""The group pipeline's router: a picture goes from stage to stage, and what crosses a border is its latents.

Every stage holds one expert group. A picture visits the stages in the order of its times, and stays in each for a
whole interval, so pictures share forwards with all that are in the same stage, and K - 1 times a picture a few KiB are
handed over. What was handed over last is kept here: a stage that dies, or hangs, is started again and given its
pictures again, and as the solver remembers nothing, they finish with the same bits.
"""

from __future__ import annotations

import logging
import queue
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from latteflow.errors import UserError
from latteflow.models.context import Context
from latteflow.models.transformer import LatteFlowTransformer
from latteflow.serve.engine.drawing import Drawing
from latteflow.serve.engine.executor import Lost, Outcome, Stepped
from latteflow.serve.engine.requests import EngineFailed, OutOfMemory
from latteflow.serve.executors.codec import (
    Admit,
    Dropped,
    Enter,
    Leave,
    Measure,
    Measured,
    Moved,
    Packet,
    Ready,
    Refusal,
    Tensors,
    context_tensors,
)
from latteflow.serve.executors.cost import Cost
from latteflow.serve.executors.stage_process import Inbox, Report, Stage

_log = logging.getLogger(__name__)

_WAIT_SECONDS = 0.01
"""How long ``advance`` waits for news: the engine has answers to go on with."""
_GRACE_SECONDS = 5.0


@dataclass(frozen=True)
class Patience:
    """When a stage is given up, and when all are."""

    silence: float = 60.0
    """Seconds without a word after which a stage is taken for hung: longer than its longest forward."""
    start: float = 300.0
    """Seconds that starting may take."""
    deaths: int = 4
    """Of one stage within ``window`` seconds, after which the pipeline has failed."""
    window: float = 120.0
    backoff: float = 0.25
    """Seconds before a stage is started again; twice as many after each further death within the window."""


@dataclass
class _Slot:
    """One group's place: the stage that is in it, and how those before it fared."""

    group: int
    stage: Stage | None = None
    ready: bool = False
    start_at: float = 0.0
    deaths: deque[float] = field(default_factory=deque)
    restarts: int = 0
    cost: Cost | None = None


@dataclass
class _Picture:
    """A picture as it was handed over last, which is all that is needed to go on from there."""

    drawing: Drawing
    told: int
    """The last step that the engine heard of."""


class GroupPipeline:
    """Steps in one process for each expert group.

    Args:
        transformer: the replica; only its configuration is used, so its layers may lack storage.
        start: starts a group's stage, which will report to the inbox.
        patience: with stages.

    Raises:
        UserError: a stage cannot be, for a reason that is its user's to mend.
        EngineFailed: stages do not start.
    """

    def __init__(
        self,
        transformer: LatteFlowTransformer,
        start: Callable[[int, Inbox], Stage],
        patience: Patience = Patience(),
    ) -> None:
        self._transformer, self._start, self._patience = transformer, start, patience
        self._inbox: Inbox = queue.SimpleQueue()
        self._slots = [_Slot(group) for group in range(transformer.config.num_groups)]
        self._pictures: dict[str, _Picture] = {}
        self._failed: EngineFailed | None = None
        self._refusal: str | None = None

    @property
    def restarts(self) -> int:
        """How often a stage was started again."""
        return sum(slot.restarts for slot in self._slots)

    def trouble(self) -> str | None:
        """Say why pictures stand still just now; None while they do not. Any thread may ask."""
        if self._failed is not None:
            return str(self._failed)
        down = [str(slot.group) for slot in self._slots if not slot.ready]
        return f"stages {', '.join(down)} are being started" if down else None

    def wait_until_ready(self) -> None:
        """Wait until all stages are.

        Raises:
            UserError: one cannot be, for a reason that is its user's to mend.
            EngineFailed: they end again and again.
        """
        while self.trouble() is not None:
            self.advance(_WAIT_SECONDS)
            if self._refusal is not None:
                self.close()
                raise UserError(self._refusal)

    def measure(self) -> list[Cost]:
        """Return what forwards of each group cost, one stage measuring after the other; there are no pictures.

        Raises:
            EngineFailed: a stage ended again and again.
        """
        return [self._measured(slot) for slot in self._slots]

    def _measured(self, slot: _Slot) -> Cost:
        slot.cost = None
        while slot.cost is None:
            self.wait_until_ready()
            self._send(slot, Packet(Measure()))
            while slot.cost is None and self.trouble() is None:
                self.advance(_WAIT_SECONDS)
        return slot.cost

    def add(self, drawing: Drawing) -> None:
        """Take a picture; it advances from now on."""
        picture = self._pictures[drawing.id] = _Picture(drawing, drawing.step)
        for slot in self._slots:
            self._admit(slot, picture)

    def remove(self, id: str) -> None:
        """Give a picture up; nothing more is heard of it."""
        if self._pictures.pop(id, None) is not None:
            for slot in self._slots:
                self._send(slot, Packet(Leave(id=id)))

    def advance(self, wait: float | None = None) -> list[Outcome]:
        """Return what has come of the stages' work; wait for a moment if nothing has, and pictures are under way.

        Args:
            wait: seconds; left out, short while there are pictures, and none without.

        Raises:
            EngineFailed: a stage ended again and again; the call before said so of every picture.
        """
        if self._failed is not None:
            raise self._failed
        self._tend()
        if wait is None:
            wait = _WAIT_SECONDS if self._pictures else 0.0
        outcomes: list[Outcome] = []
        try:
            report = self._inbox.get(timeout=wait) if wait else self._inbox.get_nowait()
            while self._failed is None:
                outcomes += self._hear(report)
                report = self._inbox.get_nowait()
        except queue.Empty:
            pass
        return outcomes + (self._lose_all() if self._failed is not None else [])

    def close(self) -> None:
        """End the stages: they are asked first, then made to."""
        stages = [slot.stage for slot in self._slots if slot.stage is not None]
        for stage in stages:
            stage.end()
        until = time.monotonic() + _GRACE_SECONDS
        for stage in stages:
            stage.kill(max(0.0, until - time.monotonic()))
        for slot in self._slots:
            slot.stage, slot.ready = None, False
        self._pictures.clear()

    def _tend(self) -> None:
        """Start what is to be started, and end what has been silent for too long."""
        for slot in self._slots:
            if slot.stage is None:
                self._fill(slot)
            elif slot.stage.silent_for > (self._patience.silence if slot.ready else self._patience.start):
                self._bury(slot, "was silent for too long")

    def _fill(self, slot: _Slot) -> None:
        """Start a stage where there is none, if it is time to."""
        if time.monotonic() < slot.start_at:
            return
        try:
            slot.stage = self._start(slot.group, self._inbox)
        except OSError as error:  # no memory, or too many processes: perhaps not for long
            self._bury(slot, f"could not be started ({error.strerror})")

    def _hear(self, report: Report) -> Sequence[Outcome]:
        slot = next((slot for slot in self._slots if slot.stage is report.stage), None)
        if slot is None:
            return []  # it was given up, and others are in its place
        if report.packet is None:
            self._bury(slot, "ended")
            return []
        match report.packet.message:
            case Ready():
                self._welcome(slot)
            case Refusal(message=message):
                self._refusal = message
            case Measured(fixed=fixed, each=each):
                slot.cost = Cost(fixed, each)
            case Moved() as moved:
                return self._moved(slot, moved, report.packet.tensors)
            case Dropped(id=id, message=message) if id in self._pictures:
                self.remove(id)
                return [Lost(id, OutOfMemory(message))]
        return []

    def _welcome(self, slot: _Slot) -> None:
        """Give a stage that was started all that it has to know."""
        slot.ready = True
        for picture in self._pictures.values():
            self._admit(slot, picture)

    def _admit(self, slot: _Slot, picture: _Picture) -> None:
        """Tell a stage of a picture that will come, or is there."""
        drawing = picture.drawing
        groups = [self._transformer.group_of(t) for t in drawing.solver.times[drawing.step :]]
        if slot.group not in groups:
            return
        numbers = self._transformer.layers_of(slot.group)

        def sliced(context: Context | None) -> Context | None:
            return None if context is None else context.of_layers(numbers)

        message = Admit(
            id=drawing.id,
            num_inference_steps=drawing.steps,
            guidance=(drawing.guidance.scale, drawing.guidance.first, drawing.guidance.last),
            preview_every=drawing.preview_every,
            first_layer=numbers.start,
        )
        tensors = context_tensors("conditional", sliced(drawing.conditional))
        tensors |= context_tensors("unconditional", sliced(drawing.unconditional))
        self._send(slot, Packet(message, tensors))
        if slot.group == groups[0]:
            self._enter(drawing)

    def _enter(self, drawing: Drawing) -> None:
        packet = Packet(Enter(id=drawing.id, step=drawing.step), {"x_t": drawing.x_t})
        self._send(self._slots[self._group_of(drawing)], packet)

    def _moved(self, slot: _Slot, moved: Moved, tensors: Tensors) -> Sequence[Outcome]:
        """Note a picture's step, and hand it on if it leaves the stage."""
        picture = self._pictures.get(moved.id)
        if picture is None:
            return []  # given up meanwhile
        drawing, x_t = picture.drawing, tensors.get("x_t")
        if not self._is_possible(slot, drawing, moved, tensors):
            self._bury(slot, "said what makes no sense")
            return []
        if x_t is not None:
            drawing.x_t, drawing.step = x_t.to(drawing.x_t.device), moved.step
            if drawing.finished:
                del self._pictures[moved.id]
            else:
                self._enter(drawing)
        if moved.step <= picture.told:
            return []  # a step that was made once more
        picture.told = moved.step
        clean, x_1 = tensors.get("clean"), drawing.x_t if drawing.finished else None
        step, steps, seconds = moved.step, drawing.steps, moved.seconds
        return [Stepped(moved.id, step, steps, slot.group, moved.t, seconds, moved.batch, clean, x_1)]

    def _bury(self, slot: _Slot, why: str) -> None:
        """Let go of a stage, and see when, and whether, to start the next in its place."""
        now = time.monotonic()
        if slot.stage is not None:
            slot.stage.kill()
        slot.stage, slot.ready = None, False
        slot.deaths.append(now)
        while slot.deaths[0] < now - self._patience.window:
            slot.deaths.popleft()
        number = len(slot.deaths)
        _log.warning("the stage of group %d %s (%d of %d)", slot.group, why, number, self._patience.deaths)
        if number >= self._patience.deaths:
            self._failed = EngineFailed(f"the stage of group {slot.group} {why}, {number} times in a row")
        slot.restarts += 1
        slot.start_at = now + self._patience.backoff * 2 ** (number - 1)

    def _lose_all(self) -> list[Outcome]:
        lost: list[Outcome] = [Lost(id, EngineFailed("the engine broke down: try again")) for id in self._pictures]
        self.close()
        return lost

    def _is_possible(self, slot: _Slot, drawing: Drawing, moved: Moved, tensors: Tensors) -> bool:
        """Say whether a stage may have moved a picture in this way: it was there, and left when it had to."""
        if not drawing.step < moved.step <= drawing.steps or self._group_of(drawing) != slot.group:
            return False
        times = drawing.solver.times
        stays = moved.step < drawing.steps and int(self._transformer.group_of(times[moved.step])) == slot.group
        shapes = {tensor.shape for tensor in tensors.values()}
        return stays != ("x_t" in tensors) and shapes <= {drawing.x_t.shape}

    def _group_of(self, drawing: Drawing) -> int:
        return int(self._transformer.group_of(drawing.t))

    def _send(self, slot: _Slot, packet: Packet) -> None:
        """Say something to a stage; one that is not ready will hear all it needs when it is."""
        if slot.stage is not None and slot.ready:
            slot.stage.send(packet)
