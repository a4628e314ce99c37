"""Pictures over HTTP, as the official client asks for them."""

import base64
import io
import json

import numpy as np
import openai
import pytest
from fake_engine import noise
from PIL import Image

import latteflow

PROMPT = "a red círcle ☕\nin two lines"


def opened(text):
    image = Image.open(io.BytesIO(base64.b64decode(text, validate=True)))
    image.load()
    return image


def same(image, drawn):
    return np.array_equal(np.asarray(image), np.asarray(drawn))


def test_a_picture_carries_what_it_was_drawn_from(server, client):
    extra = {"seed": 5, "num_inference_steps": 3, "guidance_scale": 2.5, "negative_prompt": "blue", "timeout": 20}
    answer = client.images.generate(prompt=PROMPT, model="toy", size="48x32", extra_body=extra)
    [asked], [data] = server.engine.seen, answer.data
    assert (asked.prompt, asked.seed, asked.num_inference_steps, asked.guidance_scale) == (PROMPT, 5, 3, 2.5)
    assert (asked.negative_prompt, asked.width, asked.height, asked.timeout) == ("blue", 48, 32, 20)
    assert asked.preview_every == 0
    image = opened(data.b64_json)
    assert image.format == "PNG"
    assert same(image, noise(asked, 0))
    assert (data.seed, data.revised_prompt, data.url) == (5, None, None)
    assert (answer.size, answer.output_format) == ("48x32", "png")
    assert (answer.usage.input_tokens, answer.usage.output_tokens, answer.usage.total_tokens) == (7, 24, 31)
    software = f"latteflow {latteflow.__version__}"
    record = {"prompt": PROMPT, "seed": 5, "steps": 3, "guidance": 2.5, "model": "toy", "negative_prompt": "blue"}
    record["size"] = "48x32"
    text = image.text
    assert json.loads(text.pop("latteflow")) == {**record, "version": latteflow.__version__}
    assert text.pop("parameters") == (
        f"{PROMPT}\nNegative prompt: blue\n"
        f"Steps: 3, CFG scale: 2.5, Seed: 5, Size: 48x32, Model: toy, Version: {software}"
    )
    assert text == {**{name: str(value) for name, value in record.items()}, "software": software}


def test_several_pictures_have_the_seeds_that_follow(server, client):
    answer = client.images.generate(prompt="x", n=3, extra_body={"seed": 7, "steps": 1, "guidance": 1})
    assert [data.seed for data in answer.data] == [7, 8, 9]
    assert [asked.seed for asked in server.engine.seen] == [7, 8, 9]
    for data, asked in zip(answer.data, server.engine.seen, strict=True):
        assert same(opened(data.b64_json), noise(asked, 0))
        assert (asked.num_inference_steps, asked.guidance_scale, asked.width, asked.height) == (1, 1.0, 32, 32)


def test_a_seed_left_out_is_told(server, client):
    seeds = [client.images.generate(prompt="x", extra_body={"steps": 1}).data[0].seed for _ in range(2)]
    assert seeds == [asked.seed for asked in server.engine.seen]
    assert seeds[0] != seeds[1]


@pytest.mark.parametrize("kind", ["png", "webp", "jpeg"])
def test_formats(server, client, kind):
    answer = client.images.generate(
        prompt=PROMPT, output_format=kind, output_compression=30, extra_body={"seed": 1, "steps": 1}
    )
    image = opened(answer.data[0].b64_json)
    assert (image.format, answer.output_format) == (kind.upper(), kind)
    if kind != "png":
        comment = image.getexif().get_ifd(0x8769)[0x9286]
        assert comment.startswith(b"UNICODE\0")
        assert comment[8:].decode("utf-16-be").startswith(f"{PROMPT}\nSteps: 1, ")
        best = client.images.generate(
            prompt=PROMPT, output_format=kind, output_compression=100, extra_body={"seed": 1, "steps": 1}
        )
        assert len(best.data[0].b64_json) > len(answer.data[0].b64_json)


def test_a_url_holds_the_picture(client):
    data = client.images.generate(prompt="x", response_format="url", output_format="webp").data[0]
    head, _, text = data.url.partition(",")
    assert head == "data:image/webp;base64"
    assert opened(text).format == "WEBP"
    assert data.b64_json is None


def test_fields_without_effect_are_named(client):
    raw = client.images.with_raw_response.generate(
        prompt="x", quality="high", background="transparent", user="me", moderation="low", extra_body={"steps": 1}
    )
    assert raw.headers["x-latteflow-ignored"] == "background, moderation, quality, user"
    raw = client.images.with_raw_response.generate(prompt="x", extra_body={"steps": 1, "style": None})
    assert "x-latteflow-ignored" not in raw.headers


@pytest.mark.parametrize("partial", [0, 1, 2, 3])
@pytest.mark.parametrize("steps", [2, 9, 40])
def test_a_stream_shows_previews_and_then_the_picture(server, client, partial, steps):
    stream = client.images.generate(
        prompt=PROMPT, stream=True, partial_images=partial, extra_body={"seed": 4, "steps": steps}
    )
    *previews, last = list(stream)
    [asked] = server.engine.seen
    assert len(previews) == min(partial, steps)
    for number, event in enumerate(previews):
        assert (type(event).__name__, event.type) == ("ImageGenPartialImageEvent", "image_generation.partial_image")
        assert event.partial_image_index == number
        assert opened(event.b64_json).size == (32, 32)
        assert not hasattr(event, "latteflow")
    assert (type(last).__name__, last.type) == ("ImageGenCompletedEvent", "image_generation.completed")
    assert same(opened(last.b64_json), noise(asked, 0))
    assert json.loads(opened(last.b64_json).text["latteflow"])["prompt"] == PROMPT
    assert (last.seed, last.size, last.output_format, last.usage.output_tokens) == (4, "32x32", "png", 16)


