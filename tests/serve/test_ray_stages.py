"""Expert groups as actors of their own on Ray: the pictures of one process, and a stage that dies is replaced."""

import base64
import io
import json
import os
import signal

import numpy as np
import psutil
import pytest
from engine_toys import alone
from PIL import Image
from ray_served import PATIENCE, served, wait_for

import toys
from latteflow.serve.engine.requests import DrawRequest

pytestmark = pytest.mark.slow
STAGE = "ray::StageHost"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ray") / "toy-model"
    toys.toy_pipeline().save_pretrained(folder)
    with served(folder, "--placement", "pipeline", "--per-stage", "CPU=1") as running:
        yield running


def pixels(text):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))), dtype=np.int16)


def test_stages_draw_what_one_process_draws(server):
    assert len(server.processes(STAGE)) == 2
    request = DrawRequest("a red circle, solid style", seed=3, num_inference_steps=6)
    with server.openai() as client:
        drawn = client.images.generate(prompt=request.prompt, n=2, extra_body={"seed": 3, "steps": 6}).data
        events = list(
            client.images.generate(
                prompt="blue", stream=True, partial_images=2, extra_body={"steps": 8, "progress": True}
            )
        )
    assert abs(pixels(drawn[0].b64_json) - alone(toys.toy_pipeline(), request)).max() <= 1
    assert [event.latteflow["group"] for event in events if event.type.endswith("progress")] == [0] * 4 + [1] * 4
    assert sum(event.type.endswith("partial_image") for event in events) == 2


def events_of(http, at_step=lambda step: None):
    """The events of one picture; ``at_step`` is called with every step."""
    body = {"prompt": "a red circle", "seed": 5, "steps": 500, "stream": True, "progress": True}
    with http.stream("POST", "/v1/images/generations", json=body) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: "):
                event = json.loads(line.removeprefix("data: "))
                at_step(event.get("latteflow", {}).get("step"))
                yield event


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_picture_survives_the_end_of_its_stages(server, number):
    before = set(server.processes(STAGE))
    killed = []

    def kill(step):
        if step == 20:
            for stage in before:
                os.kill(stage, number)
                killed.append(stage)

    with server.http() as http:
        expected = list(events_of(http))[-1]
        *steps, last = events_of(http, kill)
        assert len(killed) == 2
        assert (last["type"], last["b64_json"]) == ("image_generation.completed", expected["b64_json"])
        assert [event["latteflow"]["step"] for event in steps if event["type"].endswith("progress")] == [*range(1, 501)]
        wait_for(lambda: len(set(server.processes(STAGE)) - before) == 2)
        wait_for(lambda: http.get("/readyz").status_code == 200)


def test_stages_end_with_their_replica(server):
    """The last: the server is gone after it."""
    stages = server.processes(STAGE)
    [replica] = server.replicas()
    os.kill(replica, signal.SIGKILL)
    wait_for(lambda: not stages.keys() & server.processes(STAGE).keys())
    wait_for(lambda: len(server.processes(STAGE)) == 2 and replica not in server.replicas())
    everything = server.processes()
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(PATIENCE) == 0
    assert not [pid for pid in everything if psutil.pid_exists(pid)]
