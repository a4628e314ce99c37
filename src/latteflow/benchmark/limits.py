"""What the machine itself can do: the limits that every speed is held against."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from latteflow.benchmark.measure import copy_bandwidth, interleaved, read_bandwidth
from latteflow.benchmark.report import Page, Settings, large, table
from latteflow.train.meter import matrix_rate


@dataclass(frozen=True)
class Limits:
    """A machine's rates."""

    matrix_rate: float
    """Operations a second of large square matrix products."""
    copy_bandwidth: float
    """Bytes a second, read and written."""
    read_bandwidth: float
    """Bytes a second."""


def measure_limits(settings: Settings) -> Limits:
    """Measure this machine, in seconds."""
    device, size = settings.device, 2**24 if settings.quick else 2**28
    rate = max(matrix_rate(device, settings.dtype) for _ in range(settings.rounds(3)))
    return Limits(rate, copy_bandwidth(device, size=size), read_bandwidth(device, size=size))


def limits_rows(limits: Limits) -> str:
    """Return the limits as a sentence for other pages."""
    return (
        f"Limits measured beside: matrix products {large(limits.matrix_rate)}FLOP/s, copies "
        f"{large(limits.copy_bandwidth)}B/s (read and written), reads {large(limits.read_bandwidth)}B/s."
    )


def limits_page(settings: Settings) -> Page:
    """Measure the rates, and those of products at the shapes of a step of the 2B geometry."""
    limits = measure_limits(settings)
    rows = [
        ("square matrix products", f"{large(limits.matrix_rate)}FLOP/s"),
        ("copy, bytes read and written", f"{large(limits.copy_bandwidth)}B/s"),
        ("read (float32 sum)", f"{large(limits.read_bandwidth)}B/s"),
    ]
    shapes = ((128, 1536, 8960), (128, 8960, 1536), (128, 1536, 1536), (2, 2048, 5632))
    with torch.no_grad():
        pairs = {shape: _factors(shape, settings) for shape in shapes}
        timings = interleaved(
            {str(shape): lambda number, pair=pair: torch.mm(*pair) for shape, pair in pairs.items()},
            rounds=settings.rounds(50),
            device=settings.device,
            warm_up=3,
        )
    for rows_, inner, columns in shapes:
        median = timings[str((rows_, inner, columns))].median
        rate, read = 2 * rows_ * inner * columns / median, inner * columns * settings.dtype.itemsize / median
        rows.append(
            (f"({rows_} x {inner}) times ({inner} x {columns})", f"{large(rate)}FLOP/s, weights at {large(read)}B/s")
        )
    made = (
        f"Best of several runs, {settings.dtype_name}. Square products of 1,024 a side on a CPU and 8,192 elsewhere; "
        "copy and read of 256 MiB (16 with --quick). Products of a step's shapes: the median of 50 in turns, one "
        "weight each, so smaller ones may come from a cache."
    )
    return Page("limits", "What this machine can do", made, table(("what", "measured"), rows))


def _factors(shape: tuple[int, int, int], settings: Settings) -> tuple[torch.Tensor, torch.Tensor]:
    rows, inner, columns = shape
    left, weight = torch.randn(rows, inner), torch.randn(columns, inner)
    return left.to(settings.device, settings.dtype), weight.to(settings.device, settings.dtype).t()
