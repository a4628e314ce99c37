"""Stages as actors, with the actors in this process: what is said, in which order, and what becomes of a lost one."""

import threading
import time
from types import SimpleNamespace

import pytest
import torch
from pipeline_toys import CPU, drawing, drawn, locally, pipe_of

from latteflow.errors import UserError
from latteflow.serve.engine.settings import EngineSettings
from latteflow.serve.executors.group_pipeline import GroupPipeline, Patience
from latteflow.serve.executors.stage import StageSettings, StageWorker

pytest.importorskip("ray")

from ray.exceptions import ActorDiedError

from latteflow.serve.deploy import stage_actor
from latteflow.serve.deploy.stage_actor import StageActor

SETTINGS = EngineSettings(max_batch=3, deterministic=True)
AT_ONCE = Patience(silence=60, start=60, deaths=1000, window=60, backoff=0)


class Method:
    def __init__(self, handle, name):
        self.handle, self.name = handle, name

    def remote(self, *given):
        assert all(isinstance(each, str | list) for each in given)
        return lambda: self.handle.call(self.name, given)


class Handle:
    """An actor of this process, which dies when it is told to."""

    def __init__(self, host):
        self.host, self.dead, self.calls = host, threading.Event(), []
        self.load, self.work = Method(self, "load"), Method(self, "work")

    def call(self, name, given):
        if not self.dead.is_set():
            said = getattr(self.host, name)(*given)
            self.calls.append((name, given))
        if self.dead.is_set():
            raise ActorDiedError
        return said


@pytest.fixture
def actors(monkeypatch):
    """Ray without Ray: ``actors.handles`` are the actors, ``actors.options`` what they were asked for with."""
    found = SimpleNamespace(handles=[], options=[], refuses=None)
    pipe = pipe_of(4)

    def load(settings):
        if found.refuses is not None:
            raise UserError(found.refuses)
        return StageWorker(pipe.transformer, settings.group, pipe.scheduler, SETTINGS, CPU)

    def remote(host):
        def made():
            found.handles.append(Handle(host()))
            return found.handles[-1]

        def options(**given):
            found.options.append(given)
            return SimpleNamespace(remote=made)

        return SimpleNamespace(options=options)

    ray = SimpleNamespace(remote=remote, get=lambda call: call(), kill=lambda handle: handle.dead.set())
    monkeypatch.setattr(stage_actor, "ray", ray)
    monkeypatch.setattr(stage_actor, "load", load)
    return found


@pytest.fixture
def pipeline(actors):
    def start(group, inbox):
        settings = StageSettings(
            model="folder",
            group=group,
            device="cpu",
            dtype="float32",
            threads=1,
            scheduler={},
            engine={},
            beat=0.02,
            pipe=-1,
        )
        return StageActor(settings, inbox, {"CPU": 2, "GPU": 0.5, "big": 1})

    made = GroupPipeline(pipe_of(4).transformer, start, AT_ONCE)
    yield made
    made.close()
    assert all(handle.dead.is_set() for handle in actors.handles)


def pictures():
    return [drawing(number, pipe_of(4), steps=8, preview_every=2) for number in range(3)]


def same(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[id], expected[id]) for id in expected)


def test_actors_draw_to_the_bits_of_one_process(actors, pipeline):
    pipeline.wait_until_ready()
    found, outcomes = drawn(pipeline, pictures())
    expected, _ = locally(pictures(), pipe_of(4), SETTINGS)
    assert same(found, expected)
    assert {outcome.group for outcome in outcomes} == {0, 1, 2, 3}
    assert actors.options[0] == {"num_cpus": 2, "num_gpus": 0.5, "resources": {"big": 1}, "max_restarts": 0}
    assert all(
        isinstance(data, bytes) for handle in actors.handles for name, (heard, *_) in handle.calls[1:] for data in heard
    )


def test_an_actor_that_dies_is_replaced_and_its_pictures_finish(actors, pipeline):
    pipeline.wait_until_ready()
    expected, _ = locally(pictures(), pipe_of(4), SETTINGS)
    for each in pictures():
        pipeline.add(each)
    outcomes = []
    while not outcomes:
        outcomes += pipeline.advance()
    for handle in list(actors.handles):
        handle.dead.set()
    for _ in range(10_000):
        outcomes += pipeline.advance()
        finished = {outcome.id: outcome.x_1 for outcome in outcomes if outcome.x_1 is not None}
        if len(finished) == 3:
            break
    assert same(finished, expected)
    assert pipeline.restarts == 4
    assert len(actors.handles) == 8


def test_an_idle_actor_is_asked_whether_it_lives(actors, pipeline):
    pipeline.wait_until_ready()
    time.sleep(0.1)
    stage = pipeline._slots[0].stage
    assert len(actors.handles[0].calls) > 2
    assert stage.silent_for < 10
    actors.handles[0].dead.set()
    end = time.monotonic() + 30
    while pipeline.restarts == 0:
        assert time.monotonic() < end
        pipeline.advance()
    pipeline.wait_until_ready()


def test_what_an_actor_refuses_is_said(actors, pipeline):
    actors.refuses = "there is no such folder"
    with pytest.raises(UserError, match="there is no such folder"):
        pipeline.wait_until_ready()


def test_the_end_is_heard(actors, pipeline):
    pipeline.wait_until_ready()
    stage = pipeline._slots[0].stage
    stage.end()
    end = time.monotonic() + 30
    while pipeline.restarts == 0:
        assert time.monotonic() < end
        pipeline.advance()
    assert stage is not pipeline._slots[0].stage
