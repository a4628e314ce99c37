"""How fast a run is: samples a second, and the share of the machine's matrix rate that it reaches."""

from __future__ import annotations

import time

import torch


class Meter:
    """Counts samples between two readings.

    Args:
        flops_per_sample: of a forward and backward pass, by formula; None where there is none.
        rate: floating-point operations a second that matrices of this dtype reach here, over all processes.
    """

    def __init__(self, flops_per_sample: float | None, rate: float | None) -> None:
        self.flops_per_sample, self.rate = flops_per_sample, rate
        self.began = self.last = time.monotonic()
        self.samples = 0

    @property
    def seconds(self) -> float:
        """Wall time since the run (or its resumption) began."""
        return time.monotonic() - self.began

    def count(self, samples: int) -> None:
        """Add the samples of a step."""
        self.samples += samples

    def reading(self) -> dict[str, float]:
        """Return the figures since the last reading."""
        now = time.monotonic()
        speed = self.samples / max(now - self.last, 1e-9)
        self.last, self.samples = now, 0
        figures = {"samples_per_second": speed}
        if self.flops_per_sample and self.rate:
            figures["mfu"] = speed * self.flops_per_sample / self.rate
        return figures


@torch.no_grad()
def matrix_rate(device: torch.device, dtype: torch.dtype, *, size: int | None = None) -> float:
    """Measure the operations a second of square matrix products, the best of five, in about a second.

    Args:
        device: where.
        dtype: of both factors.
        size: of a side; left out, 8,192 on an accelerator and 1,024 on the CPU.
    """
    size = size or (1024 if device.type == "cpu" else 8192)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):  # the first warms up
        _wait(device)
        began = time.perf_counter()
        torch.mm(left, right)
        _wait(device)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
