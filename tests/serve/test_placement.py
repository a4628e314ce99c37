"""Costs that are measured, and what is made of them: the formulas agree with a simulation of the engine's policy."""

import heapq
import itertools
import random
import statistics
from collections import deque
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from engine_toys import double_pipeline
from pipeline_toys import CPU, pipe_of

from latteflow.errors import UserError
from latteflow.models.lora import lora_config
from latteflow.serve.engine.executor import LocalExecutor
from latteflow.serve.engine.policy import choose
from latteflow.serve.engine.settings import EngineSettings
from latteflow.serve.executors import build, cost
from latteflow.serve.executors.build import build_executor, stage_devices
from latteflow.serve.executors.cost import Cost, fit, measure
from latteflow.serve.executors.placement import (
    Work,
    engines_latency,
    engines_throughput,
    pipeline_is_better,
    pipeline_latency,
    pipeline_throughput,
)
from toys import toy_pipeline

GROUPS, STEPS, MOST, DEVICES = 4, 40, 16, 4
PATIENCE = 32
"""With less than an interval's steps, gathered pictures are torn apart."""
REGIMES = {"weight-bound": Cost(3e-3, 1e-4), "balanced": Cost(3e-3, 5e-4), "compute-bound": Cost(1e-3, 4e-3)}