def test_progress_says_which_expert_ran(client):
    stream = client.images.generate(
        prompt="x", stream=True, partial_images=1, extra_body={"steps": 4, "progress": True}
    )
    events = list(stream)
    steps = [event.latteflow for event in events if event.type == "image_generation.progress"]
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    assert [step["group"] for step in steps] == [0, 0, 1, 1]
    assert all(set(step) == {"step", "steps", "group", "t", "seconds", "batch"} for step in steps)
    [preview] = [event for event in events if event.type == "image_generation.partial_image"]
    assert preview.latteflow["step"] == 2
    assert events[-1].type == "image_generation.completed"


def test_who_waits_is_told_how_many_are_before(server, client, http):
    server.engine.going.clear()
    body = {"prompt": "x", "steps": 1, "stream": True, "progress": True}
    with http.stream("POST", "/v1/images/generations", json=body) as first:
        lines = first.iter_lines()  # which closes the connection when it is dropped
        assert '"ahead": 0' in next(line for line in lines if line.startswith("data: "))
        stream = iter(client.images.generate(prompt="x", stream=True, extra_body={"steps": 1, "progress": True}))
        for _ in range(2):  # at once, and again after a second
            event = next(stream)
            assert (event.type, event.latteflow) == ("image_generation.queued", {"ahead": 1})
        server.engine.going.set()
        assert [event.type for event in stream][-1] == "image_generation.completed"


def test_what_fails_in_a_stream_is_an_error_of_the_client(server, client):
    from latteflow.serve.engine.requests import EngineFailed

    server.engine.fails = EngineFailed("the stage at 10.0.0.1 is gone")
    with pytest.raises(openai.APIError, match="the engine broke down: ask again") as caught:
        list(client.images.generate(prompt="x", stream=True))
    assert caught.value.code == "engine_failed"


BAD = [
    ({"prompt": ""}, "prompt"),
    ({"prompt": "  \n"}, "prompt"),
    ({"prompt": "x" * 8001}, "prompt"),
    ({"prompt": 3}, "prompt"),
    ({"prompt": ["x"]}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": "\ud800"}, "prompt"),
    *(({"n": value}, "n") for value in (0, -1, 11, 10**30, 1.5, True, "1", [1])),
    *(
        ({"size": value}, "size")
        for value in ("", "64", "64x", "x", "1e3x64", "64X64", "-8x8", "100000x8", "6٤x64", "0x0", "064x64", 64)
    ),
    *(({"steps": value}, "steps") for value in (0, -3, 1001, 2.5, True, "4")),
    *(({"num_inference_steps": value}, "num_inference_steps") for value in (0, 10**400)),
    *(({"guidance": value}, "guidance") for value in (-0.1, 100.5, float("nan"), float("inf"), True, "1e3")),
    *(({"guidance_scale": value}, "guidance_scale") for value in (float("-inf"), "4")),
    *(({"seed": value}, "seed") for value in (-1, 2**63, 1.0, True, "5")),
    *(({"timeout": value}, "timeout") for value in (0, -1, float("nan"), 10**9, "5")),
    ({"response_format": "png"}, "response_format"),
    ({"output_format": "../../etc/passwd"}, "output_format"),
    ({"output_format": "gif"}, "output_format"),
    ({"output_compression": 101}, "output_compression"),
    ({"stream": "yes"}, "stream"),
    ({"stream": 1}, "stream"),
    ({"stream": True, "partial_images": 4}, "partial_images"),
    ({"partial_images": 1}, None),
    ({"progress": True}, None),
    ({"stream": True, "n": 2}, None),
    ({"steps": 3, "num_inference_steps": 3}, None),
    ({"negative_prompt": 5}, "negative_prompt"),
    ({"perf_dump_path": "/etc/x"}, "perf_dump_path"),
    ({"code_revision": "main"}, "code_revision"),
    ({"size": "33x32"}, None),
    ({"size": "4096x4096"}, None),
    ({"size": "2048x2048", "steps": 1000}, None),
]


@pytest.mark.parametrize(("fields", "param"), BAD, ids=lambda value: str(value)[:50])
def test_a_mistake_is_named_and_nothing_is_drawn(server, http, fields, param):
    body = json.dumps({"prompt": "x", "steps" if "num_inference_steps" not in fields else "n": 1, **fields})
    answer = http.post("/v1/images/generations", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    if param is not None:
        assert error["param"] == param
    assert server.engine.seen == []


def test_the_client_says_what_was_wrong(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(prompt="")
    assert (caught.value.param, caught.value.code, caught.value.type) == (
        "prompt",
        "invalid_value",
        "invalid_request_error",
    )
    with pytest.raises(openai.NotFoundError) as caught:
        client.images.generate(prompt="x", model="dall-e-3")
    assert (caught.value.param, caught.value.code) == ("model", "model_not_found")
    with pytest.raises(openai.BadRequestError, match="there is no parameter 'latents'"):
        client.images.generate(prompt="x", extra_body={"latents": [1.0]})
