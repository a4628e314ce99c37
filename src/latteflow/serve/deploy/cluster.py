"""Ray Serve from a command: Ray is started or joined, the application runs until a signal, and leaves in good order."""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ray import serve
from ray.serve.config import ProxyLocation

from latteflow.errors import UserError
from latteflow.models.embedded import resolve_model
from latteflow.models.transformer import LatteFlowTransformer
from latteflow.serve.deploy.app import build
from latteflow.serve.deploy.settings import ServeSettings
from latteflow.serve.loading import check_asked, found_anywhere
from latteflow.train.encode_ray import having_ray

_NAME = "latteflow"
_LAST_WORDS = 10
"""Seconds after which a replica that should be gone is not waited for."""


def serve_on_ray(
    settings: ServeSettings, host: str, port: int, *, address: str | None, announce: Callable[[str], None]
) -> bool:
    """Serve until SIGTERM or SIGINT, then finish what runs; a second signal cuts that short.

    Return whether everything was finished.

    Args:
        settings: of the deployment.
        host: that Ray's proxy listens on.
        port: of it; 0 for any.
        address: of the cluster to join; left out, the one that RAY_ADDRESS names, or a Ray of this command alone.
        announce: called with the URL once all replicas are warm, or as many as autoscaling begins with.

    Raises:
        UserError: there is no such cluster, host and port cannot be listened on, Ray Serve already listens elsewhere,
            or the replicas cannot be started.
    """
    check_asked(settings.model, settings.dtype)
    settings.engine()
    settings = settings.model_copy(update={"model": found_anywhere(settings.model)})
    joining = address or os.environ.get("RAY_ADDRESS")
    port = port if joining and port else _free_port(host, port)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    with having_ray(_processors(settings), address):
        _deploy(settings, host, port)
        with _asked_to_leave() as asked:
            announce(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")
            asked.wait()
            asked.clear()
            whole = _drained(settings.drain, asked)
        serve.shutdown()
    return whole


def _processors(settings: ServeSettings) -> int:
    """Return how many a Ray of its own has to have, for all replicas and their stages."""
    each = settings.per_replica.get("CPU", 1.0)
    if settings.per_stage is not None:
        config: Any = LatteFlowTransformer.load_config(resolve_model(settings.model), subfolder="transformer")
        each += config["num_groups"] * settings.per_stage.get("CPU", 0.0)
    return math.ceil(settings.most_replicas * each)


def _deploy(settings: ServeSettings, host: str, port: int) -> None:
    """Return when the application runs."""
    if serve.status().proxies:
        raise UserError("Ray Serve runs there already: deploy latteflow.serve.deploy.app:build with serve deploy")
    serve.start(proxy_location=ProxyLocation.HeadOnly, http_options={"host": host, "port": port})
    try:
        serve.run(build(settings), name=_NAME)
    except RuntimeError as error:
        serve.shutdown()
        raise UserError(f"Ray could not start the replicas: {_reason(error)}") from error


def _drained(seconds: float, asked: threading.Event) -> bool:
    """Take the application away; return whether its replicas have left by themselves, and nobody asked again."""
    serve.delete(_NAME, _blocking=False)
    end = time.monotonic() + seconds + _LAST_WORDS
    while _NAME in serve.status().applications:
        if asked.wait(0.2) or time.monotonic() > end:
            return False
    return True


@contextmanager
def _asked_to_leave() -> Iterator[threading.Event]:
    """Yield what is set by SIGTERM and SIGINT, in place of what Ray does at them."""
    asked = threading.Event()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, lambda *_: asked.set())
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def _free_port(host: str, port: int) -> int:
    """Return a port that can be listened on. Ray's proxy would share a taken one, and take some of its requests."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do after one another
            probe.bind((host, port))
            return probe.getsockname()[1]
    except OSError as error:
        raise UserError(
            f"cannot listen on {host}:{port}: give a free --port, and an address of this machine"
        ) from error


def _reason(error: Exception) -> str:
    """Return the last line of what Ray tells, which may hold the traces of several processes."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
