"""Logs: a JSON object a line, a line a request, with its id; what was asked is left out unless wanted."""

from __future__ import annotations

import json
import logging
import re
import threading
import time
import traceback
import uuid
from contextvars import ContextVar
from datetime import datetime, timezone

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from latteflow.serve.api.errors import answer_headers
from latteflow.serve.api.metrics import Metrics

_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_LOGGER = logging.getLogger("latteflow.serve")

_request_id: ContextVar[str | None] = ContextVar("request_id", default=None)


class JsonLines(logging.Formatter):
    """Records as JSON objects; of an exception its kind and where it was raised, for its words may quote a prompt."""

    def format(self, record: logging.LogRecord) -> str:
        """Return one line."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if _request_id.get() is not None:
            line["request_id"] = _request_id.get()
        line |= getattr(record, "fields", {})
        if record.exc_info and record.exc_info[0] is not None:
            kind, _, trace = record.exc_info
            line["exception"] = kind.__name__
            line["trace"] = [f"{f.filename}:{f.lineno} {f.name}" for f in traceback.extract_tb(trace)]
        return json.dumps(line, ensure_ascii=False, default=str)


class RequestLog:
    """Middleware that gives every request an id, and says and counts what became of it.

    Args:
        app: what is behind it.
        metrics: where it is counted.
    """

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand a request on under an id, and tell of it when it is over."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        name = given if _SANE_ID.fullmatch(given) else uuid.uuid4().hex
        _request_id.set(name)  # each request has a task of its own, so there is nothing to set back
        scope.setdefault("state", {})["request_id"] = name
        status, started = 500, time.monotonic()

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).update(answer_headers(scope))
            await send(message)

        try:
            await self.app(scope, receive, answer)
        finally:
            self._tell(scope, status, time.monotonic() - started)

    def _tell(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "none")  # its template: what was asked for may be anything
        self.metrics.answered(route, status)
        fields = {"method": scope["method"], "route": route, "status": status, "seconds": round(seconds, 4)}
        if "prompt" in scope["state"]:
            fields["prompt"] = scope["state"]["prompt"]
        _LOGGER.info("request", extra={"fields": fields})


def log_as_json() -> None:
    """Have the process log to stderr as JSON lines: the server's words, everybody's warnings, and how threads broke."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.captureWarnings(True)
    for name in ("latteflow", "uvicorn"):
        logging.getLogger(name).setLevel(logging.INFO)
    threading.excepthook = _log_broken_thread


def _log_broken_thread(broken: threading.ExceptHookArgs) -> None:
    """Log what ended a thread as a line like any other; Python would print its words, which may quote a prompt."""
    error, name = broken.exc_value, broken.thread.name if broken.thread else "unknown"
    _LOGGER.error("a thread broke down", exc_info=error, extra={"fields": {"thread": name}})
