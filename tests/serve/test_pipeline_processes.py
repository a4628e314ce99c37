"""The group pipeline with real processes: what dies or hangs is replaced, and nobody is left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from engine_toys import running
from pipeline_toys import drawing, locally

from latteflow.errors import UserError
from latteflow.serve.engine.executor import LocalExecutor, Lost, Stepped
from latteflow.serve.engine.requests import DrawRequest, EngineFailed
from latteflow.serve.engine.settings import EngineSettings
from latteflow.serve.executors.build import build_executor
from latteflow.serve.executors.group_pipeline import GroupPipeline, Patience
from toys import toy_pipeline

pytestmark = pytest.mark.slow

LIMIT = 120
"""Seconds that nothing here takes."""
PIPELINE = EngineSettings(placement="pipeline", max_batch=3, deterministic=True)


@pytest.fixture(scope="module")
def pipe():
    return toy_pipeline(2)


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def pipeline(pipe, folder):
    executor = build_executor(folder, pipe, PIPELINE, Patience(silence=4, backoff=0.05))
    yield executor
    executor.close()


def pids(pipeline):
    return [slot.stage.pid for slot in pipeline._slots if slot.stage is not None]


def is_there(pid):
    """Whether a process runs; one that ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def eventually(condition):
    until = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def finish(pipeline, number):
    """Advance until a number of pictures are done; return their latents."""
    done, until = {}, time.monotonic() + LIMIT
    while len(done) < number:
        assert time.monotonic() < until
        outcomes = pipeline.advance()
        assert not any(isinstance(outcome, Lost) for outcome in outcomes)
        done |= {outcome.id: outcome.x_1 for outcome in outcomes if outcome.x_1 is not None}
    return done


def same(one, other):
    return set(one) == set(other) and all(torch.equal(one[id], other[id]) for id in one)


def pictures(pipe, number=4, steps=6):
    return [drawing(i, pipe, steps=steps + i, scale=(4.0, 1.0)[i % 2]) for i in range(number)]


def test_processes_draw_what_one_process_draws(pipe, pipeline):
    for each in pictures(pipe):
        pipeline.add(each)
    assert same(finish(pipeline, 4), locally(pictures(pipe), pipe, PIPELINE)[0])
    assert len(set(pids(pipeline))) == 2
    assert os.getpid() not in pids(pipeline)
    gone = pids(pipeline)
    pipeline.close()
    assert not any(map(is_there, gone))


def test_without_padding_one_picture_has_the_same_bits(pipe, folder):
    settings = EngineSettings(placement="pipeline")
    executor = build_executor(folder, pipe, settings)
    try:
        executor.add(drawing(3, pipe, steps=7))
        assert same(finish(executor, 1), locally([drawing(3, pipe, steps=7)], pipe, settings)[0])
    finally:
        executor.close()


@pytest.mark.parametrize("group", [0, 1])
@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGKILL, signal.SIGSTOP], ids=lambda by: by.name)
def test_a_stage_is_replaced_under_load(pipe, pipeline, by, group):
    expected = locally(pictures(pipe, steps=400), pipe, PIPELINE)[0]
    for each in pictures(pipe, steps=400):
        pipeline.add(each)
    until = time.monotonic() + LIMIT
    while not any(isinstance(outcome, Stepped) and outcome.group == group for outcome in pipeline.advance()):
        assert time.monotonic() < until
    victim = pids(pipeline)[group]
    os.kill(victim, by)
    assert same(finish(pipeline, 4), expected)
    assert pipeline.restarts == 1
    assert pipeline.trouble() is None
    assert not is_there(victim)


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGKILL, signal.SIGSTOP], ids=lambda by: by.name)
def test_an_idle_engine_is_not_ready_until_a_stage_is_replaced(pipe, pipeline, by):
    with running(pipe, executor=pipeline, deterministic=True, max_batch=3) as engine:
        engine.warm_up()
        before = pids(pipeline)
        assert engine.status().ready
        os.kill(before[1], by)
        eventually(lambda: not engine.status().ready)
        assert "stages 1" in engine.status().trouble
        eventually(lambda: engine.status().ready)
        ticket = engine.draw([DrawRequest("red", num_inference_steps=4)])[0]
        assert ticket.result(LIMIT).image.size == (32, 32)
        after = pids(pipeline)
        assert (after[0] == before[0], after[1] == before[1]) == (True, False)
    assert not any(map(is_there, before + after))


def test_an_idle_stage_is_not_taken_for_a_silent_one(pipeline):
    before = pids(pipeline)
    until = time.monotonic() + 8  # twice as long as silence is borne
    while time.monotonic() < until:
        pipeline.advance()
        time.sleep(0.05)
    assert pids(pipeline) == before


def test_a_crash_loop_ends(pipe, folder):
    executor = build_executor(folder, pipe, PIPELINE, Patience(deaths=2, backoff=0.01))
    executor.add(drawing(0, pipe, steps=10_000))
    victims, lost, until = set(), [], time.monotonic() + LIMIT
    while not lost:
        assert time.monotonic() < until
        lost = [outcome for outcome in executor.advance() if isinstance(outcome, Lost)]
        if executor.trouble() is None and len(victims) < 2:
            victims.add(pids(executor)[0])
            os.kill(pids(executor)[0], signal.SIGKILL)
    assert isinstance(lost[0].error, EngineFailed)
    with pytest.raises(EngineFailed):
        executor.advance()
    assert len(victims) == 2
    assert not any(map(is_there, victims))
    assert pids(executor) == []


PARENT = """
import sys, time
from latteflow.pipeline import LatteFlowPipeline
from latteflow.serve.engine.settings import EngineSettings
from latteflow.serve.executors.build import build_executor
pipe = LatteFlowPipeline.from_pretrained(sys.argv[1])
executor = build_executor(sys.argv[1], pipe, EngineSettings(placement="pipeline"))
print(*(slot.stage.pid for slot in executor._slots), flush=True)
while True:
    executor.advance()
    time.sleep(0.05)
"""


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGKILL], ids=lambda by: by.name)
def test_stages_end_with_their_parent(folder, by):
    with subprocess.Popen([sys.executable, "-c", PARENT, folder], stdout=subprocess.PIPE, text=True) as parent:
        stages = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(stages) == 2
        assert all(map(is_there, stages))
        parent.send_signal(by)
    eventually(lambda: not any(map(is_there, stages)))


def test_what_is_wrong_with_the_folder_or_a_device_is_said(pipe, tmp_path, folder):
    with pytest.raises(UserError, match="safetensors"):
        build_executor(tmp_path, pipe, PIPELINE)
    with pytest.raises(UserError, match="no device"):
        build_executor(folder, pipe, EngineSettings(placement="pipeline", devices=("cpu", "cuda:99")))


def test_auto_measures_and_takes_one_of_them(pipe, folder):
    executor = build_executor(folder, pipe, EngineSettings(placement="auto"))
    try:
        assert isinstance(executor, GroupPipeline | LocalExecutor)
        executor.add(drawing(0, pipe))
        assert finish(executor, 1)
    finally:
        executor.close()
