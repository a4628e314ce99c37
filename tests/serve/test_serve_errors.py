"""Every error is OpenAI's error object, with the status clients go by, and says nothing of the machine."""

import json
import socket
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from live import LEAKS, wait_for

from latteflow.errors import UserError
from latteflow.serve.engine import requests as asked

SECRET = "secret <Thing object at 0x7f58aabbcc> in /home/me/x.py"
JSON = {"content-type": "application/json"}
DRAW = {"prompt": "x", "steps": 1}


def error_of(answer, status):
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert not LEAKS.search(answer.text), answer.text
    assert set(answer.json()) == {"error"}
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["code"]
    return error


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("GET", "/", None, 404, "not_found"),
        ("GET", "/nowhere/<script>", None, 404, "not_found"),
        ("POST", "/v1/embeddings", b"{}", 404, "not_found"),
        ("GET", "/docs", None, 404, "not_found"),
        ("GET", "/v1/images/generations", None, 405, "method_not_allowed"),
        ("DELETE", "/v1/models", None, 405, "method_not_allowed"),
        ("OPTIONS", "/v1/models", None, 405, "method_not_allowed"),
        ("GET", "/v1/models/gpt-9", None, 404, "model_not_found"),
        ("GET", "/v1/models/..%2f..%2fetc%2fpasswd", None, 404, "model_not_found"),
        ("POST", "/v1/images/generations", b"", 400, "missing_required_parameter"),
        ("POST", "/v1/images/generations", b"{", 400, "invalid_json"),
        ("POST", "/v1/images/generations", b"\xff\xfe\x00", 400, "invalid_request"),
        ("POST", "/v1/images/generations", b"[]", 400, "invalid_value"),
        ("POST", "/v1/images/generations", b"null", 400, "invalid_value"),
        ("POST", "/v1/images/generations", b'"x"', 400, "invalid_value"),
        ("POST", "/v1/images/generations", b"{}", 400, "missing_required_parameter"),
        ("POST", "/v1/images/generations", b'{"prompt": "x", "path": 1}', 400, "unknown_parameter"),
        ("POST", "/v1/images/generations", b"[" * 200_000, 400, "invalid_request"),
        (
            "POST",
            "/v1/images/generations",
            b'{"prompt":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
            400,
            "invalid_request",
        ),
        ("POST", "/v1/images/generations", b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", 400, "invalid_request"),
        ("POST", "/v1/chat/completions", b'{"messages": [{"role": "user", "content": 0}]}', 400, "invalid_value"),
    ],
)
def test_what_cannot_be_served(http, method, path, body, status, code):
    answer = http.request(method, path, content=body, headers=JSON)
    assert error_of(answer, status)["code"] == code


