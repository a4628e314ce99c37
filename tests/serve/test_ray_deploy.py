"""What a deployment on Ray is told, without Ray: settings, refusals, health, and what stays in a replica."""

import asyncio
import inspect
import json
import logging
import socket
from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from pydantic import ValidationError

from latteflow.errors import UserError
from latteflow.serve.api.keys import ApiKeys

pytest.importorskip("ray")

from latteflow.serve.deploy import app, cluster
from latteflow.serve.deploy.replica import Replica, _BehindProxy
from latteflow.serve.deploy.settings import ServeSettings
from latteflow.serve.loading import found_anywhere

KEY = "a-key-that-is-long-enough"


@pytest.fixture(autouse=True)
def _without_keys(monkeypatch):
    monkeypatch.delenv("LATTEFLOW_API_KEYS", raising=False)


def test_nobody_deploys_without_keys_by_mistake(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="give api_key_file or LATTEFLOW_API_KEYS, or insecure: true"):
        app.build(ServeSettings())
    app.build(ServeSettings(insecure=True))
    (tmp_path / "keys").write_text(KEY)
    app.build(ServeSettings(api_key_file=tmp_path / "keys"))
    monkeypatch.setenv("LATTEFLOW_API_KEYS", KEY)
    app.build(ServeSettings())


def test_ray_can_read_the_type_of_the_arguments():
    """A cluster's YAML gives plain values; Ray makes settings of them only where it finds the type itself."""
    [parameter] = inspect.signature(app.build).parameters.values()
    assert parameter.annotation is ServeSettings


def test_yaml_says_what_it_means():
    settings = ServeSettings.model_validate({"model": "emoji-64", "autoscale": [1, 4], "per_replica": {"GPU": 1}})
    assert settings.most_replicas == 4
    with pytest.raises(ValidationError, match="autoscale goes from the fewest to the most replicas"):
        ServeSettings.model_validate({"autoscale": [4, 1]})
    with pytest.raises(ValidationError, match="per_stage is for a group pipeline"):
        ServeSettings.model_validate({"per_stage": {"CPU": 1}})
    with pytest.raises(ValidationError, match="replica"):
        ServeSettings.model_validate({"replica": 2})
    with pytest.raises(UserError, match="max_batch has to be 1 or more: got 0"):
        app.build(ServeSettings(max_batch=0, max_ongoing=1, max_queued=1, insecure=True))


def test_a_number_of_replicas_or_bounds():
    fixed = app._options(ServeSettings(replicas=3, per_replica={"CPU": 2, "GPU": 0.5, "big": 1}, drain=7))
    assert fixed["num_replicas"] == 3
    assert fixed["ray_actor_options"] == {"num_cpus": 2, "num_gpus": 0.5, "resources": {"big": 1}}
    assert fixed["graceful_shutdown_timeout_s"] == 7
    scaled = app._options(ServeSettings(autoscale=(1, 4), max_batch=8))
    assert "num_replicas" not in scaled
    scaling = scaled["autoscaling_config"]
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (1, 4, 8)
    asked = app._options(ServeSettings(autoscale=(1, 4), target_ongoing=3))
    assert asked["autoscaling_config"].target_ongoing_requests == 3


def test_the_engine_says_that_it_is_full_before_ray_does():
    settings = ServeSettings(queue=10, max_active=5)
    engine = settings.engine()
    options = app._options(settings)
    held = engine.max_active + engine.max_queued_pictures + engine.max_chats + engine.max_queued_chats
    assert options["max_ongoing_requests"] > held
    assert options["max_queued_requests"] == options["max_ongoing_requests"]
    refusal = options["backpressure_config"]
    assert (refusal.status_code, refusal.retry_after_s) == (429, 2)
    asked = app._options(ServeSettings(max_ongoing=3, max_queued=2))
    assert (asked["max_ongoing_requests"], asked["max_queued_requests"]) == (3, 2)


def test_keys_travel_as_digests(monkeypatch):
    monkeypatch.setenv("LATTEFLOW_API_KEYS", KEY)
    bound = app.build(ServeSettings())._bound_deployment
    _, keys = bound.init_args
    assert isinstance(keys, ApiKeys)
    assert keys.accepts(f"Bearer {KEY}")
    assert KEY not in repr(vars(keys))
    assert KEY not in repr(bound.init_args)


