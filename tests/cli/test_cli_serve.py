"""``latteflow serve``: what it refuses to begin with, and the process itself: ready line, logs, and how it leaves."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import openai
import pytest

PATIENCE = 60
KEY = "a-key-that-is-long-enough"
DRAW = {"prompt": "a private thing", "steps": 2}


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "pictures.example", "127.0.0.1.example"])
@pytest.mark.parametrize("ray", [[], ["--ray"]])
def test_others_are_not_let_in_without_a_key(latteflow, host, ray, monkeypatch):
    monkeypatch.delenv("LATTEFLOW_API_KEYS", raising=False)
    message = latteflow("serve", *ray, "--host", host).mistake
    assert f"--host {host} can be reached by others: give --api-key-file or LATTEFLOW_API_KEYS" in message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--api-key-file", "/nowhere/keys"], "--api-key-file /nowhere/keys cannot be read"),
        (["--model", "nonsense"], "no model 'nonsense'"),
        (["--max-batch", "0"], "max_batch has to be 1 or more: got 0"),
        (["--queue", "-1"], "max_queued_pictures has to be 1 or more: got -1"),
        (["--dtype", "int3"], "there is no dtype 'int3'"),
        (["--replicas", "2"], "--replicas is for replicas on Ray: give --ray too"),
        (["--autoscale", "1:2"], "--autoscale is for replicas on Ray: give --ray too"),
        (["--per-replica", "CPU=1"], "--per-replica is for replicas on Ray: give --ray too"),
        (["--per-stage", "CPU=1"], "--per-stage is for replicas on Ray: give --ray too"),
        (["--ray", "--per-stage", "CPU=1"], "--per-stage is for a group pipeline: give --placement pipeline"),
        (["--ray-address", "auto"], "--ray-address is for replicas on Ray: give --ray too"),
        (["--ray", "--replicas", "2", "--autoscale", "1:2"], "--replicas and --autoscale exclude each other"),
        (["--ray", "--autoscale", "2:1"], "--autoscale 2:1 is not of the form MIN:MAX"),
        (["--ray", "--autoscale", "2"], "--autoscale 2 is not of the form MIN:MAX"),
        (["--ray", "--per-replica", "CPU"], "--per-replica CPU is not of the form CPU=4,GPU=1"),
        (["--ray", "--model", "nonsense"], "no model 'nonsense'"),
        (["--ray", "--dtype", "int3"], "there is no dtype 'int3'"),
        (["--ray", "--max-batch", "0"], "max_batch has to be 1 or more: got 0"),
    ],
)
def test_a_mistake_is_one_line(latteflow, words, message):
    assert message in latteflow("serve", *words).mistake


def test_a_short_key_is_refused_and_not_repeated(latteflow, monkeypatch):
    monkeypatch.setenv("LATTEFLOW_API_KEYS", f"{KEY}, tooshort")
    message = latteflow("serve").mistake
    assert "API key 2 does not do" in message
    assert "tooshort" not in message


class Process:
    """The command, run; what it writes is gathered."""

    def __init__(self, words, **environment):
        # Without the rest of the test's environment a coverage tool or a proxy would not be missed.
        self.process = subprocess.Popen(
            [sys.executable, "-m", "latteflow", "serve", "--port", "0", "--no-page", *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        self.err = []
        self.reader = threading.Thread(target=lambda: self.err.extend(self.process.stderr), daemon=True)
        self.reader.start()
        self.url = self.process.stdout.readline().strip()

    def lines(self, message):
        return [line for line in map(json.loads, self.err) if line["message"] == message]

    def leave(self, sig=signal.SIGTERM):
        self.process.send_signal(sig)

    def code(self):
        code = self.process.wait(PATIENCE)
        self.reader.join(PATIENCE)
        return code


@contextmanager
def serving(*words, **environment):
    running = Process(words, **environment)
    try:
        yield running
    finally:
        running.process.kill()
        running.process.wait(PATIENCE)
        running.reader.join(PATIENCE)
        running.process.stdout.close()
        running.process.stderr.close()


def wait_for(condition):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_it_says_when_it_is_ready_and_leaves_in_peace(saved_pipeline, sig):
    with serving("--model", saved_pipeline) as running:
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+", running.url)
        assert httpx.get(f"{running.url}/readyz").status_code == 200
        with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
            [model] = client.models.list()
            assert model.id == saved_pipeline.name  # where it lies is nobody's business
            assert client.images.generate(prompt="a private thing", extra_body={"steps": 2}).data
        running.leave(sig)
        assert running.code() == 0
        assert running.process.stdout.read() == ""
        [request] = [line for line in running.lines("request") if line["route"] == "/v1/images/generations"]
        assert (request["status"], request["level"]) == (200, "info")
        assert [line["finished_everything"] for line in running.lines("drained")] == [True]
        assert "private" not in "".join(running.err)


@pytest.mark.slow
def test_the_page_is_there_and_behind_the_keys(saved_pipeline):
    with serving("--model", saved_pipeline, "--page", LATTEFLOW_API_KEYS=KEY) as running:
        assert httpx.get(running.url).status_code == 401
        assert 'content="latteflow"' in httpx.get(running.url, auth=("anybody", KEY)).text
        running.leave()
        assert running.code() == 0


@pytest.mark.slow
def test_what_runs_is_finished_before_it_leaves(saved_pipeline):
    with (
        serving("--model", saved_pipeline, "--drain-delay", "1.5") as running,
        httpx.Client(base_url=running.url, timeout=PATIENCE) as http,
        ThreadPoolExecutor(1) as pool,
    ):
        body = {"prompt": "x", "steps": 1000, "stream": True, "progress": True}
        with http.stream("POST", "/v1/images/generations", json=body) as answer:
            events = answer.iter_lines()
            next(events)
            running.leave()
            wait_for(lambda: httpx.get(f"{running.url}/readyz").status_code == 503)
            assert httpx.get(f"{running.url}/livez").status_code == 200
            # Until the delay is over, requests are taken as ever.
            assert pool.submit(http.post, "/v1/images/generations", json=DRAW).result().status_code == 200
            assert "image_generation.completed" in "".join(events)
        assert running.code() == 0


@pytest.mark.slow
def test_what_takes_too_long_is_told_so(saved_pipeline):
    with (
        serving("--model", saved_pipeline, "--drain", "0.2", "--queue", "10000") as running,
        httpx.stream(
            "POST",
            f"{running.url}/v1/images/generations",
            timeout=PATIENCE,
            json={"prompt": "x", "size": "128x128", "steps": 1000, "stream": True, "progress": True},
        ) as answer,
    ):
        events = answer.iter_lines()
        next(events)
        running.leave()
        last = [line for line in events if line.startswith("data: ")][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "draining"
        assert running.code() == 0
        assert [line["finished_everything"] for line in running.lines("drained")] == [False]


@pytest.mark.slow
def test_the_second_signal_is_obeyed_at_once(saved_pipeline):
    with serving("--model", saved_pipeline, "--drain-delay", "3600") as running:
        running.leave()
        wait_for(lambda: running.lines("leaving"))
        assert running.process.poll() is None
        running.leave()
        assert running.code() == 1


@pytest.mark.slow
def test_keys_are_read_and_a_taken_port_is_one_line(saved_pipeline, tmp_path):
    (tmp_path / "keys").write_text(f"{KEY}\n")
    with serving("--model", saved_pipeline, "--api-key-file", tmp_path / "keys", "--host", "0.0.0.0") as running:
        port = running.url.rpartition(":")[2]
        url = f"http://127.0.0.1:{port}/v1/models"
        assert httpx.get(url).status_code == 401
        assert httpx.get(url, headers={"authorization": f"Bearer {KEY}"}).status_code == 200
        assert httpx.get(url, headers={"host": "evil.example"}).status_code == 403
        with serving("--model", saved_pipeline, "--port", port) as second:
            assert second.code() == 2
            assert second.err[-1].startswith(f"latteflow: cannot listen on 127.0.0.1:{port}: ")
