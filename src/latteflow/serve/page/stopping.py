"""Stop buttons: what runs for a window ends by itself when its button is pressed.

Gradio can cancel a function from outside, and then now and then shows the window an error; a function that ends by
itself has none of that. When the window goes away, Gradio closes the function, as ever.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

Item = TypeVar("Item")


class Stopped(Exception):
    """The button was pressed."""


class StopButton:
    """The button of all windows; each stops its own."""

    def __init__(self) -> None:
        self._pressed: dict[str, asyncio.Event] = {}

    @contextmanager
    def watched(self, window: str) -> Iterator[asyncio.Event]:
        """Return what is set when a window's button is pressed, for as long as something runs for the window."""
        pressed = self._pressed[window] = asyncio.Event()
        try:
            yield pressed
        finally:
            if self._pressed.get(window) is pressed:
                del self._pressed[window]

    def press(self, window: str) -> None:
        """Stop what runs for a window, if anything does."""
        if window in self._pressed:
            self._pressed[window].set()


async def until(pressed: asyncio.Event, items: AsyncGenerator[Item, None]) -> AsyncGenerator[Item, None]:
    """Yield items as they come, and close where they come from at the end, whatever the end is.

    Raises:
        Stopped: the button was pressed first.
    """
    stop = asyncio.ensure_future(pressed.wait())
    coming: asyncio.Future[Item] | None = None
    try:
        while True:
            coming = asyncio.ensure_future(_next(items))
            await asyncio.wait({coming, stop}, return_when=asyncio.FIRST_COMPLETED)
            if stop.done():
                raise Stopped
            try:
                item = await coming
            except StopAsyncIteration:
                return
            yield item
    finally:
        stop.cancel()
        if coming is not None and not coming.done():
            coming.cancel()
            with suppress(asyncio.CancelledError):
                await coming
        await items.aclose()


async def _next(items: AsyncGenerator[Item, None]) -> Item:
    return await items.__anext__()