@pytest.fixture
def replica():
    """A replica of which only the health is real; ``replica.state`` says what it is."""
    made = object.__new__(Replica)
    made.state = SimpleNamespace(trouble=None, mistake=None)

    async def warm_up():
        if made.state.mistake is not None:
            raise made.state.mistake

    made.check = lambda: asyncio.run(checked(made, warm_up()))
    return made


async def checked(replica, warm_up):
    service = SimpleNamespace(trouble=lambda: replica.state.trouble)
    replica._app = SimpleNamespace(state=SimpleNamespace(service=service, warm_up=asyncio.ensure_future(warm_up)))
    await replica.check_health()


@pytest.mark.parametrize("trouble", ["failed", "hanging"])
def test_an_engine_that_does_not_work_is_replaced(replica, trouble):
    replica.check()
    replica.state.trouble = "draining"
    replica.check()
    replica.state.trouble = trouble
    with pytest.raises(RuntimeError, match=f"the engine is {trouble}"):
        replica.check()


def test_a_replica_that_does_not_get_warm_never_serves(replica):
    replica.state.mistake = MemoryError()
    with pytest.raises(RuntimeError, match="did not get warm"):
        replica.check()


def test_what_nobody_expected_stays_in_the_replicas_log(caplog):
    inner = FastAPI()

    @inner.get("/")
    def broken():
        raise ValueError("a private prompt")

    with TestClient(_BehindProxy(inner)) as client, caplog.at_level(logging.ERROR, "latteflow.serve"):
        answer = client.get("/")
    assert (answer.status_code, answer.text) == (500, "Internal Server Error")
    [record] = caplog.records
    assert (record.message, record.exc_info[0]) == ("unexpected", ValueError)


def test_an_exception_before_the_answer_is_rays():
    async def breaks(scope, receive, send):
        raise KeyError

    with pytest.raises(KeyError):
        asyncio.run(_BehindProxy(breaks)({"type": "http"}, None, None))


class Gone:
    """Ray Serve, whose application leaves after some looks."""

    def __init__(self, looks):
        self.looks, self.deleted = looks, []

    def delete(self, name, _blocking):
        self.deleted.append(name)

    def status(self):
        self.looks -= 1
        return SimpleNamespace(applications={} if self.looks < 0 else {"latteflow": None})


@pytest.mark.parametrize(("looks", "again", "whole"), [(0, False, True), (2, False, True), (10**6, True, False)])
def test_leaving_waits_unless_it_is_asked_for_again(monkeypatch, looks, again, whole):
    gone = Gone(looks)
    monkeypatch.setattr(cluster, "serve", gone)
    with cluster._asked_to_leave() as asked:
        if again:
            asked.set()
        assert cluster._drained(3600, asked) is whole
    assert gone.deleted == ["latteflow"]


def test_what_takes_too_long_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(cluster, "serve", Gone(10**6))
    monkeypatch.setattr(cluster, "_LAST_WORDS", 0)
    with cluster._asked_to_leave() as asked:
        assert cluster._drained(0, asked) is False


def test_a_taken_port_is_not_shared():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot listen on 127.0.0.1:{port}: give a free --port"):
            cluster._free_port("127.0.0.1", port)
    assert cluster._free_port("127.0.0.1", 0) > 0


def test_settings_are_plain_values():
    settings = ServeSettings(autoscale=(1, 2), allow_host=("pictures.example",))
    assert ServeSettings.model_validate(json.loads(settings.model_dump_json())) == settings


def test_a_ray_of_its_own_has_room_for_all(saved_pipeline):
    assert cluster._processors(ServeSettings(replicas=3, per_replica={"CPU": 1.5})) == 5
    piped = ServeSettings(model=str(saved_pipeline), autoscale=(1, 2), placement="pipeline", per_stage={"CPU": 2})
    assert cluster._processors(piped) == 2 * (1 + 2 * 2)


def test_a_folder_is_found_from_everywhere(saved_pipeline, monkeypatch):
    monkeypatch.chdir(saved_pipeline.parent)
    assert found_anywhere(saved_pipeline.name) == str(saved_pipeline)
    assert found_anywhere("owner/name") == "owner/name"
    assert found_anywhere("emoji-64") == "emoji-64"
