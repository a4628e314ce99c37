"""A stage of the group pipeline as an actor of Ray: the same worker and the same router, on any machine with room.

What is said goes as the bytes that pipes carry, and is checked like them; Ray pickles nothing but bytes.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import RayError

from latteflow.errors import UserError
from latteflow.serve.executors.codec import CodecError, Packet, Ready, Refusal, decode, encode
from latteflow.serve.executors.stage import StageSettings, StageWorker, load
from latteflow.serve.executors.stage_process import Inbox, Report

_LONGEST_REFUSAL = 4096


class StageHost:
    """What runs in the actor: a stage's worker, a forward a call."""

    _worker: StageWorker

    def load(self, told: str) -> list[bytes]:
        """Load the group's weights, as settings in JSON say; return what the router should hear."""
        try:
            self._worker = load(StageSettings.model_validate_json(told))
        except UserError as error:
            return [encode(Packet(Refusal(message=str(error)[:_LONGEST_REFUSAL])))]
        return [encode(Packet(Ready()))]

    def work(self, heard: list[bytes]) -> tuple[list[bytes], bool]:
        """Hear what the router says, and make a forward; return what it should hear, and whether there is more to do.

        Raises:
            CodecError: what was heard makes no sense.
        """
        for packet in heard:
            self._worker.take(decode(packet))
        return [encode(packet) for packet in self._worker.advance()], self._worker.busy


class StageActor:
    """A stage in an actor, which ends with this process.

    Ray starts none in its place: the router does, and knows what to tell the new one.

    Args:
        settings: of the stage.
        inbox: where what it says is put.
        needs: what it takes of Ray's resources, such as ``{"CPU": 1, "GPU": 1}``.
    """

    def __init__(self, settings: StageSettings, inbox: Inbox, needs: Mapping[str, float]) -> None:
        others = dict(needs)
        options = {"num_cpus": others.pop("CPU", 0), "num_gpus": others.pop("GPU", 0), "resources": others}
        self._actor: Any = ray.remote(StageHost).options(**options, max_restarts=0).remote()
        self._beat = settings.beat
        self._heard_at = time.monotonic()
        self._outbox: queue.SimpleQueue[Packet | None] = queue.SimpleQueue()
        told = settings.model_dump_json()
        threading.Thread(target=self._talk, args=(told, inbox), name="latteflow-stage-actor", daemon=True).start()

    @property
    def silent_for(self) -> float:
        """Seconds since it last said something, or was started."""
        return time.monotonic() - self._heard_at

    def send(self, packet: Packet) -> None:
        """Say something to it; never blocks."""
        self._outbox.put(packet)

    def end(self) -> None:
        """Have it end soon; does not wait."""
        self._outbox.put(None)

    def kill(self, grace: float = 0.0) -> None:
        """End it for certain. A stage has nothing to finish, so there is no reason to wait."""
        self._outbox.put(None)
        ray.kill(self._actor)

    def _talk(self, told: str, inbox: Inbox) -> None:
        """Call the actor again and again, for as long as it answers."""
        try:
            self._report(ray.get(self._actor.load.remote(told)), inbox)
            busy = False
            while (packets := self._gathered(busy)) is not None:
                said, busy = ray.get(self._actor.work.remote([encode(packet) for packet in packets]))
                self._report(said, inbox)
        except (RayError, CodecError):  # of a mistake in the actor, RayTaskError, which is one of them
            return
        finally:
            inbox.put(Report(self, None))

    def _report(self, said: list[bytes], inbox: Inbox) -> None:
        self._heard_at = time.monotonic()
        for packet in said:
            inbox.put(Report(self, decode(packet)))

    def _gathered(self, busy: bool) -> list[Packet] | None:
        """Return what is to be said, after a while nothing; None if that was all."""
        found: list[Packet | None] = []
        try:
            if not busy:
                found.append(self._outbox.get(timeout=self._beat))
            while True:
                found.append(self._outbox.get_nowait())
        except queue.Empty:
            packets = [packet for packet in found if packet is not None]
            return packets if len(packets) == len(found) else None
