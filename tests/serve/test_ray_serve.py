"""``latteflow serve --ray``: the same API from two replicas, through Ray's proxy, whatever becomes of one of them."""

import base64
import io
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import openai
import psutil
import pytest
from engine_toys import alone
from live import LEAKS
from PIL import Image
from ray_served import PATIENCE, served, wait_for

import toys
from latteflow.serve.engine.requests import DrawRequest

MODEL = "toy-model"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ray") / MODEL
    toys.toy_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(folder):
    with served(folder, "--replicas", "2", "--queue", "40", "--max-active", "4") as running:
        yield running


def pixels(text):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))), dtype=np.int16)


def test_the_official_client_is_served_by_all_replicas(server):
    request = DrawRequest("a red circle, solid style", seed=3, num_inference_steps=6)
    with server.openai() as client:
        assert [model.id for model in client.models.list()] == [MODEL]
        drawn = [
            client.images.generate(prompt=request.prompt, extra_body={"seed": 3, "steps": 6}).data[0].b64_json
            for _ in range(12)
        ]
        events = list(client.images.generate(prompt="blue", stream=True, partial_images=3, extra_body={"steps": 8}))
        said = client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "What is this?"}], max_tokens=4
        )
    assert len({pixels(text).tobytes() for text in drawn}) == 1
    assert abs(pixels(drawn[0]) - alone(toys.toy_pipeline(), request)).max() <= 1
    assert [event.type.rpartition(".")[2] for event in events] == ["partial_image"] * 3 + ["completed"]
    assert said.usage.completion_tokens == 4
    counts = [counted['latteflow_ended_total{kind="draw",outcome="finished"}'] for counted in server.metrics()]
    warm_up = 16 + 1 + 1 + 3
    assert len(counts) == 2
    assert min(counts) > warm_up
    assert sum(counts) == 2 * warm_up + 13


def test_events_come_as_they_happen(server):
    began = time.monotonic()
    with (
        server.http() as http,
        http.stream(
            "POST", "/v1/images/generations", json={"prompt": "x", "steps": 300, "stream": True, "progress": True}
        ) as answer,
    ):
        times = [time.monotonic() - began for line in answer.iter_lines() if line.startswith("event: ")]
    assert len(times) > 300
    assert times[0] < 0.5 * times[-1]


def test_keys_hosts_and_origins_are_our_own(server):
    bare = httpx.Client(base_url=server.url, timeout=PATIENCE, trust_env=False)
    with bare, server.http() as http:
        for path in ("/v1/models", "/metrics", "/openapi.json"):
            assert bare.get(path).json()["error"]["code"] == "invalid_api_key"
        answer = bare.get("/readyz")
        assert (answer.status_code, answer.json()) == (200, {"status": "ok"})
        for headers, code in (
            ({"host": "evil.example"}, "host_not_allowed"),
            ({"origin": "http://evil.example"}, "origin_not_allowed"),
        ):
            refused = http.get("/v1/models", headers=headers)
            assert (refused.status_code, refused.json()["error"]["code"]) == (403, code)


def test_errors_are_openais_and_requests_have_one_id(server):
    with server.openai() as client:
        with pytest.raises(openai.NotFoundError) as missing:
            client.images.generate(prompt="x", model="another")
        with pytest.raises(openai.BadRequestError) as refused:
            client.images.generate(prompt="x", extra_body={"steps": 0})
    assert (missing.value.code, refused.value.param) == ("model_not_found", "steps")
    with server.http() as http:
        answer = http.get("/nowhere", headers={"x-request-id": "mine"})
        assert answer.json()["error"]["code"] == "not_found"
        assert answer.headers.get_list("x-request-id") == ["mine"]
        assert not LEAKS.search(answer.text)


def test_a_burst_is_drawn_or_told_to_come_again(server):
    def draw(seed):
        with server.http() as http:
            return http.post("/v1/images/generations", json={"prompt": "x", "steps": 400, "seed": seed})

    with ThreadPoolExecutor(40) as pool:
        answers = list(pool.map(draw, range(40)))
    refused = [answer for answer in answers if answer.status_code != 200]
    assert len(answers) - len(refused) >= 4
    assert refused
    for answer in refused:
        assert answer.status_code == 429
        assert answer.json()["error"]["code"] == "queue_full"
        assert int(answer.headers["retry-after"]) >= 1
    with server.openai(max_retries=20) as client, ThreadPoolExecutor(12) as pool:
        asked = [pool.submit(client.images.generate, prompt="x", extra_body={"steps": 100}) for _ in range(12)]
        assert all(answer.result().data for answer in asked)


@pytest.mark.parametrize("stream", [True, False])
def test_whoever_leaves_has_given_up(server, stream):
    def cancelled():
        name = 'latteflow_ended_total{kind="draw",outcome="Cancelled"}'
        return sum(counted.get(name, 0) for counted in server.metrics())

    before = cancelled()
    body = {"prompt": "x", "steps": 1000, "size": "56x56", "stream": stream, "guidance": 1}
    with server.http() as http:
        if stream:
            with http.stream("POST", "/v1/images/generations", json={**body, "progress": True}) as answer:
                next(answer.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                http.post("/v1/images/generations", json=body, timeout=0.3)
    wait_for(lambda: cancelled() == before + 1)
    assert all(counted["latteflow_inflight"] == 0 for counted in server.metrics())


def test_a_replica_that_dies_is_replaced_and_requests_recover(server):
    before = server.replicas()
    assert len(before) == 2
    killed = threading.Event()

    def draw(seed):
        if seed == 8:
            os.kill(min(before), signal.SIGKILL)
            killed.set()
        return client.images.generate(prompt="x", extra_body={"seed": seed, "steps": 100})

    with server.openai(max_retries=20) as client, ThreadPoolExecutor(4) as pool:
        assert all(answer.data for answer in pool.map(draw, range(24)))
    assert killed.is_set()
    wait_for(lambda: len(server.replicas() - {min(before)}) == 2)
    wait_for(lambda: len(server.metrics()) == 2)
    with server.openai() as client:
        assert client.images.generate(prompt="x", extra_body={"steps": 2}).data


def test_what_runs_is_finished_before_it_leaves(server):
    """The last: the server is gone after it."""
    everything = server.processes()
    assert all("--disable-frontend" in words for words in everything.values() if "/dashboard.py" in words)
    body = {"prompt": "x", "steps": 1000, "stream": True, "progress": True, "guidance": 1}
    with server.http() as http, http.stream("POST", "/v1/images/generations", json=body) as answer:
        events = answer.iter_lines()
        next(events)
        server.process.send_signal(signal.SIGTERM)
        assert "image_generation.completed" in "".join(events)
    assert server.process.wait(PATIENCE) == 0
    assert not [pid for pid in everything if psutil.pid_exists(pid) and Path(f"/proc/{pid}/cmdline").read_text()]
