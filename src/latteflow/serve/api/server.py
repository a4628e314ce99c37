"""The server process: uvicorn around the application, saying when it is ready and leaving in good order."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from latteflow.errors import UserError

_LOGGER = logging.getLogger("latteflow.serve")
_LAST_WORDS = 5
"""Seconds for answers that are done to be sent, once everything has been drained."""
_KEEP_ALIVE = 75
"""Seconds that an idle connection is kept: longer than clients and proxies keep theirs, for one that is closed just as
the next request is sent costs that request its answer."""
_BROKEN = 5.0
"""Seconds in which requests are told that the engine is broken, before the server ends."""


def serve(app: FastAPI, host: str, port: int, *, drain: float, notice: float, announce: Callable[[str], None]) -> bool:
    """Serve an application until SIGTERM or SIGINT; a second of them ends the process at once, with code 1.

    Return whether the engine got warm and worked to the end; if it did not, the log says why. A broken engine does not
    mend, so the process ends soon after, and whoever looks after it starts it again.

    After the first signal, ``/readyz`` answers 503 while requests are still taken, for ``notice`` seconds; then
    requests are refused with 503 and what runs is finished, for at most ``drain`` seconds.

    Args:
        app: as ``create_app`` returns it.
        host: to listen on.
        port: to listen on; 0 for any.
        drain: seconds.
        notice: seconds.
        announce: called with the server's URL once the engine is warm.

    Raises:
        UserError: host and port cannot be listened on.
    """
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http="h11",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=_LAST_WORDS,
    )
    server = LeavingServer(config, app, drain=drain, notice=notice, announce=announce)
    try:
        server.run()
    except SystemExit as error:
        raise UserError(
            f"cannot listen on {host}:{port}: give a free --port, and an address of this machine"
        ) from error
    return server.sound


class LeavingServer(uvicorn.Server):
    """uvicorn's server, which drains the engine before it stops listening.

    Args:
        config: of uvicorn.
        app: as ``create_app`` returns it.
        drain: seconds for what runs to be finished.
        notice: seconds between ``/readyz``'s first 503 and the first request that is refused.
        announce: called with the URL once the engine is warm.
    """

    def __init__(
        self, config: uvicorn.Config, app: FastAPI, *, drain: float, notice: float, announce: Callable[[str], None]
    ) -> None:
        super().__init__(config)
        self.app, self.drain, self.notice, self.announce = app, drain, notice, announce
        self.sound = True
        """Whether the engine got warm and works, as far as is known."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._asked_to_leave = False

    async def startup(self, sockets: Any = None) -> None:
        """Listen, and have the URL announced once the engine is warm."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        self._keep(self._announce())

    async def on_tick(self, counter: int) -> bool:
        """Have the server end some time after the engine broke down; uvicorn asks ten times a second."""
        if self.sound and self.app.state.service.engine.status().failed is not None:
            self.sound = False
            self._keep(self._end_broken())
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to leave; the second time, leave."""
        if self._asked_to_leave or self._loop is None:
            os._exit(1)  # a thread inside a forward cannot be asked
        self._asked_to_leave = True
        self._loop.call_soon_threadsafe(lambda: self._keep(self.leave()))

    async def leave(self) -> None:
        """Drain the engine, then have the server stop."""
        service = self.app.state.service
        service.leaving = True
        _LOGGER.info("leaving", extra={"fields": {"notice": self.notice, "drain": self.drain}})
        await asyncio.sleep(self.notice)
        whole = await asyncio.to_thread(service.engine.drain, self.drain)
        _LOGGER.info("drained", extra={"fields": {"finished_everything": whole}})
        self.should_exit = True

    async def _end_broken(self) -> None:
        _LOGGER.error("the engine broke down", extra={"fields": {"leaving_after": _BROKEN}})
        await asyncio.sleep(_BROKEN)
        self.should_exit = True

    async def _announce(self) -> None:
        warm_up: asyncio.Task[None] = self.app.state.warm_up
        await asyncio.wait({warm_up})
        error = warm_up.exception()
        if error is None:
            self.announce(self._url())
            return
        _LOGGER.error("warm-up failed", exc_info=error)
        self.sound, self.should_exit = False, True

    def _url(self) -> str:
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def _keep(self, coroutine: Any) -> None:
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
