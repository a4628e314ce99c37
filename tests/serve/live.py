"""A live server on loopback, in a thread of the test's process."""

import queue
import re
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import uvicorn

from latteflow.serve.api.app import create_app
from latteflow.serve.api.metrics import Metrics
from latteflow.serve.api.server import LeavingServer
from latteflow.serve.api.settings import ServerSettings

LEAKS = re.compile(r"0x[0-9a-f]{6,}|/home/|/tmp/|/usr/|Traceback|File \"|\.py\b|site-packages|<[a-zA-Z_.]+ object")
"""What no answer may hold: addresses, paths, traces."""
PATIENCE = 30  # seconds after which a test hangs; nothing here takes one


@dataclass
class Live:
    url: str
    engine: Any
    server: LeavingServer

    def openai(self, **options):
        """The official client, which does not ask again unless the test wants it to."""
        return openai.OpenAI(
            **{"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0, "timeout": PATIENCE, **options}
        )

    def http(self, **options):
        return httpx.Client(base_url=self.url, timeout=PATIENCE, trust_env=False, **options)


@contextmanager
def live(engine, settings=None, metrics=None, *, warm=True, drain=5.0, notice=0.0, prepare=None):
    if metrics is None:
        engine.observer = metrics = Metrics()
    app = create_app(engine, settings or ServerSettings(model="toy"), metrics)
    if prepare is not None:
        prepare(app)
    urls = queue.Queue()
    config = uvicorn.Config(
        app,
        host="127.0.0.1",
        port=0,
        http="h11",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=5,
    )
    server = LeavingServer(config, app, drain=drain, notice=notice, announce=urls.put)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        if warm:
            url = urls.get(timeout=PATIENCE)
        else:
            wait_for(lambda: server.started)
            url = server._url()
        yield Live(url, engine, server)
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        assert not thread.is_alive()


def wait_for(condition, seconds=PATIENCE):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.005)
