"""A stage as the router sees it: a process at the other end of a pipe, whose end is an event like any other."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
import time
from multiprocessing import Pipe
from typing import NamedTuple, Protocol, TypeAlias

from latteflow.serve.executors.codec import MOST_BYTES, CodecError, Packet, decode, encode
from latteflow.serve.executors.stage import StageSettings


class Stage(Protocol):
    """What a router needs of a stage. What the stage says comes to the inbox that it was started with."""

    @property
    def silent_for(self) -> float:
        """Seconds since it last said something, or was started."""
        ...

    def send(self, packet: Packet) -> None:
        """Say something to it; never blocks. If it is no more, do nothing: that it ended comes by the inbox."""

    def end(self) -> None:
        """Have it end soon; does not wait."""

    def kill(self, grace: float = 0.0) -> None:
        """End it for certain, by force if it is there after ``grace`` seconds, and let go of it."""


class Report(NamedTuple):
    """What came from a stage."""

    stage: Stage
    packet: Packet | None
    """None if it ended, or said what makes no sense."""


Inbox: TypeAlias = "queue.SimpleQueue[Report]"


class StageProcess:
    """A stage in a process of its own.

    A thread writes and a thread reads, because a stopped process neither takes nor gives anything, and whoever waits
    for it would stand still with it. The process has no descriptor but its end of the pipe: when this process dies,
    however it dies, the pipe ends, and so does the stage.

    Args:
        settings: of the stage; its ``pipe`` is filled in.
        inbox: where what it says is put.
    """

    def __init__(self, settings: StageSettings, inbox: Inbox) -> None:
        self._pipe, theirs = Pipe()
        told = settings.model_copy(update={"pipe": theirs.fileno()}).model_dump_json()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "latteflow.serve.executors.stage", told],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": _search_path(), "PYTHONSAFEPATH": "1"},
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # signals meant for the server's group are the server's to act on
            )
        self._heard_at = time.monotonic()
        self._outbox: queue.SimpleQueue[Packet | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._read, args=(inbox,), name="latteflow-stage-reader", daemon=True),
            threading.Thread(target=self._write, name="latteflow-stage-writer", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    @property
    def silent_for(self) -> float:
        """Seconds since it last said something, or was started."""
        return time.monotonic() - self._heard_at

    def send(self, packet: Packet) -> None:
        """Say something to it; never blocks."""
        self._outbox.put(packet)

    def end(self) -> None:
        """Have it end soon; does not wait."""
        self._process.terminate()

    def kill(self, grace: float = 0.0) -> None:
        """End it for certain, by force if it is there after ``grace`` seconds, and let go of it."""
        try:
            self._process.wait(grace)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._outbox.put(None)
        for thread in self._threads:
            thread.join()  # the other end of the pipe is closed: neither waits for anything
        self._pipe.close()

    def _read(self, inbox: Inbox) -> None:
        try:
            while True:
                packet = decode(self._pipe.recv_bytes(MOST_BYTES))
                self._heard_at = time.monotonic()
                inbox.put(Report(self, packet))
        except (EOFError, OSError, CodecError):
            inbox.put(Report(self, None))

    def _write(self) -> None:
        try:
            while (packet := self._outbox.get()) is not None:
                self._pipe.send_bytes(encode(packet))
        except OSError:
            return
        finally:
            self._process.kill()  # a stage that hears nothing more is of no use, and that it ended the reader tells


def _search_path() -> str:
    """Return where this process finds modules: a stage looks there, and not in the folder that it happens to run in."""
    return os.pathsep.join(path or os.getcwd() for path in sys.path)
