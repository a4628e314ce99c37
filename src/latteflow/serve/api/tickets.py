"""Tickets of the engine's threads, followed from the event loop; whoever stops following has given them up."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import anyio
from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from latteflow.errors import UserError
from latteflow.serve.api.errors import error_of
from latteflow.serve.engine.requests import Event, Failed, Finished, Refused, Ticket

HEARTBEAT = ": waiting\n\n"
"""A comment of server-sent events, which says that the stream lives: proxies cut silent ones."""


async def finished(request: Request, tickets: Sequence[Ticket]) -> list[Finished]:
    """Wait for all tickets; where one fails, or the client leaves, all others are given up.

    Raises:
        Refused: one failed.
        UserError: one asked for something that cannot be.
        ClientDisconnect: nobody is waiting any more.
    """
    work = asyncio.gather(*(_end(ticket) for ticket in tickets))
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientDisconnect
        return await work
    finally:
        for ticket in tickets:
            ticket.cancel()
        work.cancel()
        gone.cancel()
        await asyncio.gather(work, gone, return_exceptions=True)  # or the loop logs that nobody looked at their ends


async def events(ticket: Ticket, quiet: float = 15.0) -> AsyncIterator[Event | None]:
    """Yield a ticket's events up to ``Finished``, and None where nothing has happened for ``quiet`` seconds.

    Raises:
        Refused: it failed.
        UserError: it asked for something that cannot be.
    """
    queue: asyncio.Queue[Event] = asyncio.Queue()
    ticket.subscribe(_into_loop(queue.put_nowait))
    while True:
        event = None
        with anyio.move_on_after(quiet):
            event = await queue.get()
        if isinstance(event, Failed):
            raise event.error
        yield event
        if isinstance(event, Finished):
            return


def server_event(data: Mapping[str, Any] | str, name: str | None = None) -> str:
    """Return a server-sent event as it goes over the wire."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    return (f"event: {name}\n" if name else "") + f"data: {text}\n\n"


class EventStream(StreamingResponse):
    """Server-sent events of a ticket, which is given up when the client leaves or takes too long to read.

    Args:
        frames: events as ``server_event`` returns them.
        ticket: what they tell of.
        headers: of the answer.
        send_seconds: for the client to take an event.
    """

    media_type = "text/event-stream"

    def __init__(
        self, frames: AsyncIterator[str], ticket: Ticket, headers: Mapping[str, str], send_seconds: float
    ) -> None:
        super().__init__(_with_error(frames), headers={**headers, "X-Accel-Buffering": "no"})
        self.ticket, self.send_seconds = ticket, send_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events as they come."""

        async def send_in_time(message: Message) -> None:
            with anyio.fail_after(self.send_seconds):
                await send(message)

        try:
            with suppress(TimeoutError):  # the server closes a connection whose answer was not ended
                await super().__call__(scope, receive, send_in_time)
        finally:
            self.ticket.cancel()


async def _with_error(frames: AsyncIterator[str]) -> AsyncIterator[str]:
    try:
        async for frame in frames:
            yield frame
    except (Refused, UserError) as error:
        yield server_event(error_of(error).body(), "error")


async def _end(ticket: Ticket) -> Finished:
    """Wait for the last event, and let no other one wake the event loop."""
    end: asyncio.Future[Finished | Failed] = asyncio.get_running_loop().create_future()
    settle = _into_loop(lambda event: None if end.done() else end.set_result(event))
    ticket.subscribe(lambda event: settle(event) if isinstance(event, Finished | Failed) else None)
    last = await end
    if isinstance(last, Failed):
        raise last.error
    return last


def _into_loop(listener: Callable[[Any], None]) -> Callable[[Event], None]:
    """Return a listener for the engine's threads that has this one called in the event loop."""
    loop = asyncio.get_running_loop()

    def tell(event: Event) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody is waiting
            loop.call_soon_threadsafe(listener, event)

    return tell


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
