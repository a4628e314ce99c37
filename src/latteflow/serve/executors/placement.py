"""Which placement serves better: one group to a process, or whole engines side by side.

A forward of group k for b pictures takes s_k(b) = fixed_k + each_k · b seconds, and a picture needs n_k of them. With B
pictures a forward at most, and pictures arriving at random at rate λ:

*Group pipeline.* Each of the K stages works off its own pictures, all in one forward; those that may be under way at
a time are spread over the stages, so B is no more than their K-th part. The throughput is that of the slowest stage,
min over k of B / (n_k s_k(B)). A picture shares its forwards with those that arrive during its stay in the
stage (Little's law), b_k = 1 + λ n_k s_k(b_k), so b_k = (1 + λ n_k fixed_k) / (1 - λ n_k each_k), at most B, and it
takes sum over k of n_k s_k(b_k).

*D whole engines*, each with λ / D of the pictures. One has to work for every group in turn, so its throughput is
B / sum of n_k s_k(B). Pictures gather to cohorts that go through all groups together, of c pictures: those that arrive
during one cohort's run, c = (λ/D) sum of n_k s_k(c), at least 1, at most B. A picture takes one run, and waits for
another where it finds all engines busy, with probability ρ^D, ρ = min(1, (λ/D) sum of n_k s_k(1)).

Latencies agree with a simulation of the engine's policy within 15 %, and throughputs within 20 %, from weight-bound to
compute-bound steps (tests/serve/test_placement.py), if ``patience`` leaves cohorts whole: if it is no less than an
interval's steps. Prompts, the decoder and unequal pictures are left out. [D]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from latteflow.serve.executors.cost import Cost


@dataclass(frozen=True)
class Work:
    """What a picture needs of one group."""

    steps: int
    """n_k, forwards it takes part in."""
    cost: Cost
    """Of one."""

    def seconds(self, pictures: float) -> float:
        """Return what all of a picture's forwards take, each shared by a number of pictures."""
        return self.steps * self.cost.seconds(pictures)


def pipeline_throughput(work: Sequence[Work], most: int) -> float:
    """Return pictures a second of a saturated group pipeline.

    Args:
        work: of every group, as costly as where its stage is.
        most: B, pictures a forward.
    """
    return most / max(each.seconds(most) for each in work)


def pipeline_latency(work: Sequence[Work], most: int, rate: float) -> float:
    """Return the mean seconds of a picture in a group pipeline, infinite where more arrive than it can draw.

    Args:
        work: of every group, as costly as where its stage is.
        most: B, pictures a forward.
        rate: λ, pictures that arrive a second.
    """
    if rate >= pipeline_throughput(work, most):
        return float("inf")
    return sum(each.seconds(_gathered(1 + rate * each.steps * each.cost.fixed, each, rate, most)) for each in work)


def engines_throughput(work: Sequence[Work], most: int, engines: int) -> float:
    """Return pictures a second of saturated engines.

    Args:
        work: of every group, as costly as in an engine.
        most: B, pictures a forward.
        engines: D.
    """
    return engines * most / sum(each.seconds(most) for each in work)


def engines_latency(work: Sequence[Work], most: int, engines: int, rate: float) -> float:
    """Return the mean seconds of a picture where engines stand side by side; as ``pipeline_latency``."""
    if rate >= engines_throughput(work, most, engines):
        return float("inf")
    own = rate / engines
    whole = Work(
        1, Cost(sum(each.seconds(0) for each in work), sum(each.seconds(1) - each.seconds(0) for each in work))
    )
    run = whole.seconds(_gathered(own * whole.cost.fixed, whole, own, most))
    busy = min(1.0, own * whole.seconds(1))
    return run * (1 + busy**engines)


def pipeline_is_better(
    stages: Sequence[Work], engine: Sequence[Work], *, most: int, active: int, engines: int, load: float
) -> bool:
    """Say whether a picture is done sooner in the pipeline, at a load of the larger of both throughputs.

    Args:
        stages: of every group, as costly as where its stage is.
        engine: of every group, as costly as in an engine.
        most: pictures a forward.
        active: pictures under way in one engine, or in the pipeline.
        engines: how many the same devices would hold.
        load: share of the throughput, in (0, 1): what the placement is to be good at.
    """
    piped, whole = max(1, min(most, active // len(stages))), min(most, active)
    rate = load * max(pipeline_throughput(stages, piped), engines_throughput(engine, whole, engines))
    return pipeline_latency(stages, piped, rate) < engines_latency(engine, whole, engines, rate)


def _gathered(pictures: float, work: Work, rate: float, most: int) -> float:
    """Return ``pictures`` / (1 - rate · n · each), within 1 and ``most``: the solution of both formulas for a batch."""
    left = 1 - rate * work.steps * work.cost.each
    return float(most) if left <= 0 else min(max(pictures / left, 1.0), float(most))
