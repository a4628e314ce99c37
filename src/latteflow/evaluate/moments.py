"""Mean and covariance of features in one pass, in float64, and the Fréchet distance between two of them.

Parts of a set, from any number of shards and processes, are put together exactly (Chan, Golub and LeVeque, 1979), so
that a million pictures need no more memory than two.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from latteflow.errors import UserError


@dataclass(frozen=True)
class Moments:
    """What is known of a set's features once they have been seen.

    Attributes:
        number: of pictures.
        mean: float64 (values,).
        scatter: the sum over pictures of the outer product of their deviation from the mean, float64 (values, values).
    """

    number: int
    mean: torch.Tensor
    scatter: torch.Tensor

    @classmethod
    def of(cls, features: torch.Tensor) -> Moments:
        """Return the moments of features (pictures, values), of at least one picture.

        Raises:
            UserError: some of them are not finite.
        """
        check_finite(features)
        features = features.double()
        mean = features.mean(dim=0)
        deviations = features - mean
        return cls(len(features), mean, deviations.T @ deviations)

    @staticmethod
    def of_all(parts: Iterable[Moments]) -> Moments:
        """Return the moments of all parts together; rounding apart, their order changes nothing.

        Raises:
            UserError: there is no part, or parts have different numbers of values.
        """
        parts = list(parts)
        if not parts:
            raise UserError("there are no pictures to measure: give at least one")
        total, *rest = parts
        for part in rest:
            total = total.merged(part)
        return total

    def merged(self, other: Moments) -> Moments:
        """Return the moments of both sets together.

        Raises:
            UserError: they have different numbers of values.
        """
        if self.mean.shape != other.mean.shape:
            raise UserError(f"{_different(len(self.mean), len(other.mean))}: measure both with the same network")
        number = self.number + other.number
        apart = other.mean - self.mean
        between = torch.outer(apart, apart) * (self.number * other.number / number)
        return Moments(number, self.mean + apart * (other.number / number), self.scatter + other.scatter + between)

    def fitted(self) -> Normal:
        """Return the normal distribution with this mean and covariance.

        Raises:
            UserError: there are no more pictures than values, which leaves the covariance singular.
        """
        values = len(self.mean)
        if self.number <= values:
            raise UserError(
                f"a covariance of {values} features needs more pictures than that: got {self.number}; take more"
            )
        return Normal(self.mean, self.scatter / (self.number - 1), self.number)


@dataclass(frozen=True)
class Normal:
    """A normal distribution of features: all that a Fréchet distance looks at.

    Attributes:
        mean: float64 (values,).
        covariance: float64 (values, values), without bias.
        number: of pictures it was fitted to; None where a file does not say.
    """

    mean: torch.Tensor
    covariance: torch.Tensor
    number: int | None = None

    def moments(self) -> Moments:
        """Return the moments it was fitted to, to merge them with others.

        Raises:
            UserError: it is not known how many pictures there were.
        """
        if self.number is None:
            raise UserError("statistics that do not say of how many pictures they are cannot be merged: give their n")
        return Moments(self.number, self.mean, self.covariance * (self.number - 1))

    def frechet_distance(self, other: Normal) -> float:
        """Return the squared Fréchet distance to another, of the same network's features.

        Raises:
            UserError: they have different numbers of values, or some are not finite.
        """
        if self.mean.shape != other.mean.shape:
            raise UserError(f"{_different(len(self.mean), len(other.mean))}: measure both with the same network")
        for one in (self, other):
            check_finite(one.mean)
            check_finite(one.covariance)
        return distance_of_normals(self.mean, self.covariance, other.mean, other.covariance)


def distance_of_normals(
    mean: torch.Tensor, covariance: torch.Tensor, other_mean: torch.Tensor, other_covariance: torch.Tensor
) -> float:
    """Return |m - n|^2 + tr(A + B - 2 (A B)^(1/2)), whose last trace is that of (A^(1/2) B A^(1/2))^(1/2).

    Args:
        mean: m, (values,).
        covariance: A, (values, values), symmetric and without negative eigenvalues but for rounding.
        other_mean: n.
        other_covariance: B.
    """
    root = _square_root(covariance)
    mixed = torch.linalg.eigvalsh(root @ other_covariance @ root).clamp_min(0).sqrt().sum()
    apart = (mean - other_mean).square().sum()
    return float(apart + covariance.trace() + other_covariance.trace() - 2 * mixed)


def check_finite(values: torch.Tensor) -> None:
    """Refuse features that are not finite.

    Raises:
        UserError: some are not; the first row is named.
    """
    if not bool(values.isfinite().all()):
        rows = values.reshape(len(values), -1).isfinite().all(dim=1).logical_not().nonzero().flatten()
        raise UserError(
            f"features are not finite, in {len(rows)} of {len(values)} rows, the first is row {int(rows[0])}: look at "
            "what was measured"
        )


def _square_root(symmetric: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(symmetric)
    return vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T


def _different(one: int, other: int) -> str:
    return f"features of {one} values cannot be compared with {other}"
