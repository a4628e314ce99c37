"""Tickets followed from the event loop, without a server."""

import asyncio
import gc

import anyio
import pytest
from fastapi import Request
from starlette.requests import ClientDisconnect

from latteflow.serve.api.tickets import HEARTBEAT, EventStream, events, finished, server_event
from latteflow.serve.engine.requests import DrawRequest, EngineFailed, Failed, Finished, Progress, Ticket

STEP = Progress(1, 2, 0, 0.0, 0.1, 1)


def ticket():
    return Ticket(DrawRequest("x"))


def collected(followed, **options):
    async def collect():
        return [event async for event in events(followed, **options)]

    return anyio.run(collect)


def test_what_was_before_is_told_too_and_the_last_event_ends_it():
    followed = ticket()
    for event in (STEP, Finished(), STEP):
        followed.tell(event)
    assert collected(followed) == [STEP, Finished()]


def test_a_failure_is_raised():
    followed = ticket()
    followed.tell(Failed(EngineFailed("gone")))
    with pytest.raises(EngineFailed, match="gone"):
        collected(followed)


def test_silence_is_told():
    async def first():
        return await anext(events(ticket(), quiet=0.01))

    assert anyio.run(first) is None


def test_telling_a_loop_that_is_gone_is_no_matter():
    followed = ticket()

    async def leave():
        following = events(followed, quiet=0.01)
        await anext(following)
        await following.aclose()

    asyncio.run(leave())
    followed.tell(STEP)
    followed.tell(Finished())
    assert followed.done


def test_who_does_not_read_has_given_up():
    followed, sent = ticket(), []

    async def frames():
        while True:
            yield server_event({"x": 1})

    async def send(message):
        sent.append(message)
        if len(sent) == 3:
            await anyio.sleep_forever()

    async def serve():
        scope = {"type": "http", "asgi": {"spec_version": "2.3"}}
        with anyio.fail_after(20):
            await EventStream(frames(), followed, {}, 0.05)(scope, anyio.sleep_forever, send)

    anyio.run(serve)
    assert followed.cancelled
    assert len(sent) == 3


def test_a_client_that_leaves_is_no_error_to_log():
    followed, complaints = [ticket(), ticket()], []

    async def receive():
        return {"type": "http.disconnect"}

    async def ask():
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        with pytest.raises(ClientDisconnect):
            await finished(Request({"type": "http"}, receive), followed)

    asyncio.run(ask())
    gc.collect()  # what nobody looked at is told of when it goes
    assert complaints == []
    assert all(each.cancelled for each in followed)


def test_a_server_event_is_one_whatever_is_in_it():
    assert server_event({"x": "a\n\ndata: b\r"}, "name") == 'event: name\ndata: {"x": "a\\n\\ndata: b\\r"}\n\n'
    assert HEARTBEAT.startswith(":")
