"""One replica: an actor of Ray Serve with an engine of its own behind the same application as without Ray."""

from __future__ import annotations

import asyncio
import logging
from functools import partial

from fastapi import FastAPI
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from latteflow.serve.api.keys import ApiKeys
from latteflow.serve.api.logs import log_as_json
from latteflow.serve.deploy.served import served_app
from latteflow.serve.deploy.settings import ServeSettings
from latteflow.serve.deploy.stage_actor import StageActor
from latteflow.serve.executors.stage_process import StageProcess

_LOGGER = logging.getLogger("latteflow.serve")


class Replica:
    """What Ray Serve makes an actor of.

    Ray calls ``__serve_build_asgi_app__`` once, runs the application's lifespan, which starts the engine and stops it,
    and sends no request before ``check_health`` has returned for the first time.

    Args:
        settings: of the deployment.
        keys: who may ask.
    """

    def __init__(self, settings: ServeSettings, keys: ApiKeys) -> None:
        log_as_json()
        start = StageProcess if settings.per_stage is None else partial(StageActor, needs=settings.per_stage)
        self._app = served_app(settings, keys, start)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return _BehindProxy(self._app)

    async def check_health(self) -> None:
        """Return if the engine works; the first time, once it is warm.

        Raises:
            RuntimeError: it does not: Ray replaces the replica.
        """
        warm_up: asyncio.Task[None] = self._app.state.warm_up
        await asyncio.wait({warm_up})
        if warm_up.exception() is not None:
            raise RuntimeError("the engine did not get warm") from warm_up.exception()
        trouble = self._app.state.service.trouble()
        if trouble in ("failed", "hanging"):
            raise RuntimeError(f"the engine is {trouble}")


class _BehindProxy:
    """An application as Ray's proxy needs it: the proxy gives the request's id in the answer itself, once.

    Args:
        app: the application.
    """

    def __init__(self, app: FastAPI) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand a request on."""
        with _Kept() as kept:

            async def answer(message: Message) -> None:
                if message["type"] == "http.response.start":
                    kept.answered = True
                    del MutableHeaders(scope=message)["x-request-id"]
                await send(message)

            await self.app(scope, receive, answer)


class _Kept:
    """Keeps an exception that comes after the answer in this replica's log.

    Starlette raises it again for its server to see; Ray would write its words, which may quote a prompt, to its logs.
    """

    answered = False

    def __enter__(self) -> _Kept:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if not (self.answered and isinstance(error, Exception)):
            return False
        _LOGGER.error("unexpected", exc_info=error)
        return True
