"""Statistics of trials: what a few seeds can tell of two ways to train, and what they cannot.

Two arms are compared seed by seed: a seed's runs see the same samples and noise in both, so their difference is freer
of chance than either. Differences go through a paired, two-sided t test at 5%. Everything is computed from the numbers
alone, by quadrature over the t distribution's own definition, T = (Z + shift) / S.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from latteflow.errors import UserError

LEVEL = 0.05
"""Chance of a verdict, either way, where there is no difference at all."""
POWER = 0.8
"""Chance of a verdict at the smallest detectable effect."""
FEWEST_SEEDS = 3
"""Below this a verdict is refused: two differences have a spread that is hardly known."""

Verdict = Literal["replicates", "does not replicate", "no verdict"]


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation (n - 1) of one figure over seeds."""

    mean: float
    deviation: float
    number: int


@dataclass(frozen=True)
class Comparison:
    """What paired differences say of a claim; positive differences are in its favour."""

    differences: tuple[float, ...]
    """One a seed, in the figure's own unit."""
    mean: float
    low: float
    high: float
    """The mean's 95% interval, ``low`` to ``high``."""
    p_value: float
    """Two-sided; 1 where nothing differs."""
    detectable: float
    """The smallest true difference that so many seeds with this spread would tell in 80% of cases."""
    verdict: Verdict


def spread(values: Sequence[float]) -> Spread:
    """Return mean and standard deviation of two numbers or more.

    Raises:
        UserError: fewer than two, or one is no number.
    """
    _require_numbers(values, 2)
    mean = sum(values) / len(values)
    return Spread(mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)), len(values))


def compare(
    better: Mapping[int, float], than: Mapping[int, float], *, margin: float = 0.0, larger_is_better: bool = False
) -> Comparison:
    """Compare two arms over the seeds that both have.

    The claim "replicates" if the whole 95% interval of the mean difference is in its favour. It "does not replicate" if
    the whole interval lies below ``margin``, the smallest advantage that would matter: against the claim, or in its
    favour by less than that. Otherwise there is "no verdict".

    Args:
        better: the arm that the claim calls better, figure by seed.
        than: the other.
        margin: in the figure's unit, 0 or more.
        larger_is_better: of the figure; a loss or a distance is better when it is smaller.

    Raises:
        UserError: fewer than three common seeds, or a figure that is no number.
    """
    seeds = sorted(set(better) & set(than))
    sign = 1.0 if larger_is_better else -1.0
    differences = tuple(sign * (better[seed] - than[seed]) for seed in seeds)
    _require_numbers(differences, FEWEST_SEEDS)
    found = spread(differences)
    error = found.deviation / math.sqrt(found.number)
    reach = critical_t(found.number - 1) * error
    low, high = found.mean - reach, found.mean + reach
    verdict: Verdict = "no verdict"
    if low > 0:
        verdict = "replicates"
    elif high < margin:
        verdict = "does not replicate"
    p_value = tail(abs(found.mean) / error, found.number - 1) if error else float(found.mean == 0)
    detectable = smallest_detectable_effect(found.deviation, found.number)
    return Comparison(differences, found.mean, low, high, p_value, detectable, verdict)


def smallest_detectable_effect(deviation: float, seeds: int, *, level: float = LEVEL, power: float = POWER) -> float:
    """Return the true mean difference that a paired, two-sided t test tells with probability ``power``.

    Args:
        deviation: standard deviation of a seed's difference. Of independent runs it is the square root of two times
            the spread of one arm over seeds.
        seeds: pairs, at least two.
        level: of the test.
        power: above ``level``, below 1.
    """
    freedom = seeds - 1
    critical = critical_t(freedom, level)
    shift = _root(lambda shift: power - tail(critical, freedom, shift))
    return shift * deviation / math.sqrt(seeds)


def critical_t(freedom: int, level: float = LEVEL) -> float:
    """Return the c for which |T| exceeds c with probability ``level``, at so many degrees of freedom."""
    return _root(lambda c: tail(c, freedom) - level)


def tail(critical: float, freedom: int, shift: float = 0.0) -> float:
    """Return the probability that |T| exceeds ``critical``: T = (Z + shift) / S, S^2 a chi-square over its freedom.

    ``shift`` 0 is Student's t; another is the noncentral t of a test where there is something to find. Six digits.

    Raises:
        UserError: no degree of freedom: one value has no spread.
    """
    if freedom < 1:
        raise UserError(f"a spread over seeds needs two of them at least: got {freedom + 1}")
    # Simpson's rule over S, whose density falls off as a normal with standard deviation 1 / sqrt(2 freedom) at most.
    s = torch.linspace(0, 1 + 12 / math.sqrt(2 * freedom), 40_001, dtype=torch.float64)
    half = freedom / 2
    log = math.log(2) + half * math.log(half) - math.lgamma(half) - half * s.square()
    density = torch.exp(log + torch.xlogy(torch.tensor(freedom - 1.0, dtype=s.dtype), s))
    beyond = torch.special.ndtr(shift - critical * s) + torch.special.ndtr(-shift - critical * s)
    weights = torch.ones_like(s)
    weights[1:-1:2], weights[2:-1:2] = 4, 2
    return float((weights * density * beyond).sum() * (s[1] - s[0]) / 3)


def at_place(places: Sequence[float], values: Sequence[float], place: float) -> float | None:
    """Return a curve's value at a place between its readings, on the straight line; None outside of them."""
    for (x, y), (next_x, next_y) in zip(
        zip(places, values, strict=True), zip(places[1:], values[1:], strict=True), strict=False
    ):
        if x <= place <= next_x:
            return y + (next_y - y) * (place - x) / (next_x - x)
    return None


def _require_numbers(values: Sequence[float], fewest: int) -> None:
    if len(values) < fewest:
        raise UserError(f"at least {fewest} seeds are wanted, of both arms where two are compared: got {len(values)}")
    if not all(math.isfinite(value) for value in values):
        raise UserError(f"a figure is no number: {list(values)}; a run that diverged has none to compare")


def _root(falls: Callable[[float], float]) -> float:
    """Return where a falling function of positive numbers crosses zero."""
    low, high = 0.0, 1.0
    while falls(high) > 0:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if falls(middle) > 0 else (low, middle)
    return (low + high) / 2