def work_of(each: Cost) -> list[Work]:
    return [Work(STEPS // GROUPS, each)] * GROUPS


@dataclass(eq=False)
class Simulated:
    """A picture to the policy: where it is, and since when it waits."""

    begun: float
    step: int = 0
    passed_over: int = 0

    @property
    def t(self) -> float:
        return self.step / STEPS

    @property
    def group(self) -> int:
        return self.step * GROUPS // STEPS


class Worker:
    """A process that makes forwards of ``cost`` for the pictures it has, chosen by the engine's own policy."""

    def __init__(self, cost: Cost) -> None:
        self.cost, self.pictures, self.working = cost, [], []

    def begin(self, now: float) -> float | None:
        """Begin a forward; return when it ends, None without pictures or while another runs."""
        if self.working or not self.pictures:
            return None
        self.working = choose(self.pictures, lambda picture: picture.group, max_batch=MOST, patience=PATIENCE)
        return now + self.cost.seconds(len(self.working))

    def end(self) -> list[Simulated]:
        """End the forward; return who took part."""
        worked, self.working = self.working, []
        for picture in worked:
            picture.step += 1
        return worked


class Engine:
    """Whole or of several workers; no more than a number of pictures are under way."""

    def __init__(self, cost: Cost, workers: int) -> None:
        self.waiting, self.active, self.most = deque(), 0, workers * 2 * MOST
        self.workers = [Worker(cost) for _ in range(workers)]

    def __len__(self) -> int:
        return len(self.waiting) + self.active

    def move(self, worker: Worker, picture: Simulated) -> bool:
        """Move a picture to the worker that makes its next step; return whether there is none."""
        if picture.step == STEPS:
            self.active -= 1
        elif len(self.workers) == 1 or self.workers[picture.group] is worker:
            return False
        else:
            self.workers[picture.group].pictures.append(picture)
        worker.pictures.remove(picture)
        return picture.step == STEPS

    def admit(self) -> None:
        while self.waiting and self.active < self.most:
            self.workers[0].pictures.append(self.waiting.popleft())
            self.active += 1


def simulated(cost: Cost, rate: float, *, pipeline: bool, number: int = 1500) -> tuple[float, float]:
    """Return mean latency and throughput of pictures that arrive at random."""
    chance, now, taken = random.Random(0), 0.0, []
    engines = [Engine(cost, GROUPS)] if pipeline else [Engine(cost, 1) for _ in range(DEVICES)]
    events: list[tuple[float, int, Any]] = []
    for order in range(number):
        now += chance.expovariate(rate)
        events.append((now, order, None))
    order = itertools.count(number)
    while events:
        now, _, ended = heapq.heappop(events)
        if ended is None:
            min(engines, key=len).waiting.append(Simulated(now))
        else:
            engine, worker = ended
            taken += [now - picture.begun for picture in worker.end() if engine.move(worker, picture)]
        for engine in engines:
            engine.admit()
            for worker in engine.workers:
                if (end := worker.begin(now)) is not None:
                    heapq.heappush(events, (end, next(order), (engine, worker)))
    return statistics.mean(taken), len(taken) / now


@pytest.mark.parametrize("load", [0.3, 0.7])
@pytest.mark.parametrize("regime", REGIMES)
def test_latencies_are_those_of_a_simulation(regime, load):
    cost, work = REGIMES[regime], work_of(REGIMES[regime])
    rate = load * engines_throughput(work, MOST, DEVICES)
    piped = simulated(cost, rate, pipeline=True)[0]
    whole = simulated(cost, rate, pipeline=False)[0]
    assert pipeline_latency(work, MOST, rate) == pytest.approx(piped, rel=0.15)
    assert engines_latency(work, MOST, DEVICES, rate) == pytest.approx(whole, rel=0.15)
    # One group to a device where steps are bound by weights, engines side by side where they are bound by arithmetic.
    assert (piped < whole) == (regime != "compute-bound")
    better = pipeline_is_better(work, work, most=MOST, active=2 * MOST * GROUPS, engines=DEVICES, load=load)
    assert better == (piped < whole)


@pytest.mark.parametrize("regime", REGIMES)
def test_throughputs_are_those_of_a_simulation(regime):
    cost, work = REGIMES[regime], work_of(REGIMES[regime])
    rate = 3 * engines_throughput(work, MOST, DEVICES)
    assert pipeline_throughput(work, MOST) == pytest.approx(simulated(cost, rate, pipeline=True)[1], rel=0.2)
    assert engines_throughput(work, MOST, DEVICES) == pytest.approx(simulated(cost, rate, pipeline=False)[1], rel=0.2)


def test_more_than_can_be_drawn_takes_for_ever():
    work = work_of(REGIMES["balanced"])
    assert pipeline_latency(work, MOST, 1.01 * pipeline_throughput(work, MOST)) == float("inf")
    assert pipeline_latency(work, MOST, 0.99 * pipeline_throughput(work, MOST)) < float("inf")
    assert engines_latency(work, MOST, 2, 1.01 * engines_throughput(work, MOST, 2)) == float("inf")
    assert engines_latency(work, MOST, 2, 0.99 * engines_throughput(work, MOST, 2)) < float("inf")


def test_the_slowest_stage_decides():
    work = [Work(10, Cost(1e-3, 1e-3)), Work(10, Cost(2e-3, 2e-3)), Work(0, Cost(9.0, 9.0))]
    assert pipeline_throughput(work, 4) == pytest.approx(4 / 0.1)
    assert engines_throughput(work, 4, 2) == pytest.approx(2 * 4 / 0.15)


def test_one_engine_against_stages_that_get_in_each_others_way():
    engine = work_of(Cost(1e-3, 1e-3))
    settings = {"most": 8, "active": 32, "engines": 1, "load": 0.7}
    assert pipeline_is_better(work_of(Cost(1e-3, 1e-3)), engine, **settings)
    assert not pipeline_is_better(work_of(Cost(8e-3, 8e-3)), engine, **settings)


def test_a_pipeline_needs_pictures_for_every_stage():
    stages, engine = work_of(Cost(3e-3, 1e-4)), work_of(Cost(1e-3, 1e-4))
    settings = {"most": 16, "engines": 1, "load": 0.9}
    assert pipeline_is_better(stages, engine, active=64, **settings)
    assert not pipeline_is_better(stages, engine, active=8, **settings)


def test_a_line_is_fitted():
    found = fit([1, 2, 4, 8], [0.5 + 0.25 * n for n in (1, 2, 4, 8)])
    assert (found.fixed, found.each) == pytest.approx((0.5, 0.25))
    assert found.seconds(6) == pytest.approx(2.0)
    assert fit([1, 2, 4], [0.2, 0.19, 0.18]) == Cost(pytest.approx(0.19), 0.0)
    assert fit([1, 2, 4], [0.1, 0.3, 0.7]) == Cost(0.0, pytest.approx((0.1 + 0.6 + 2.8) / 21))
    assert fit([1], [0.3]) == Cost(0.3, 0.0)


@pytest.mark.parametrize(("most", "sizes"), [(16, {1, 2, 4, 8}), (3, {1, 2}), (1, {1})])
def test_costs_are_measured_as_forwards_are_made(monkeypatch, most, sizes):
    pipe, clock, seen = toy_pipeline(4), [0.0], set()

    def step(group, x_t, *_):
        pictures = len(x_t) // 2  # guided
        seen.add((group, pictures))
        clock[0] += 0.5 + 0.25 * pictures
        return torch.zeros_like(x_t)

    monkeypatch.setattr(pipe.transformer, "step", step)
    monkeypatch.setattr(cost.time, "perf_counter", lambda: clock[0])
    found = measure(pipe.transformer, 2, pipe.scheduler, EngineSettings(max_batch=most), CPU)
    expected = (0.75, 0.0) if most == 1 else (0.5, 0.25)
    assert (found.fixed, found.each) == pytest.approx(expected)
    assert seen == {(2, size) for size in sizes}


def test_a_group_without_steps_costs_nothing():
    pipe = toy_pipeline(2, intervals=[0.0, 0.9999, 1.0])
    assert measure(pipe.transformer, 1, pipe.scheduler, EngineSettings(), CPU) == Cost(0.0, 0.0)


@pytest.mark.parametrize("better", [True, False])
def test_auto_takes_what_is_better_and_ends_the_other(monkeypatch, better):
    class Pipeline:
        closed = False

        def measure(self):
            return [Cost(1e-4, 1e-4) if better else Cost(1.0, 1.0)] * 4

        def close(self):
            self.closed = True

    pipe, pipeline = pipe_of(), Pipeline()
    monkeypatch.setattr(build, "start_pipeline", lambda *_: pipeline)
    monkeypatch.setattr(build, "measure", lambda *_: Cost(1e-3, 1e-3))
    found = build_executor("folder", pipe, EngineSettings(placement="auto"))
    assert (found is pipeline) == better == (not pipeline.closed)
    assert isinstance(found, LocalExecutor) == (not better)


@pytest.mark.parametrize("scheduler", ["heun", "dpm++", "unipc"])
def test_solvers_that_remember_stay_in_one_process(scheduler):
    pipe = double_pipeline(scheduler=scheduler)
    with pytest.raises(UserError, match="use the euler solver"):
        build_executor("folder", pipe, EngineSettings(placement="pipeline"))
    for placement in ("auto", "local"):
        assert isinstance(build_executor("folder", pipe, EngineSettings(placement=placement)), LocalExecutor)


@pytest.mark.parametrize("change", ["adapter", "quantisation"])
def test_weights_that_no_folder_holds_stay_in_one_process(monkeypatch, change):
    pipe = toy_pipeline(4)
    if change == "adapter":
        pipe.transformer.add_adapter(lora_config(pipe.transformer, 2))
    else:
        monkeypatch.setattr(build, "quantization_of", lambda *parts: "int8" if parts == (pipe.transformer,) else None)
    with pytest.raises(UserError, match="plain weights"):
        build_executor("folder", pipe, EngineSettings(placement="pipeline"))
    assert isinstance(build_executor("folder", pipe, EngineSettings(placement="auto")), LocalExecutor)


def test_devices_are_one_or_one_for_each_group():
    pipe = pipe_of()
    assert stage_devices((), pipe) == ["cpu"] * 4
    assert stage_devices(("cuda:1",), pipe) == ["cuda:1"] * 4
    assert stage_devices(("cuda:0", "cuda:1", "cpu", "cpu"), pipe) == ["cuda:0", "cuda:1", "cpu", "cpu"]
    with pytest.raises(UserError, match="2 devices for 4 groups"):
        stage_devices(("cpu", "cpu"), pipe)
    with pytest.raises(UserError, match="gpu: no devices"):
        stage_devices(("gpu",), pipe)


def test_stages_that_share_a_device_take_turns():
    assert build.sharing(["cpu"] * 4, 2) == [2.0] * 4
    assert build.sharing(["cpu"] * 4, 16) == [1.0] * 4
    assert build.sharing(["cuda:0", "cuda:0", "cuda:1", "cpu"], 1) == [2.0, 2.0, 1.0, 1.0]


@pytest.mark.parametrize("settings", [{"placement": "remote"}, {"load": 0.0}, {"load": 1.0}, {"load": float("nan")}])
def test_settings_that_cannot_be_are_refused(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        EngineSettings(**settings)
