"""How things are timed: cases take turns in one run, and a machine's own limits are measured beside them."""

from __future__ import annotations

import re
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch


@dataclass(frozen=True)
class Timing:
    """The seconds of one case, in the order they were taken."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.seconds)

    @property
    def least(self) -> float:
        """The shortest: what is left where other work disturbed the least."""
        return min(self.seconds)

    @property
    def low(self) -> float:
        """The 10th percentile (of few values the lowest)."""
        return sorted(self.seconds)[len(self.seconds) // 10]

    @property
    def high(self) -> float:
        """The 90th percentile (of few values the highest)."""
        return sorted(self.seconds)[-1 - len(self.seconds) // 10]


def interleaved(
    cases: Mapping[str, Callable[[int], object]],
    *,
    rounds: int,
    device: torch.device,
    seconds: float = float("inf"),
    least: int = 3,
    warm_up: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time cases in turns: every round runs each once, and starts with the next, so that none always follows another.

    Args:
        cases: by name; called with the number of the call, from 0, warm-up included.
        rounds: at most.
        device: what is waited for before a clock is read.
        seconds: a budget: past it no further round begins, once there are ``least``.
        least: rounds whatever they take.
        warm_up: rounds before the first that counts.
        clock: in seconds.
    """
    names, taken = list(cases), {name: list[float]() for name in cases}
    began = clock()
    for number in range(warm_up + rounds):
        if number >= warm_up + least and clock() - began > seconds:
            break
        first = number % len(names)
        for name in names[first:] + names[:first]:
            took = timed(partial(cases[name], number), device, clock)
            if number >= warm_up:
                taken[name].append(took)
    return {name: Timing(tuple(values)) for name, values in taken.items()}


def timed(call: Callable[[], object], device: torch.device, clock: Callable[[], float] = time.perf_counter) -> float:
    """Return the seconds of one call, the device's work included."""
    wait(device)
    began = clock()
    call()
    wait(device)
    return clock() - began


def wait(device: torch.device) -> None:
    """Wait until the device has done what it was given; a CPU has."""
    if device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)


def copy_bandwidth(device: torch.device, *, size: int = 2**28) -> float:
    """Measure the bytes a second of a large copy, those read and those written, the best of five.

    Args:
        device: where.
        size: bytes of the source, far more than caches hold.
    """
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)  # the first touch of memory is not the copy's
    return 2 * size / min(timed(lambda: target.copy_(source), device) for _ in range(5))


def read_bandwidth(device: torch.device, *, size: int = 2**28) -> float:
    """Measure the bytes a second at which numbers are only read (a float32 sum), the best of five.

    Args:
        device: where.
        size: bytes, far more than caches hold.
    """
    source = torch.ones(size // 4, device=device)
    return size / min(timed(source.sum, device) for _ in range(6))


def peak_bytes(device: torch.device) -> int:
    """Return the most memory so far: of the whole process on a CPU, of PyTorch's tensors on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():  # ru_maxrss would begin with the parent's, which it inherits on Linux
        return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1])  # type: ignore[index]
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
