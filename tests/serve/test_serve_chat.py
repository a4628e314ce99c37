"""Conversations over HTTP, as the official client holds them."""

import base64
import inspect
import io
import json

import openai
import pytest
from fake_engine import ANSWER, noise
from PIL import Image

import toys
from latteflow.serve.api.schemas import ChatBody, ImageBody

WORDS = [{"role": "user", "content": "What is this?"}]


def data_url(image, kind="png"):
    buffer = io.BytesIO()
    image.save(buffer, format=kind.upper())
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def showing(*urls, words="What is this?"):
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": words}]}]


def test_words_and_a_picture_go_in_and_words_come_out(server, client):
    picture = toys.toy_picture("circle", "red", "solid")
    messages = [{"role": "developer", "content": "Be brief."}, *showing(data_url(picture))]
    answer = client.chat.completions.create(
        model="toy", messages=messages, temperature=0.5, top_p=0.9, seed=3, max_completion_tokens=100
    )
    [asked] = server.engine.seen
    assert (asked.temperature, asked.top_p, asked.seed, asked.max_new_tokens) == (0.5, 0.9, 3, 100)
    system, user = asked.messages
    assert system == {"role": "system", "content": "Be brief."}
    image, text = user["content"]
    assert (image["type"], image["image"].tobytes()) == ("image", picture.tobytes())
    assert text == {"type": "text", "text": "What is this?"}
    [choice] = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == (
        "assistant",
        "".join(ANSWER),
        "stop",
    )
    assert (answer.object, answer.model) == ("chat.completion", "toy")
    assert answer.id.startswith("chatcmpl-")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (9, 5, 14)


def test_defaults_are_greedy_and_bounded(server, client):
    client.chat.completions.create(model="toy", messages=WORDS)
    [asked] = server.engine.seen
    assert (asked.temperature, asked.top_p, asked.seed, asked.max_new_tokens) == (0.0, 1.0, 0, 512)


def test_a_long_answer_is_cut(client):
    answer = client.chat.completions.create(model="toy", messages=WORDS, max_tokens=2)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("a red ", "length")


def test_a_stream_of_words(client):
    chunks = list(
        client.chat.completions.create(model="toy", messages=WORDS, stream=True, stream_options={"include_usage": True})
    )
    assert {type(chunk).__name__ for chunk in chunks} == {"ChatCompletionChunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    first, *middle, end, usage = chunks
    assert first.choices[0].delta.role == "assistant"
    assert [chunk.choices[0].delta.content for chunk in middle] == ANSWER
    assert end.choices[0].finish_reason == "stop"
    assert (usage.choices, usage.usage.total_tokens) == ([], 14)
    for options in ({}, {"stream_options": {"include_usage": False}}):
        without = list(client.chat.completions.create(model="toy", messages=WORDS, stream=True, **options))
        assert len(without) == len(chunks) - 1


def test_a_stream_ends_as_clients_expect(http):
    body = {"messages": WORDS, "stream": True}
    with http.stream("POST", "/v1/chat/completions", json=body) as answer:
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert answer.headers["cache-control"] == "no-store"
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert all(line.startswith("data: ") for line in lines)


def test_the_next_turn_can_be_drawn_and_spoken_of(server, client):
    answer = client.chat.completions.create(
        model="toy",
        messages=[{"role": "user", "content": "a red circle"}],
        modalities=["image"],
        seed=6,
        extra_body={"size": "16x16", "steps": 2, "guidance": 3.0},
    )
    [asked] = server.engine.seen
    assert (asked.seed, asked.width, asked.num_inference_steps, asked.guidance_scale) == (6, 16, 2, 3.0)
    assert asked.prompt == [{"role": "user", "content": "a red circle"}]
    message = answer.choices[0].message
    [part] = message.content
    url = part["image_url"]["url"]
    image = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    image.load()
    assert image.tobytes() == noise(asked, 0).tobytes()
    assert json.loads(image.text["latteflow"])["prompt"] == "a red circle"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (7, 4)
    # The whole message goes back as it came.
    history = [{"role": "user", "content": "a red circle"}, message.model_dump(warnings=False), *WORDS]
    client.chat.completions.create(model="toy", messages=history)
    drawn = server.engine.seen[1].messages[1]["content"][0]["image"]
    assert drawn.tobytes() == image.tobytes()


def test_a_drawn_turn_streams(client):
    chunks = list(
        client.chat.completions.create(
            model="toy", messages=WORDS, modalities=["image"], stream=True, extra_body={"steps": 1}
        )
    )
    [picture] = [chunk for chunk in chunks if chunk.choices[0].delta.content]
    assert picture.choices[0].delta.content[0]["image_url"]["url"].startswith("data:image/png;base64,")
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_fields_without_effect_are_named(client):
    raw = client.chat.completions.with_raw_response.create(
        model="toy", messages=WORDS, logprobs=True, tools=[], user="me", frequency_penalty=1.0
    )
    assert raw.headers["x-latteflow-ignored"] == "frequency_penalty, logprobs, tools, user"


def test_every_field_of_the_client_is_known(client):
    """What OpenAI's newest client can send is honoured, named as without effect, or refused in its own words."""
    for call, body in ((client.images.generate, ImageBody), (client.chat.completions.create, ChatBody)):
        options = {"extra_headers", "extra_query", "extra_body", "timeout"}  # of the client itself
        assert set(inspect.signature(call).parameters) - options <= set(body.model_fields)


SYSTEM = [{"role": "system", "content": "x"}]
BAD = [
    ({"messages": []}, "messages"),
    ({"messages": SYSTEM}, None),
    ({"messages": [*WORDS, {"role": "assistant", "content": "a"}]}, None),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": "user", "content": None}]}, None),
    ({"messages": [{"role": "user", "content": []}]}, None),
    ({"messages": [{"role": "user", "content": [{"type": "video_url", "url": "x"}]}]}, None),
    ({"messages": [{"role": "user", "content": "x" * 32001}]}, None),
    ({"messages": [{"role": "user", "content": "x" * 30000}] * 2}, None),
    ({"messages": WORDS * 129}, "messages"),
    ({"messages": [{**WORDS[0], "image": "/etc/passwd"}]}, "messages.0.image"),
    ({"n": 2}, "n"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": float("nan")}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 4097}, "max_tokens"),
    ({"max_tokens": 5, "max_completion_tokens": 5}, None),
    ({"modalities": ["audio"]}, "modalities.0"),
    ({"modalities": ["text", "image"]}, "modalities"),
    ({"size": "32x32"}, None),
    ({"stop": ["\n"]}, None),
    ({"mm_processor_kwargs": {}}, "mm_processor_kwargs"),
]


@pytest.mark.parametrize(("fields", "param"), BAD, ids=lambda value: str(value)[:50])
def test_a_mistake_is_named_and_nothing_is_asked(server, http, fields, param):
    body = json.dumps({"messages": WORDS, **fields})
    answer = http.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    if param is not None:
        assert answer.json()["error"]["param"] == param
    assert server.engine.seen == []


def test_the_client_says_what_was_wrong(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-9", messages=WORDS)
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="send the picture itself"):
        client.chat.completions.create(model="toy", messages=showing("http://127.0.0.1:9/a.png"))
