"""Counters for Prometheus, in a registry of their own; no label is ever a client's text."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from fastapi import APIRouter, Request, Response
from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily

from latteflow.serve.api.keys import KeyedRoute
from latteflow.serve.engine.settings import EngineStatus

_SHORT = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_LONG = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_POWERS = (1, 2, 4, 8, 16, 32, 64)
_NAME = "latteflow"

router = APIRouter(route_class=KeyedRoute)


class Metrics:
    """What is counted of an engine and of the API in front of it; an ``Observer`` of the engine."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(_NAME, registry=self.registry)
        self._requests = Counter(
            "requests", "Requests answered.", ["endpoint", "code"], namespace=_NAME, registry=self.registry
        )
        self._steps = self._histogram("step_seconds", "A forward of a group.", ["group"], _SHORT)
        self._batches = self._histogram("batch_size", "Pictures that shared a forward.", ["group"], _POWERS)
        self._seconds = self._histogram("seconds", "From admission to the end.", ["kind"], _LONG)
        self._queued = self._histogram("queue_seconds", "From admission to the first work.", ["kind"], _LONG)
        self._ended = Counter(
            "ended", "What became of the engine's work.", ["kind", "outcome"], namespace=_NAME, registry=self.registry
        )

    def watch(self, status: Callable[[], EngineStatus]) -> None:
        """Have an engine's status asked at every scrape."""
        self.registry.register(_Status(status))

    def answered(self, endpoint: str, code: int) -> None:
        """Count a request: its route's template, and the status."""
        self._requests.labels(endpoint, str(code)).inc()

    def stepped(self, group: int, batch: int, seconds: float) -> None:
        """Count a forward."""
        self._steps.labels(str(group)).observe(seconds)
        self._batches.labels(str(group)).observe(batch)

    def ended(self, kind: str, outcome: str, seconds_queued: float, seconds: float) -> None:
        """Count the end of a piece of the engine's work."""
        self._ended.labels(kind, outcome).inc()
        self._queued.labels(kind).observe(seconds_queued)
        self._seconds.labels(kind).observe(seconds)

    def _histogram(self, name: str, words: str, labels: list[str], buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, words, labels, namespace=_NAME, registry=self.registry, buckets=buckets)


class _Status:
    """An engine's status as gauges."""

    def __init__(self, status: Callable[[], EngineStatus]) -> None:
        self._status = status

    def collect(self) -> Iterator[GaugeMetricFamily]:
        status = self._status()
        for name, words, value in (
            ("ready", "Whether the engine takes requests.", status.ready),
            ("queue_depth", "Pictures waiting.", status.queued),
            ("inflight", "Pictures under way.", status.active),
            ("chats", "Answers waiting or under way.", status.chats),
            ("queued_step_tokens", "Work waiting.", status.queued_work),
            ("silent_seconds", "Since the engine last went around its loop.", status.silent_for),
        ):
            yield GaugeMetricFamily(f"{_NAME}_{name}", words, value=float(value))


@router.get("/metrics", response_class=Response, include_in_schema=False)
def metrics(request: Request) -> Response:
    """Return everything that is counted, in Prometheus' text form."""
    counted: Metrics = request.app.state.metrics
    return Response(generate_latest(counted.registry), media_type="text/plain; version=0.0.4; charset=utf-8")
