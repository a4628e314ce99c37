"""A set of pictures as figures of fidelity see it: features gathered in one pass, or statistics from a file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from latteflow.errors import UserError
from latteflow.evaluate.feature_networks import FeatureNetwork, Features
from latteflow.evaluate.moments import Moments, Normal, check_finite
from latteflow.evaluate.picture_arrays import pictures_shape, read_pictures, read_statistics, write_statistics

_HALVING_SEED = 0
_AT_ONCE = 1024


@dataclass(frozen=True)
class Measured:
    """What a network says of a set.

    Attributes:
        name: of the set, for reports.
        network: the identity of the network; None where a file does not say.
        size: height and width of the pictures; None where a file does not say.
        pooled: the normal distribution of the features.
        spatial: that of spatial features, None without.
        halves: pooled and spatial moments of two halves that chance made, None where there are statistics alone.
        features: each picture's, float32 (pictures, values), None where they were not kept.
        probabilities: each picture's classes, float32, None likewise.
    """

    name: str
    network: str | None
    size: tuple[int, int] | None
    pooled: Normal
    spatial: Normal | None
    halves: tuple[Sequence[Moments], Sequence[Moments] | None] | None = None
    features: torch.Tensor | None = None
    probabilities: torch.Tensor | None = None

    def save(self, file: Path) -> None:
        """Write the statistics as ADM and pytorch-fid do, with ``n``, the network and the pictures' size beside."""
        height, width = self.size or (0, 0)
        write_statistics(
            file, self.pooled, self.spatial, {"network": self.network or "", "height": height, "width": width}
        )


class Gathering:
    """Features of a set, gathered chunk by chunk.

    Args:
        network: what looks at the pictures.
        keep: keep each picture's features, for precision, recall and the Inception score; statistics need none of that.
    """

    def __init__(self, network: FeatureNetwork, *, keep: bool = True) -> None:
        self.network, self.keep = network, keep
        self.size: tuple[int, int] | None = None
        self._pooled: list[list[Moments]] = [[], []]
        self._spatial: list[list[Moments]] = [[], []]
        self._waiting: list[Features] = []
        self._kept: list[Features] = []
        self._coins = np.random.Generator(np.random.PCG64(_HALVING_SEED))

    def add(self, pictures: torch.Tensor) -> None:
        """Look at uint8 pictures (number, 3, height, width).

        Raises:
            UserError: another size than those before, or features that are not finite.
        """
        size = (pictures.shape[-2], pictures.shape[-1])
        if self.size is not None and size != self.size:
            raise UserError(f"pictures of {_by(size)} among those of {_by(self.size)}: give all of one size")
        self.size = size
        found = self.network(pictures)
        check_finite(found.pooled)
        self._waiting.append(found)
        if sum(len(some.pooled) for some in self._waiting) >= _AT_ONCE:
            self._fold()

    def _fold(self) -> None:
        """Take the features that wait into the moments: matrices of millions of values, so not after every chunk."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        pooled = torch.cat([some.pooled for some in waiting])
        spatial = [some.spatial for some in waiting if some.spatial is not None]
        # A picture's half is chance's, and does not depend on chunks: every second one would part classes in turns.
        second = torch.from_numpy(self._coins.random(len(pooled)) < 0.5)
        for half, rows in enumerate((~second, second)):
            if bool(rows.any()):
                _add(self._pooled[half], pooled[rows])
                if spatial:
                    _add(self._spatial[half], torch.cat(spatial)[rows])
        if self.keep:
            self._kept += [Features(some.pooled, None, some.probabilities) for some in waiting]

    def measured(self, name: str) -> Measured:
        """Return what was gathered.

        Raises:
            UserError: there are too few pictures for a covariance.
        """
        self._fold()
        pooled, spatial = [[part for half in parts for part in half] for parts in (self._pooled, self._spatial)]
        kept = self._kept
        probable = [some.probabilities for some in kept if some.probabilities is not None]
        return Measured(
            name,
            self.network.identity,
            self.size,
            Moments.of_all(pooled).fitted(),
            Moments.of_all(spatial).fitted() if spatial else None,
            (
                [Moments.of_all(half) for half in self._pooled if half],
                [Moments.of_all(half) for half in self._spatial if half] if spatial else None,
            ),
            torch.cat([some.pooled for some in kept]) if kept else None,
            torch.cat(probable) if probable else None,
        )


def measure(network: FeatureNetwork, chunks: Iterable[torch.Tensor], name: str, *, keep: bool = True) -> Measured:
    """Return what a network says of a set.

    Args:
        network: what looks at the pictures.
        chunks: uint8 (some, 3, height, width); how pictures are cut into chunks changes rounding alone.
        name: of the set, for reports.
        keep: keep each picture's features, for precision, recall and the Inception score.

    Raises:
        UserError: too few pictures, pictures of different sizes, or features that are not finite.
    """
    gathering = Gathering(network, keep=keep)
    for chunk in chunks:
        gathering.add(chunk)
    return gathering.measured(name)


def measured_file(file: Path, network: FeatureNetwork) -> Measured:
    """Return a reference from an ``.npz`` file: its pictures (``arr_0``), its statistics (``mu``, ``sigma``), or both.

    Where both are in it, distances are to the statistics, and the pictures give precision, recall and the halves: so
    ADM's evaluator reads its own reference files.

    Raises:
        UserError: no such file, neither is in it, or the statistics are another network's.
    """
    stored = read_statistics(file)
    if pictures_shape(file) is None:
        if stored is None:
            raise UserError(f"{file} holds neither pictures (arr_0) nor statistics (mu, sigma)")
        return _from_statistics(file, stored, network)
    measured = measure(network, read_pictures(file), file.name)
    if stored is None:
        return measured
    known = _from_statistics(file, stored, network)
    if known.size is not None and known.size != measured.size:
        raise UserError(f"{file} holds pictures of another size than its statistics say: make it anew")
    check_width(known.pooled, measured.pooled, file.name)
    return Measured(
        file.name,
        network.identity,
        measured.size,
        known.pooled,
        known.spatial,
        measured.halves,
        measured.features,
        measured.probabilities,
    )


def check_width(one: Normal, other: Normal, name: str) -> None:
    """Refuse statistics of features that are another network's.

    Raises:
        UserError: their numbers of values differ.
    """
    if len(one.mean) != len(other.mean):
        raise UserError(
            f"{name} holds statistics of {len(one.mean)} features, and this network has {len(other.mean)}: measure "
            "both with the same network"
        )


def _from_statistics(
    file: Path, stored: tuple[Normal, Normal | None, dict[str, object]], network: FeatureNetwork
) -> Measured:
    pooled, spatial, about = stored
    by = str(about.get("network") or "") or None
    if by is not None and by != network.identity:
        raise UserError(f"{file} was measured with {by}, and this is {network.identity}: measure the reference anew")
    height, width = (int(str(about.get(side, 0))) for side in ("height", "width"))
    return Measured(file.name, by, (height, width) if height and width else None, pooled, spatial)


def _add(total: list[Moments], features: torch.Tensor) -> None:
    """Put features to a running total, which is an empty list at first."""
    total[:] = [Moments.of_all([*total, Moments.of(features)])]


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
