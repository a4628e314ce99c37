"""The API in front of the real engine, on a toy model: what comes over HTTP is what the pipeline makes."""

import base64
import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from engine_toys import alone
from live import live, wait_for
from PIL import Image

import toys
from latteflow.serve.api.metrics import Metrics
from latteflow.serve.engine.engine import Engine
from latteflow.serve.engine.requests import DrawRequest
from latteflow.serve.engine.settings import EngineSettings


@pytest.fixture(scope="module")
def served():
    metrics = Metrics()
    with live(Engine(toys.toy_pipeline(), EngineSettings(max_queued_pictures=16), metrics), metrics=metrics) as server:
        yield server


def pixels(text):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))), dtype=np.int16)


def test_pictures_are_the_pipelines_own(served):
    with served.openai() as client:
        answer = client.images.generate(
            prompt="a red circle, solid style",
            n=2,
            size="40x24",
            extra_body={"seed": 3, "steps": 6, "guidance": 2.0, "negative_prompt": "blue"},
        )
    for i, data in enumerate(answer.data):
        request = DrawRequest(
            "a red circle, solid style", "blue", 3 + i, height=24, width=40, num_inference_steps=6, guidance_scale=2.0
        )
        assert abs(pixels(data.b64_json) - alone(toys.toy_pipeline(), request)).max() <= 1


def test_previews_and_steps_of_the_real_engine(served):
    with served.openai() as client:
        events = list(
            client.images.generate(
                prompt="blue", stream=True, partial_images=3, extra_body={"steps": 8, "seed": 1, "progress": True}
            )
        )
    kinds = [event.type.rpartition(".")[2] for event in events]
    assert (kinds.count("progress"), kinds.count("partial_image"), kinds[-1]) == (8, 3, "completed")
    assert [event.latteflow["group"] for event in events if event.type.endswith("progress")] == [0] * 4 + [1] * 4


def test_answers_are_the_pipelines_own(served):
    picture = toys.toy_picture("circle", "red", "solid")
    url = "data:image/png;base64," + base64.b64encode(toys.png_bytes(picture)).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is this?"}]
    messages = [{"role": "user", "content": content}]
    with served.openai() as client:
        answer = client.chat.completions.create(model="toy", messages=messages, max_tokens=8)
        chunks = list(client.chat.completions.create(model="toy", messages=messages, max_tokens=8, stream=True))
    asked = [
        {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What is this?"}]}
    ]
    expected = toys.toy_pipeline().chat(asked, max_new_tokens=8)["content"][0]["text"]
    assert answer.choices[0].message.content == expected
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert streamed.strip() == expected
    assert chunks[-1].choices[0].finish_reason == answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 8


def test_a_turn_that_is_drawn(served):
    with served.openai() as client:
        message = (
            client.chat.completions.create(
                model="toy",
                messages=[{"role": "user", "content": "blue"}],
                modalities=["image"],
                seed=2,
                extra_body={"steps": 4, "guidance": 1},
            )
            .choices[0]
            .message
        )
    drawn = pixels(message.content[0]["image_url"]["url"].partition(",")[2])
    request = DrawRequest("blue", seed=2, num_inference_steps=4, guidance_scale=1.0)
    assert abs(drawn - alone(toys.toy_pipeline(), request)).max() <= 1


def test_five_times_the_load_is_drawn_or_sent_away(served):
    body = {"prompt": "x", "steps": 40}
    with served.http() as http, ThreadPoolExecutor(80) as pool:
        answers = list(
            pool.map(lambda seed: http.post("/v1/images/generations", json={**body, "seed": seed}), range(80))
        )
    codes = [answer.status_code for answer in answers]
    assert codes.count(200) >= 16
    assert codes.count(200) + codes.count(429) == 80
    status = served.engine.status()
    assert (status.active, status.queued, status.queued_work) == (0, 0, 0)


def test_whoever_leaves_frees_the_engine(served):
    body = {"prompt": "x", "steps": 600, "stream": True}
    for _ in range(3):
        with (
            served.http() as http,
            http.stream("POST", "/v1/images/generations", json=body) as answer,
        ):
            assert answer.status_code == 200
        wait_for(lambda: served.engine.status().active == 0)
    with served.openai() as client:
        client.images.generate(prompt="x", extra_body={"steps": 2})


def test_metrics_of_the_real_engine(served):
    with served.http() as http:
        text = http.get("/metrics").text
    assert 'latteflow_step_seconds_count{group="1"}' in text
    assert 'latteflow_ended_total{kind="draw",outcome="finished"}' in text
    assert 'latteflow_ended_total{kind="chat",outcome="finished"}' in text
