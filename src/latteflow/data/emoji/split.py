"""Which pictures are near-twins, and which (concept, style) pairs are held out.

A unit is a (concept, style) pair with all its skin tones. Units with nearly the same picture are joined (transitively)
into components, and a component is held out or trained on as a whole, so that nothing held out has a twin in training.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

Unit = tuple[str, str]
"""(concept, style)."""

HASH_SIDE = 16
"""The hash has one bit per cell of a 16x16 grid (256 bits), the colour check one RGB value per cell."""

HASH_STEP = 2.0
"""Grey levels (of 255) a cell must exceed its left neighbour by to set its bit: flat areas hash to 0, not to noise."""

HASH_DISTANCE = 20
"""Bits of 256 two twins may differ in.

Chosen by eye: up to here pairs are one drawing with another hair, arm or clock hand; from about 24 bits on, faces with
plainly different looks chain into one component (70 of OpenMoji's yellow faces).
"""

COLOUR_DISTANCE = 6.0
"""Mean absolute difference of the 16x16 RGB thumbnails two twins may have, in levels of 255.

It keeps flags and squares of one layout but other colours apart.
"""

HELD_OUT_PART = 0.10
"""The part of all units that is held out."""

HELD_OUT_COMPONENT = 0.02
"""The largest part of the held-out units one component may make up, so that no single family of pictures rules it."""

MIN_OTHER_STYLES = 2
"""In how many styles of the training part every held-out concept must be seen."""

_BLOCK = 512


def thumbnails(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Pictures (N, S, S, 3), S a multiple of 16, as (N, 16, 16, 3) means in 0..255."""
    count, side = pixels.shape[:2]
    cell = side // HASH_SIDE
    grid = pixels.reshape(count, HASH_SIDE, cell, HASH_SIDE, cell, 3)
    return grid.mean(axis=(2, 4), dtype=np.float32)


def perceptual_hashes(thumbs: npt.NDArray[np.float32]) -> npt.NDArray[np.uint64]:
    """The 256-bit difference hash of thumbnails (N, 16, 16, 3): (N, 4) words of 64 bits.

    A bit says that a cell is lighter than its left neighbour; the first column is compared with the last.
    """
    grey = thumbs @ np.asarray([0.299, 0.587, 0.114], dtype=np.float32)
    bits = grey - np.roll(grey, 1, axis=2) > HASH_STEP
    return np.packbits(bits.reshape(len(bits), -1), axis=1).view(np.uint64)


def twin_pairs(
    hashes: npt.NDArray[np.uint64],
    thumbs: npt.NDArray[np.float32],
    hash_distance: int = HASH_DISTANCE,
    colour_distance: float = COLOUR_DISTANCE,
) -> npt.NDArray[np.int64]:
    """All pairs of pictures (i < j) close both in hash and in colour, shape (P, 2), in order."""
    flat = thumbs.reshape(len(thumbs), -1)
    found: list[npt.NDArray[np.int64]] = [np.zeros((0, 2), dtype=np.int64)]
    for start in range(0, len(hashes), _BLOCK):
        block = hashes[start : start + _BLOCK]
        distance = np.zeros((len(block), len(hashes) - start), dtype=np.uint16)
        for word in range(hashes.shape[1]):
            distance += np.bitwise_count(block[:, word, None] ^ hashes[None, start:, word])
        left, right = np.nonzero(distance <= hash_distance)
        later = right > left
        left, right = left[later] + start, right[later] + start
        # In slices: thousands of near copies (one person in many tones) would fill the memory at once.
        for low in range(0, len(left), 8192):
            one, two = left[low : low + 8192], right[low : low + 8192]
            close = np.abs(flat[one] - flat[two]).mean(axis=1) <= colour_distance
            found.append(np.stack([one[close], two[close]], axis=1))
    return np.concatenate(found)


def components(
    units: Sequence[Unit], pairs: npt.NDArray[np.int64], family_of: Mapping[str, str] | None = None
) -> dict[Unit, int]:
    """The component number of every unit.

    Args:
        units: the unit of every picture.
        pairs: twins as indices into ``units``, shape (P, 2).
        family_of: leads from a style to its design family; units of one concept and one family are twins whatever
            their pictures' distance, because they are one drawing in several finishes (Fluent's 3D, flat, modern).

    Components are numbered from 0 by their smallest unit, so the numbers do not depend on the order of the pictures.
    """
    parent: dict[Unit, Unit] = {unit: unit for unit in units}

    def root(unit: Unit) -> Unit:
        while parent[unit] != unit:
            parent[unit] = parent[parent[unit]]
            unit = parent[unit]
        return unit

    first_of: dict[Unit, Unit] = {}
    families = family_of or {}
    drawn_alike = [(first_of.setdefault((unit[0], families.get(unit[1], unit[1])), unit), unit) for unit in parent]
    for left, right in [*drawn_alike, *((units[left], units[right]) for left, right in pairs.tolist())]:
        one, two = root(left), root(right)
        # The smaller unit is the root: every root is then its component's smallest unit.
        parent[max(one, two)] = min(one, two)
    number = {unit: index for index, unit in enumerate(sorted({root(unit) for unit in parent}))}
    return {unit: number[root(unit)] for unit in parent}


def held_out(component_of: dict[Unit, int], part: float = HELD_OUT_PART) -> frozenset[Unit]:
    """The units to hold out: whole components, in the order of their smallest units' SHA-256, up to ``part``.

    A component is passed over (it stays in training) when it is too large, or when holding it out would leave a
    held-out concept with fewer than two other styles in training.
    """
    members: dict[int, list[Unit]] = {}
    for unit in sorted(component_of):
        members.setdefault(component_of[unit], []).append(unit)
    styles = Counter(concept for concept, _ in component_of)
    target = round(part * len(component_of))
    largest = max(1, round(HELD_OUT_COMPONENT * target))
    chosen: set[Unit] = set()
    for group in sorted(members.values(), key=_order):
        taken = Counter(concept for concept, _ in group)
        enough = all(styles[concept] - count >= MIN_OTHER_STYLES for concept, count in taken.items())
        if enough and len(group) <= min(largest, target - len(chosen)):
            chosen.update(group)
            styles.subtract(taken)
    return frozenset(chosen)


def _order(group: list[Unit]) -> str:
    return hashlib.sha256("\n".join(group[0]).encode()).hexdigest()


def check_split(component_of: dict[Unit, int], chosen: frozenset[Unit]) -> None:
    """Check what the split promises.

    Raises:
        ValueError: twins on both sides, or a held-out concept seen in fewer than two other styles in training.
    """
    sides: dict[int, set[bool]] = {}
    for unit, component in component_of.items():
        sides.setdefault(component, set()).add(unit in chosen)
    torn = sorted(component for component, found in sides.items() if len(found) > 1)
    if torn:
        raise ValueError(f"twins on both sides of the split: components {torn[:5]}")
    trained = Counter(concept for concept, style in component_of if (concept, style) not in chosen)
    alone = sorted(concept for concept, _ in chosen if trained[concept] < MIN_OTHER_STYLES)
    if alone:
        raise ValueError(f"held-out concepts seen in fewer than {MIN_OTHER_STYLES} trained styles: {alone[:5]}")
