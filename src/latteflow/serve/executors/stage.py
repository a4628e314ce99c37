"""One stage of the group pipeline: a process that holds one expert group and makes the steps of its interval.

Started by ``stage_process.py``. It reads weights from the model's folder, its own group's alone, and hears of pictures
through a pipe. When the pipe ends, because the router closed it or is no more, so does the stage.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from pydantic import BaseModel, ConfigDict

from latteflow.errors import UserError
from latteflow.flow.guidance import Guidance
from latteflow.models.context import Context
from latteflow.models.transformer import LatteFlowTransformer
from latteflow.models.weight_store import transformer_of_group
from latteflow.serve.engine.drawing import Drawing, Solver
from latteflow.serve.engine.executor import LocalExecutor, Lost, Stepped
from latteflow.serve.engine.settings import EngineSettings
from latteflow.serve.executors.codec import (
    MOST_BYTES,
    Admit,
    Beat,
    CodecError,
    Dropped,
    Enter,
    Leave,
    Measure,
    Measured,
    Moved,
    Packet,
    Ready,
    Refusal,
    context_of,
    decode,
    encode,
)
from latteflow.serve.executors.cost import measure


class StageSettings(BaseModel):
    """What a stage is told when it is started, as JSON on its command line."""

    model_config = ConfigDict(extra="forbid")

    model: str
    """Folder of the saved pipeline, or an embedded model's name."""
    group: int
    device: str
    dtype: str
    """Of the weights, a name in torch, such as "float32"."""
    threads: int
    """Of torch on the CPU."""
    scheduler: dict[str, Any]
    """Configuration of the pipeline's Euler solver."""
    engine: dict[str, Any]
    """Fields of ``EngineSettings``."""
    beat: float
    """Seconds after which an idle stage says that it is alive."""
    pipe: int
    """File descriptor of its end of the pipe."""


class StageWorker:
    """What a stage does, without the pipe: packets in, steps, packets out.

    Args:
        transformer: the replica; its other groups' layers are not touched.
        group: whose steps are made here.
        scheduler: of the pipeline, without memory.
        settings: of the engine.
        device: where the group is.
    """

    def __init__(
        self,
        transformer: LatteFlowTransformer,
        group: int,
        scheduler: SchedulerMixin,
        settings: EngineSettings,
        device: torch.device,
    ) -> None:
        self._transformer, self._group, self._scheduler = transformer, group, scheduler
        self._settings, self._device = settings, device
        self._executor = LocalExecutor(transformer, settings)
        self._admitted: dict[str, tuple[Admit, Context, Context | None]] = {}
        self._here: dict[str, Drawing] = {}
        self._measure = False

    @property
    def busy(self) -> bool:
        """Whether ``advance`` has something to do."""
        return bool(self._here) or self._measure

    def take(self, packet: Packet) -> None:
        """Hear what the router says.

        Raises:
            CodecError: it makes no sense.
        """
        match packet.message:
            case Admit() as admit:
                self._admit(admit, packet.tensors)
            case Enter() as enter:
                self._enter(enter, packet.tensors["x_t"])
            case Leave(id=id):
                self._forget(id)
            case Measure():
                self._measure = True
            case other:
                raise CodecError(f"{other.kind} is nothing that a stage is told")

    def advance(self) -> list[Packet]:
        """Make one forward, if there is any picture; return what the router should hear."""
        if self._measure:
            self._measure = False
            cost = measure(self._transformer, self._group, self._scheduler, self._settings, self._device)
            return [Packet(Measured(fixed=cost.fixed, each=cost.each))]
        return [
            self._dropped(outcome) if isinstance(outcome, Lost) else self._moved(outcome)
            for outcome in self._executor.advance()
        ]

    def _admit(self, admit: Admit, tensors: Mapping[str, torch.Tensor]) -> None:
        if admit.first_layer != self._transformer.layers_of(self._group).start:
            raise CodecError("the context of another group's layers")
        conditional = context_of("conditional", tensors, admit.first_layer)
        unconditional = context_of("unconditional", tensors, admit.first_layer)
        if conditional is None:
            raise CodecError("a picture without a context")
        negative = None if unconditional is None else unconditional.to(self._device)
        self._admitted[admit.id] = (admit, conditional.to(self._device), negative)

    def _enter(self, enter: Enter, x_t: torch.Tensor) -> None:
        if enter.id not in self._admitted:
            raise CodecError("a picture that was not admitted")
        admit, conditional, unconditional = self._admitted[enter.id]
        solver = Solver(self._scheduler, admit.num_inference_steps, self._device)
        if enter.step >= len(solver.times) or self._transformer.group_of(solver.times[enter.step]) != self._group:
            raise CodecError(f"step {enter.step} is another group's")
        solver.seek(enter.step)
        drawing = Drawing(
            enter.id,
            x_t.to(self._device),
            solver,
            conditional,
            unconditional,
            Guidance(*admit.guidance),
            admit.preview_every,
            enter.step,
        )
        self._here[enter.id] = drawing
        self._executor.add(drawing)

    def _forget(self, id: str) -> None:
        self._executor.remove(id)
        self._admitted.pop(id, None)
        self._here.pop(id, None)

    def _moved(self, outcome: Stepped) -> Packet:
        drawing = self._here[outcome.id]
        tensors = {} if outcome.clean is None else {"clean": outcome.clean}
        if drawing.finished or self._transformer.group_of(drawing.t) != self._group:
            tensors["x_t"] = drawing.x_t
            self._forget(outcome.id)
        message = Moved(id=outcome.id, step=outcome.step, t=outcome.t, seconds=outcome.seconds, batch=outcome.batch)
        return Packet(message, tensors)

    def _dropped(self, outcome: Lost) -> Packet:
        self._forget(outcome.id)
        return Packet(Dropped(id=outcome.id, message=str(outcome.error)))


