"""Group pipelines on toys: stages in this process that can die at any moment, and pictures to draw."""

import functools
from collections import deque
from typing import Any

import torch

from latteflow.flow.guidance import Guidance
from latteflow.flow.noise import initial_noise
from latteflow.serve.engine.drawing import Drawing, Solver
from latteflow.serve.engine.executor import LocalExecutor, Stepped
from latteflow.serve.engine.settings import EngineSettings
from latteflow.serve.executors.codec import Packet, Ready, decode, encode
from latteflow.serve.executors.group_pipeline import GroupPipeline, Patience
from latteflow.serve.executors.stage import StageWorker
from latteflow.serve.executors.stage_process import Report
from toys import toy_pipeline

CPU = torch.device("cpu")
READY = Packet(Ready())
AT_ONCE = Patience(silence=60, start=60, deaths=1000, window=60, backoff=0)


@functools.cache
def pipe_of(num_groups: int = 4) -> Any:
    """A toy that tests only read."""
    return toy_pipeline(num_groups)


@functools.cache
def context_of_prompt(num_groups: int, prompt: str) -> Any:
    return pipe_of(num_groups).encode_prompt([prompt])


def drawing(number: int, pipe: Any, *, steps: int = 6, scale: float = 4.0, preview_every: int = 0) -> Drawing:
    """Picture ``number``: seed, prompt and guidance are its own."""
    groups = pipe.transformer.config.num_groups
    x_t = initial_noise((4, 4, 4), 1, torch.Generator().manual_seed(number))
    context = context_of_prompt(groups, ("a red circle", "blue", "the green square, outline style")[number % 3])
    negative = None if scale == 1 else context_of_prompt(groups, "")
    solver = Solver(pipe.scheduler, steps, CPU)
    return Drawing(f"picture {number}", x_t, solver, context, negative, Guidance(scale, 0.2, 0.9), preview_every)


def drawn(executor: Any, drawings: list[Drawing], *, turns: int = 10_000) -> tuple[dict[str, Any], list[Stepped]]:
    """Have an executor draw pictures; return the latents of each, and all outcomes."""
    outcomes = []
    for each in drawings:
        executor.add(each)
    for _ in range(turns):
        outcomes += executor.advance()
        if sum(isinstance(outcome, Stepped) and outcome.x_1 is not None for outcome in outcomes) == len(drawings):
            break
    return {outcome.id: outcome.x_1 for outcome in outcomes if outcome.x_1 is not None}, outcomes


def locally(drawings: list[Drawing], pipe: Any, settings: EngineSettings) -> tuple[dict[str, Any], list[Stepped]]:
    return drawn(LocalExecutor(pipe.transformer, settings), drawings)


class FakeStage:
    """A stage without a process: it works when it is told to, and dies when it is told to."""

    def __init__(self, group: int, inbox: Any, pipe: Any, settings: EngineSettings, first_word: Packet) -> None:
        self.group, self.alive, self.ended = group, True, False
        self.silent_for = 0.0
        self.heard: deque[bytes] = deque()
        self.said: list[Packet] = []
        self._inbox = inbox
        self._worker = StageWorker(pipe.transformer, group, pipe.scheduler, settings, CPU)
        self._say(first_word)

    def send(self, packet: Packet) -> None:
        if self.alive:
            self.heard.append(encode(packet))

    def end(self) -> None:
        self.ended = True

    def kill(self, grace: float = 0.0) -> None:
        self.die()

    def die(self) -> None:
        """As if by a signal: the pipe's end is heard of."""
        if self.alive:
            self.alive = False
            self._inbox.put(Report(self, None))

    def work(self) -> None:
        """Hear what was said, and make a forward."""
        if self.alive:
            while self.heard:
                self._worker.take(decode(self.heard.popleft()))
            for packet in self._worker.advance():
                self._say(packet)

    def _say(self, packet: Packet) -> None:
        self.said.append(packet)
        self._inbox.put(Report(self, decode(encode(packet))))


class FakePipeline(GroupPipeline):
    """A group pipeline of fake stages, which work whenever it advances."""

    def __init__(
        self, pipe: Any, settings: EngineSettings, patience: Patience = AT_ONCE, first_word: Packet = READY
    ) -> None:
        self.stages: dict[int, FakeStage] = {}
        self.started: list[FakeStage] = []

        def start(group: int, inbox: Any) -> FakeStage:
            stage = FakeStage(group, inbox, pipe, settings, first_word)
            self.stages[group] = stage
            self.started.append(stage)
            return stage

        super().__init__(pipe.transformer, start, patience)
        self.wait_until_ready()

    def advance(self, wait: float | None = None) -> Any:
        for stage in list(self.stages.values()):
            stage.work()
        return super().advance(0.0)
