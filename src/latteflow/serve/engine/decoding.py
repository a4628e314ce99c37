"""The decoder on its own thread: latents to pictures, several at a time, while the next steps run."""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from PIL import Image

from latteflow.serve.engine.requests import Ticket

Waiting: TypeAlias = tuple[Ticket, torch.Tensor]


class DecodingThread:
    """Decodes what it is handed, those of one size together.

    Args:
        decode: latents (number, channels, H, W) to pictures.
        done: called in this thread with a ticket and its picture.
        failed: called in this thread, once, with the error that ended it.
        most: pictures at a time.
    """

    def __init__(
        self,
        decode: Callable[[torch.Tensor], Sequence[Image.Image]],
        done: Callable[[Ticket, Image.Image], None],
        failed: Callable[[BaseException], None],
        most: int,
    ) -> None:
        self._decode, self._done, self._failed, self._most = decode, done, failed, most
        self._queue: queue.SimpleQueue[Waiting | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="latteflow-decode", daemon=True)
        self._thread.start()

    def put(self, ticket: Ticket, latents: torch.Tensor) -> None:
        """Hand over finished latents, (1, channels, H, W)."""
        self._queue.put((ticket, latents))

    def close(self) -> None:
        """Decode what was handed over, and end."""
        self._queue.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        try:
            while self._work():
                pass
        finally:
            if (error := sys.exc_info()[1]) is not None:
                self._failed(error)

    def _work(self) -> bool:
        """Decode all that waits, after waiting for something; return whether more may come."""
        waiting = [self._queue.get()]
        while not self._queue.empty():
            waiting.append(self._queue.get())
        sizes: dict[torch.Size, list[Waiting]] = {}
        for each in waiting:
            if each is not None:
                sizes.setdefault(each[1].shape, []).append(each)
        for same in sizes.values():
            for begin in range(0, len(same), self._most):
                some = same[begin : begin + self._most]
                pictures = self._decode(torch.cat([latents for _, latents in some]))
                for (ticket, _), picture in zip(some, pictures, strict=True):
                    self._done(ticket, picture)
        return None not in waiting
