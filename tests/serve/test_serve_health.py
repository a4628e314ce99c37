"""Health, models, metrics and logs: what operators and load balancers go by."""

import json
import logging
import subprocess
import sys

import pytest
from fake_engine import FakeEngine
from live import live, wait_for
from prometheus_client.parser import text_string_to_metric_families

from latteflow.serve.api.logs import JsonLines
from latteflow.serve.api.settings import ServerSettings

DRAW = {"prompt": "x", "steps": 2}
CHAT = {"messages": [{"role": "user", "content": "x"}]}


def test_a_warm_engine_is_ready(http):
    for path in ("/livez", "/readyz", "/health"):
        assert (http.get(path).status_code, http.get(path).json()) == (200, {"status": "ok"})


@pytest.mark.parametrize(
    ("name", "value", "status"),
    [
        ("failed", "a stage died at 10.0.0.1", "failed"),
        ("silent", 61.0, "hanging"),
        ("ready", False, "warming"),
        ("_draining", True, "draining"),
    ],
)
def test_an_engine_that_would_not_work_is_not_ready(server, http, name, value, status):
    before = getattr(server.engine, name)
    setattr(server.engine, name, value)
    try:
        assert http.get("/livez").status_code == 200
        for path in ("/readyz", "/health"):
            assert (http.get(path).status_code, http.get(path).json()) == (503, {"status": status})
        for path, body in (("/v1/images/generations", DRAW), ("/v1/chat/completions", CHAT)):
            answer = http.post(path, json=body)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, f"engine_{status}")
            assert answer.headers["retry-after"] == "2"
        assert server.engine.seen == []
    finally:
        setattr(server.engine, name, before)


def test_it_listens_while_it_warms_up(toy_pipe):
    engine = FakeEngine(toy_pipe)
    engine.warming.clear()
    with live(engine, warm=False) as server, server.http() as http:
        assert http.get("/livez").status_code == 200
        assert http.get("/readyz").json() == {"status": "warming"}
        engine.warming.set()
        wait_for(lambda: http.get("/readyz").status_code == 200)


def test_models(server, client, http):
    [model] = client.models.list()
    assert (model.id, model.object, model.owned_by) == ("toy", "model", "latteflow")
    assert client.models.retrieve("toy") == model
    assert model.latteflow == {
        "size": "32x32",
        "size_multiple": 8,
        "groups": 2,
        "edges": [0.0, 0.5, 1.0],
        "weights": {},
    }


def scraped(http):
    text = http.get("/metrics").text
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_count_exactly_what_happened(server, http):
    before = scraped(http)
    for body in (DRAW, {**DRAW, "n": 3}, {"prompt": ""}):
        http.post("/v1/images/generations", json=body)
    http.post("/v1/chat/completions", json=CHAT)
    http.get("/nowhere/1")
    http.get("/nowhere/2")
    after = scraped(http)
    grown = {name: value - before.get(name, 0) for name, value in after.items() if value != before.get(name, 0)}

    def requests(endpoint, code):
        return grown[("latteflow_requests_total", ("code", str(code)), ("endpoint", endpoint))]

    assert requests("/v1/images/generations", 200) == 2
    assert requests("/v1/images/generations", 400) == 1
    assert requests("/v1/chat/completions", 200) == 1
    assert requests("none", 404) == 2
    assert requests("/metrics", 200) == 1
    assert grown[("latteflow_ended_total", ("kind", "draw"), ("outcome", "finished"))] == 4
    for group in ("0", "1"):
        assert grown[("latteflow_step_seconds_count", ("group", group))] == 4
        assert grown[("latteflow_batch_size_count", ("group", group))] == 4
    assert grown[("latteflow_queue_seconds_count", ("kind", "draw"))] == 4
    assert (after[("latteflow_ready",)], after[("latteflow_inflight",)], after[("latteflow_queue_depth",)]) == (1, 0, 0)
    assert after[("latteflow_process_resident_memory_bytes",)] > 0
    assert not any("x" in dict(name[1:]).values() for name in grown)


def lines(caplog):
    formatter = JsonLines()
    return [json.loads(formatter.format(record)) for record in caplog.records if record.name == "latteflow.serve"]


def test_the_log_says_who_but_not_what(server, http, caplog):
    caplog.set_level(logging.INFO, "latteflow.serve")
    secret = "a private thing\nwith a second line"
    answer = http.post(
        "/v1/images/generations", json={**DRAW, "prompt": secret}, headers={"x-request-id": "mine.1-2_3"}
    )
    assert answer.headers["x-request-id"] == "mine.1-2_3"
    wait_for(lambda: lines(caplog))
    [line] = lines(caplog)
    assert (line["message"], line["method"], line["route"], line["status"]) == (
        "request",
        "POST",
        "/v1/images/generations",
        200,
    )
    assert "private" not in caplog.text
    assert "private" not in json.dumps(line)


@pytest.mark.parametrize("name", ["", "a b", "x" * 65, "a\tb", '{"level": "error"}', "<script>"])
def test_an_id_that_is_none_is_replaced(http, name):
    answer = http.get("/livez", headers={"x-request-id": name})
    assert answer.headers["x-request-id"] != name
    assert len(answer.headers["x-request-id"]) == 32


def test_prompts_are_logged_where_that_is_wanted(toy_pipe, caplog):
    caplog.set_level(logging.INFO, "latteflow.serve")
    with live(FakeEngine(toy_pipe), ServerSettings(model="toy", log_prompts=True)) as server, server.http() as http:
        http.post("/v1/images/generations", json={**DRAW, "prompt": 'one\n{"level": "error"}'})
        http.post("/v1/chat/completions", json=CHAT)
    images, chat = [line for line in lines(caplog) if line["message"] == "request"]
    assert images["prompt"] == 'one\n{"level": "error"}'
    assert chat["prompt"] == [["x"]]


def test_a_thread_that_breaks_is_a_line_too():
    code = """
import threading
from latteflow.serve.api.logs import log_as_json
def run():
    raise RuntimeError("a private thing")
log_as_json()
thread = threading.Thread(target=run, name="latteflow-engine")
thread.start()
thread.join()
"""
    err = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stderr
    line = json.loads(err.splitlines()[-1])
    assert (line["level"], line["thread"], line["exception"]) == ("error", "latteflow-engine", "RuntimeError")
    assert "private" not in err


def test_a_server_ends_after_its_engine_and_says_so(toy_pipe, caplog, monkeypatch):
    monkeypatch.setattr("latteflow.serve.api.server._BROKEN", 0.2)
    engine = FakeEngine(toy_pipe)
    with live(engine, ServerSettings(model="toy")) as server, server.http() as http:
        engine.failed = "RuntimeError"
        wait_for(lambda: not server.server.sound)
        assert http.get("/readyz").status_code == 503
        wait_for(lambda: server.server.should_exit)
    assert [line["message"] for line in lines(caplog) if line["level"] == "error"] == ["the engine broke down"]


def test_a_line_is_a_line_and_an_exception_keeps_its_words():
    try:
        raise RuntimeError("a private thing")
    except RuntimeError:
        import sys

        record = logging.LogRecord("x", logging.ERROR, "", 1, "broke\n{}", (), sys.exc_info())
    text = JsonLines().format(record)
    assert "\n" not in text
    assert "private" not in text
    line = json.loads(text)
    assert (line["message"], line["exception"]) == ("broke\n{}", "RuntimeError")
    assert line["trace"][-1].endswith("test_a_line_is_a_line_and_an_exception_keeps_its_words")
