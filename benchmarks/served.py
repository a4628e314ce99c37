"""A server in a process of its own: started, asked, looked at from outside, and stopped. Linux only."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx

_STARTS_WITHIN = 120.0


class Served:
    """``latteflow serve`` on loopback, on any free port.

    Args:
        options: of the verb.
    """

    def __init__(self, options: Sequence[str] = ()) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "latteflow", "serve", "--port", "0", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()
        if not self.url:
            raise RuntimeError(f"the server ended with {self.process.wait()} before it was ready")
        self.wait_until(ready=True)

    def wait_until(self, *, ready: bool, seconds: float = _STARTS_WITHIN) -> float:
        """Wait for /readyz to say so, or not, and return how long that took.

        Raises:
            TimeoutError: it took longer than ``seconds``.
        """
        begin = time.perf_counter()
        while time.perf_counter() - begin < seconds:
            if self.is_ready() == ready:
                return time.perf_counter() - begin
            time.sleep(0.02)
        raise TimeoutError(f"/readyz did not become {ready} within {seconds} s")

    def is_ready(self) -> bool:
        """Return whether /readyz answers 200."""
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(f"{self.url}/readyz", timeout=5).status_code == 200
        return False

    def metrics(self) -> dict[str, float]:
        """Return every sample of /metrics by its name and labels."""
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        samples = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, value in samples}

    def children(self) -> list[int]:
        """Return the process ids of all that it has started."""
        return _descendants(self.process.pid)

    def resident(self) -> int:
        """Return bytes of memory that it and its children hold."""
        pages = (int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in [self.process.pid, *self.children()])
        return sum(pages) * os.sysconf("SC_PAGE_SIZE")

    def descriptors(self) -> int:
        """Return how many files and sockets it holds open."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def threads(self) -> int:
        """Return how many threads it has."""
        return len(os.listdir(f"/proc/{self.process.pid}/task"))

    def stop(self, number: int = signal.SIGTERM, seconds: float = 60) -> int:
        """Send a signal, wait for the end, and return the exit code."""
        self.process.send_signal(number)
        return self.process.wait(seconds)


@contextlib.contextmanager
def served(options: Sequence[str] = ()) -> Iterator[Served]:
    """Serve for the length of a block, whatever happens in it."""
    server = Served(options)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()


def is_alive(pid: int) -> bool:
    """Say whether a process runs; one that has ended and was not waited for does not."""
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def _descendants(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(FileNotFoundError):  # a thread or process that has just ended
        for task in os.listdir(f"/proc/{pid}/task"):
            for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split():
                found += [int(child), *_descendants(int(child))]
    return found
