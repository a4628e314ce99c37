"""Load that does not wait for answers: requests come when they come, as from people who know nothing of one another.

A client that sends its next request when the last one is answered slows down with the server, and so measures it at its
best (coordinated omission). Here arrivals are a Poisson process, and a latency begins when a request was due.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

NO_ANSWER = 0
"""In place of a status: the connection broke, or nothing came in time."""


@dataclass(frozen=True)
class Answer:
    """What became of one request; times are seconds from the first arrival."""

    due: float
    ended: float
    status: int

    @property
    def latency(self) -> float:
        """Seconds from when it was due."""
        return self.ended - self.due


async def offer(ask: Callable[[int], Awaitable[int]], rate: float, seconds: float, seed: int = 0) -> list[Answer]:
    """Send requests for a time, and wait for every answer.

    Args:
        ask: sends request number i and returns the answer's status.
        rate: requests a second, on average.
        seconds: how long they come.
        seed: of the arrivals.
    """
    arrivals = random.Random(seed)
    begin = time.perf_counter()

    async def one(number: int, due: float) -> Answer:
        await asyncio.sleep(max(0.0, begin + due - time.perf_counter()))
        status = await ask(number)
        return Answer(due, time.perf_counter() - begin, status)

    due, tasks = 0.0, []
    while (due := due + arrivals.expovariate(rate)) < seconds:
        tasks.append(asyncio.create_task(one(len(tasks), due)))
    return list(await asyncio.gather(*tasks))


async def keep_busy(ask: Callable[[int], Awaitable[int]], clients: int, number: int) -> list[Answer]:
    """Send ``number`` requests in all, each client its next one as soon as it has an answer."""
    begin = time.perf_counter()
    numbers = iter(range(number))
    answers: list[Answer] = []

    async def client() -> None:
        for i in numbers:
            due = time.perf_counter() - begin
            status = await ask(i)
            answers.append(Answer(due, time.perf_counter() - begin, status))

    await asyncio.gather(*(client() for _ in range(clients)))
    return answers


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value that ``share`` of all are at or below, the nearest of the ranks."""
    ordered = sorted(values)
    return ordered[max(0, min(len(ordered) - 1, round(share * len(ordered)) - 1))]
