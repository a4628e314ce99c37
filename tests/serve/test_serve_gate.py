"""What never gets to a route: foreign names and pages, packed, large and slow bodies."""

import socket
import time

import pytest
from fake_engine import FakeEngine
from live import live

from latteflow.serve.api.settings import ServerSettings

DRAW = {"prompt": "x", "steps": 1}


@pytest.fixture(scope="module")
def small(toy_pipe):
    settings = ServerSettings(model="toy", hosts=frozenset({"Pictures.example"}), max_body_bytes=2000, body_seconds=0.5)
    with live(FakeEngine(toy_pipe), settings) as server:
        yield server


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:8000", 200),
        ("127.0.0.1:1", 200),
        ("[::1]:8000", 200),
        ("192.168.1.7:8000", 200),
        ("pictures.example", 200),
        ("pictures.example.:80", 200),
        ("evil.example", 403),
        ("localhost.evil.example", 403),
        ("pictures.example.evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("2130706433", 403),
        ("0x7f.1", 403),
        ("pictures.example@evil.example", 403),
        ("", 403),
    ],
)
@pytest.mark.parametrize("path", ["/livez", "/v1/models"])
def test_a_server_answers_to_its_names_only(small, host, status, path):
    with small.http() as http:
        answer = http.get(path, headers={"host": host})
    assert answer.status_code == status
    if status != 200:
        assert answer.json()["error"]["code"] == "host_not_allowed"


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE"])
@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://localhost:1", "https://127.0.0.1.evil.example", ""]
)
def test_another_sites_page_may_not_ask(server, http, method, origin):
    answer = http.request(method, "/v1/images/generations", json=DRAW, headers={"origin": origin})
    assert answer.status_code == 403
    assert answer.json()["error"]["code"] == "origin_not_allowed"
    assert server.engine.seen == []
    assert "access-control-allow-origin" not in answer.headers


def test_its_own_page_may(server, http):
    answer = http.post("/v1/images/generations", json=DRAW, headers={"origin": server.url})
    assert answer.status_code == 200


@pytest.mark.parametrize(
    "kind",
    [
        None,
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "application/jsonp",
        "text/json",
    ],
)
def test_only_json_is_read(server, http, kind):
    headers = {} if kind is None else {"content-type": kind}
    answer = http.post("/v1/images/generations", content=b'{"prompt": "x"}', headers=headers)
    assert answer.status_code == 415
    assert answer.json()["error"]["code"] == "unsupported_media_type"
    assert server.engine.seen == []
    good = {"content-type": "application/json; charset=utf-8"}
    assert http.post("/v1/images/generations", content=b'{"prompt": "x", "steps": 1}', headers=good).status_code == 200


@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate", "zstd", "gzip, gzip"])
def test_packed_bodies_are_refused(http, encoding):
    answer = http.post("/v1/images/generations", content=b"x", headers={"content-encoding": encoding})
    assert answer.status_code == 415
    assert answer.json()["error"]["code"] == "unsupported_encoding"


def pieces(number):
    yield b'{"prompt": "'
    for _ in range(number):
        yield b"x" * 100
    yield b'", "steps": 1}'


@pytest.mark.parametrize("path", ["/v1/images/generations", "/v1/chat/completions"])
@pytest.mark.parametrize("chunked", [True, False])
def test_a_large_body_is_refused(small, chunked, path):
    body = pieces(30) if chunked else b"".join(pieces(30))
    with small.http() as http:
        answer = http.post(path, content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "request_too_large"
        body = pieces(10) if chunked else b"".join(pieces(10))
        answer = http.post("/v1/images/generations", content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 200


def test_a_slow_body_is_not_waited_for(small):
    host, port = small.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        head = "POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: 100\r\n\r\n".encode())
        started = time.monotonic()
        received = connection.recv(1 << 16)
        assert received.startswith(b"HTTP/1.1 408 ")
        assert time.monotonic() - started > 0.4


@pytest.mark.parametrize("length", ["2001", "9" * 30, "99999999999"])
def test_a_length_is_believed_before_anything_is_sent(small, length):
    host, port = small.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        head = "POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {length}\r\n\r\n".encode())
        assert connection.recv(1 << 16).startswith((b"HTTP/1.1 413 ", b"HTTP/1.1 400 "))
