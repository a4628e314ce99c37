"""A live server with a fake engine, one a test module; what a test sets on the engine is set back."""

import pytest
from fake_engine import FakeEngine
from live import live

import toys
from latteflow.serve.engine.settings import EngineSettings


@pytest.fixture(scope="session")
def toy_pipe():
    return toys.toy_pipeline()


@pytest.fixture(scope="module")
def module_server(toy_pipe):
    with live(FakeEngine(toy_pipe, EngineSettings(max_queued_pictures=16, max_active=4))) as server:
        yield server


@pytest.fixture
def server(module_server):
    engine = module_server.engine
    engine.seen.clear()
    yield module_server
    engine.step_seconds, engine.refuses, engine.fails, engine.failed, engine.silent = 0.0, None, None, None, 0.0
    engine.going.set()


@pytest.fixture
def client(server):
    with server.openai() as client:
        yield client


@pytest.fixture
def http(server):
    with server.http() as client:
        yield client
