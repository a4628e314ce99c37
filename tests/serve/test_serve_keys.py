"""Who may ask: every route but those about health wants a key."""

import hashlib

import openai
import pytest
from fake_engine import FakeEngine
from live import live

from latteflow.errors import UserError
from latteflow.serve.api.app import create_app
from latteflow.serve.api.keys import ApiKeys
from latteflow.serve.api.settings import ServerSettings

KEYS = ["a-long-enough-key-1", "a-long-enough-key-2"]
ROUTES = {
    ("GET", "/livez"),
    ("GET", "/readyz"),
    ("GET", "/health"),
    ("GET", "/metrics"),
    ("GET", "/openapi.json"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model}"),
    ("POST", "/v1/images/generations"),
    ("POST", "/v1/chat/completions"),
}
PUBLIC = {"/livez", "/readyz", "/health"}
HIDDEN = {"/metrics", "/openapi.json"}


@pytest.fixture(scope="module")
def guarded(toy_pipe):
    with live(FakeEngine(toy_pipe), ServerSettings(model="toy", keys=ApiKeys(KEYS))) as server:
        yield server


def test_the_routes_are_these(toy_pipe):
    described = create_app(FakeEngine(toy_pipe)).openapi()["paths"]
    found = {(method.upper(), path) for path, methods in described.items() for method in methods}
    assert found == {route for route in ROUTES if route[1] not in HIDDEN}


def test_nothing_is_told_to_anybody(toy_pipe, monkeypatch):
    monkeypatch.setenv("FASTAPI_OTEL_AUTO_CONFIGURE", "true")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    telemetry = create_app(FakeEngine(toy_pipe))._telemetry
    assert not any(telemetry[kind] for kind in ("tracing", "metrics", "logs", "auto_configure"))


@pytest.mark.parametrize("route", sorted(ROUTES), ids=" ".join)
@pytest.mark.parametrize(
    "header",
    [
        None,
        "Bearer",
        "Bearer wrong",
        f"Basic {KEYS[0]}",
        KEYS[0],
        f"Bearer {KEYS[0]}x",
        f"Bearer {KEYS[0][:-1]}",
        f"Bearer {hashlib.sha256(KEYS[0].encode()).hexdigest()}",
        "Bearer \xff\xfe",
    ],
)
def test_every_route_but_health_wants_a_key(guarded, route, header):
    method, path = route
    headers = {} if header is None else {"authorization": header.encode("latin-1")}
    with guarded.http() as http:
        answer = http.request(method, path.format(model="toy"), headers=headers, json={} if method == "POST" else None)
    if path in PUBLIC:
        assert answer.status_code == 200
        return
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert "a-long" not in answer.text


@pytest.mark.parametrize(
    "target",
    [
        "//v1/models",
        "/v1//models",
        "/v1%2fmodels",
        "/V1/models",
        "/v1/models/",
        "/v1/models?key=1",
        "/x/../v1/models",
        "http://127.0.0.1/v1/models",
        "/livez/../v1/models",
        "/livez;/v1/models",
        "/metrics/",
    ],
)
def test_no_way_of_writing_an_address_gets_around_it(guarded, target):
    with guarded.http() as http:
        answer = http.send(http.build_request("GET", "/", extensions={"target": target.encode()}))
    assert answer.status_code in (401, 404)


@pytest.mark.parametrize("key", KEYS)
def test_each_key_opens_everything(guarded, key):
    with guarded.openai(api_key=key) as client:
        assert [model.id for model in client.models.list()] == ["toy"]
        client.images.generate(prompt="x", extra_body={"steps": 1})
    with guarded.http(headers={"authorization": f"bearer {key}"}) as http:
        assert http.get("/metrics").status_code == http.get("/openapi.json").status_code == 200


def test_the_client_says_so(guarded):
    with guarded.openai() as client, pytest.raises(openai.AuthenticationError) as caught:
        client.images.generate(prompt="x")
    assert caught.value.code == "invalid_api_key"


def test_without_a_key_the_body_is_not_even_read(guarded):
    with guarded.http() as http:
        headers = {"content-type": "application/json"}
        assert http.post("/v1/chat/completions", content=b"{{{{", headers=headers).status_code == 401


def test_keys_are_read_from_a_file_and_the_environment(tmp_path):
    file = tmp_path / "keys"
    file.write_text(f"# ours\n\n  {KEYS[0]}  \n")
    keys = ApiKeys.read(file, f" {KEYS[1]},another-key-of-16 ")
    assert keys
    for key in (*KEYS, "another-key-of-16"):
        assert keys.accepts(f"Bearer {key}")
    assert not keys.accepts("Bearer # ours")
    assert not keys.accepts(None)
    assert not any(KEYS[0] in repr(vars(keys)) for _ in range(1))
    assert not ApiKeys.read(None, None)
    assert ApiKeys().accepts(None)


@pytest.mark.parametrize("text", ["", "# nothing\n", "short\n", "ünïcode-key-long-enough\n", "\xff"])
def test_a_key_file_that_does_not_do_is_refused(tmp_path, text):
    file = tmp_path / "keys"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError) as caught:
        ApiKeys.read(file, None)
    assert "short" not in str(caught.value)
    with pytest.raises(UserError, match="cannot be read"):
        ApiKeys.read(tmp_path / "none", None)