def serve(pipe: Connection, worker: StageWorker, beat: float) -> None:
    """Work until the pipe ends.

    Args:
        pipe: to the router.
        worker: what is done.
        beat: seconds after which an idle stage says that it is alive.

    Raises:
        EOFError, ConnectionError: the router is gone.
        CodecError: it says what makes no sense.
    """
    pipe.send_bytes(encode(Packet(Ready())))
    while True:
        wait = 0.0 if worker.busy else beat
        while pipe.poll(wait):
            worker.take(decode(pipe.recv_bytes(MOST_BYTES)))
            wait = 0.0
        packets = worker.advance()
        for packet in packets or [Packet(Beat())]:
            pipe.send_bytes(encode(packet))


def load(settings: StageSettings) -> StageWorker:
    """Return the worker of a stage, its group's weights loaded.

    Raises:
        UserError: the folder, or the device, is not as it has to be.
    """
    torch.set_num_threads(settings.threads)
    try:
        device = torch.empty(0, device=settings.device).device
    except (RuntimeError, AssertionError) as error:  # the latter: torch built without CUDA
        raise UserError(f"there is no device {settings.device!r} here: name others") from error
    dtype = getattr(torch, settings.dtype)
    transformer = transformer_of_group(settings.model, settings.group, dtype, device)
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(settings.scheduler)
    return StageWorker(transformer, settings.group, scheduler, EngineSettings(**settings.engine), device)  # type: ignore[arg-type]


def main() -> None:
    """Be a stage, as the command line says."""
    # A terminal's Ctrl-C goes to every process of its group: the router decides when its stages end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    settings = StageSettings.model_validate_json(sys.argv[1])
    pipe = Connection(settings.pipe)
    try:
        try:
            worker = load(settings)
        except UserError as error:
            pipe.send_bytes(encode(Packet(Refusal(message=str(error)[:4096]))))
            return
        serve(pipe, worker, settings.beat)
    except (EOFError, ConnectionError):
        return  # the router is gone


if __name__ == "__main__":
    main()