@pytest.mark.parametrize(
    ("error", "status", "code", "headers"),
    [
        (asked.QueueFull(7.2), 429, "queue_full", {"retry-after": "8"}),
        (asked.QueueFull(0.0), 429, "queue_full", {"retry-after": "1"}),
        (asked.Draining(SECRET), 503, "draining", {"retry-after": "1"}),
        (asked.EngineFailed(SECRET), 503, "engine_failed", {"retry-after": "1"}),
        (asked.OutOfMemory(SECRET), 503, "out_of_memory", {"x-should-retry": "false"}),
        (asked.DeadlineExceeded(SECRET), 408, "deadline_exceeded", {"x-should-retry": "false"}),
        (asked.Cancelled(SECRET), 499, "cancelled", {}),
        (asked.Refused(SECRET), 503, "refused", {"retry-after": "1"}),
        (UserError("height 3 does not do"), 400, "invalid_value", {}),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("when", ["refuses", "fails"])
def test_what_the_engine_does_not_do(server, http, error, status, code, headers, when):
    setattr(server.engine, when, error)
    answer = http.post("/v1/images/generations", json=DRAW)
    found = error_of(answer, status)
    assert found["code"] == code
    assert found["type"] == {
        429: "rate_limit_error",
        408: "timeout_error",
        499: "timeout_error",
        400: "invalid_request_error",
    }.get(status, "server_error")
    assert {name: answer.headers[name] for name in headers} == headers


def test_what_nobody_expected_says_nothing(server, http, caplog):
    server.engine.refuses = RuntimeError(SECRET)
    error = error_of(http.post("/v1/images/generations", json=DRAW), 500)
    assert (error["type"], error["code"]) == ("server_error", "internal_error")
    server.engine.refuses = None
    assert http.post("/v1/images/generations", json=DRAW).status_code == 200


def test_a_deadline_is_kept(server, http):
    server.engine.going.clear()
    assert (
        error_of(http.post("/v1/images/generations", json={**DRAW, "timeout": 0.05}), 408)["code"]
        == "deadline_exceeded"
    )
    assert server.engine.idle


def test_more_than_may_wait_is_told_to_come_again(server, http):
    """Five times what fits: each is drawn or told when to come again, and nothing is left over."""
    server.engine.going.clear()
    room = server.engine.settings.max_queued_pictures
    with ThreadPoolExecutor(5 * room) as pool:
        calls = [pool.submit(http.post, "/v1/images/generations", json={**DRAW, "seed": i}) for i in range(5 * room)]
        wait_for(lambda: sum(call.done() for call in calls) == 4 * room)
        server.engine.going.set()
        answers = [call.result() for call in calls]
    codes = [answer.status_code for answer in answers]
    assert (codes.count(200), codes.count(429)) == (room, 4 * room)
    assert all(answer.headers["retry-after"] == "3" for answer in answers if answer.status_code == 429)
    assert server.engine.idle


def test_all_or_none_of_a_request_is_taken(server, http):
    server.engine.going.clear()
    body = {**DRAW, "n": 10}
    with ThreadPoolExecutor(2) as pool:
        first, second = (pool.submit(http.post, "/v1/images/generations", json=body) for _ in range(2))
        wait_for(lambda: first.done() or second.done())
        assert len(server.engine.waiting) == 10
        server.engine.going.set()
        assert sorted(each.result().status_code for each in (first, second)) == [200, 429]


def test_the_official_client_comes_again_by_itself(server):
    server.engine.refuses = asked.QueueFull(0.5)
    with server.openai(max_retries=3) as client, ThreadPoolExecutor(1) as pool:
        call = pool.submit(client.images.generate, prompt="x", extra_body={"steps": 1})
        wait_for(lambda: server.engine.seen)
        server.engine.refuses = None
        assert call.result().data
    assert len(server.engine.seen) == 2


def test_the_official_client_does_not_repeat_what_is_hopeless(server):
    server.engine.refuses = asked.OutOfMemory("too large")
    with server.openai(max_retries=3) as client, pytest.raises(openai.InternalServerError):
        client.images.generate(prompt="x")
    assert len(server.engine.seen) == 1


def test_when_one_picture_fails_the_others_are_given_up(server, http):
    server.engine.going.clear()
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(http.post, "/v1/images/generations", json={**DRAW, "n": 3})
        wait_for(lambda: len(server.engine.waiting) == 3)
        server.engine.waiting[1].tell(asked.Failed(asked.OutOfMemory("x")))
        assert call.result().status_code == 503
    wait_for(lambda: server.engine.idle)


def leave(server, body, *, after=b""):
    """Send a request, read until ``after`` has come, and close the connection."""
    host, port = server.url.removeprefix("http://").split(":")
    content = json.dumps(body).encode()
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST /v1/images/generations HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        received = b""
        wait_for(lambda: server.engine.seen)
        while after not in received:
            received += connection.recv(1 << 16)


@pytest.mark.parametrize("holding", [True, False])
@pytest.mark.parametrize("stream", [True, False])
def test_whoever_leaves_has_given_up(server, http, stream, holding):
    """Queued or under way, streaming or not."""
    server.engine.step_seconds = 0.02
    if holding:
        server.engine.going.clear()
    for _ in range(5):
        server.engine.seen.clear()
        after = b"image_generation.progress" if stream and not holding else b""
        leave(
            server,
            {"prompt": "x", "steps": 600, "stream": stream, **({"progress": True} if stream else {})},
            after=after,
        )
        wait_for(lambda: server.engine.idle)
    server.engine.going.set()
    server.engine.step_seconds = 0.0
    assert all(http.post("/v1/images/generations", json=DRAW).status_code == 200 for _ in range(20))
