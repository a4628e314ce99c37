"""FID, sFID, Inception score, precision and recall of drawn pictures, each figure with what it depends on.

A figure without guidance stands beside every one with it, and beside both what the reference itself scores: its two
halves against one another, below which no distance to it means anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from latteflow.errors import UserError
from latteflow.evaluate.feature_networks import FeatureNetwork
from latteflow.evaluate.measured import Measured, check_width, measure
from latteflow.evaluate.moments import Moments, Normal
from latteflow.evaluate.samples import Samples
from latteflow.evaluate.scores import NEIGHBOUR, inception_score, precision_and_recall

MOST_SPLITS = 10
_CONDITIONS = ("model", "dtype", "guidance_scale", "steps", "scheduler", "seed", "device")

Figure = dict[str, Any]


def fidelity_report(
    network: FeatureNetwork, reference: Measured, folders: Sequence[Path]
) -> dict[str, dict[str, Figure]]:
    """Return the figures of drawn sets, and the floor of the reference.

    Args:
        network: what pictures are compared by, the reference too.
        reference: real pictures (``measure``) or their file (``measured_file``).
        folders: sets that ``draw_samples`` wrote, of one model, alike but for ``guidance_scale``: at least one with
            and one without guidance.

    Returns:
        ``"guidance 1"``, ``"guidance 4"``, ..., and ``"halves of the reference"``; in each, by the figure's name, such
        as ``"FID"`` or ``"FD-EffLite0"``: ``value``, and ``network``, ``reference``, ``reference_samples``,
        ``samples``, ``size``, ``model``, ``dtype``, ``guidance_scale``, ``steps``, ``scheduler``, ``seed`` and
        ``device``; with the Inception score, also ``spread`` and ``splits``. ``value`` is None where the reference has
        not got what a figure needs; ``why`` says what.

    Raises:
        UserError: sets with or without guidance are missing, or of different models or another size than the
            reference, or too small for a covariance; or the reference is another network's.
    """
    sets = [Samples(folder) for folder in folders]
    _check_sets(sets)
    if reference.network not in (None, network.identity):
        raise UserError(
            f"{reference.name} was measured with {reference.network}, and this is {network.identity}: measure the "
            "reference anew"
        )
    for samples in sets:
        check_size(samples.size, reference)
    report: dict[str, dict[str, Figure]] = {}
    for samples in sets:
        drawn = measure(network, samples.chunks(), str(samples.folder))
        conditions = {name: samples.made_with[name] for name in _CONDITIONS}
        report[f"guidance {samples.made_with['guidance_scale']:g}"] = figures_of(network, drawn, reference, conditions)
    report["halves of the reference"] = floor_of(network, reference)
    return report


def figures_of(
    network: FeatureNetwork, drawn: Measured, reference: Measured, conditions: Mapping[str, Any]
) -> dict[str, Figure]:
    """Return the figures of one set, by their names.

    Args:
        network: what both were measured with.
        drawn: the set, with its features kept.
        reference: what it is compared with.
        conditions: how the set was made; they go into every figure.

    Raises:
        UserError: the sets are of different sizes or features, or features were not kept.
    """
    if drawn.features is None:
        raise UserError(f"the features of {drawn.name} were not kept: measure it with keep=True")
    if drawn.size is not None:
        check_size(drawn.size, reference)
    check_width(reference.pooled, drawn.pooled, reference.name)
    about = {**_about(network, reference), "samples": drawn.pooled.number, "size": drawn.size, **conditions}
    found: dict[str, Figure] = {"FID": {"value": drawn.pooled.frechet_distance(reference.pooled)}}
    if drawn.spatial is not None:
        found["sFID"] = _distance(drawn.spatial, reference.spatial)
    if drawn.probabilities is not None:
        found["IS"] = _score(drawn.probabilities)
    precision, recall = _shares(drawn, reference)
    found |= {"precision": precision, "recall": recall}
    return {network.figure(name): {**figure, **about} for name, figure in found.items()}


def floor_of(network: FeatureNetwork, reference: Measured) -> dict[str, Figure]:
    """Return the distances between two halves of the reference that chance made.

    Args:
        network: what the reference was measured with.
        reference: real pictures.
    """
    pooled, spatial = reference.halves or (None, None)
    found = {"FID": _between_halves(pooled)}
    if reference.spatial is not None:
        found["sFID"] = _between_halves(spatial)
    about = _about(network, reference)
    return {network.figure(name): {**figure, **about} for name, figure in found.items()}


def _about(network: FeatureNetwork, reference: Measured) -> Figure:
    return {
        "network": network.identity,
        "reference": reference.name,
        "reference_samples": reference.pooled.number,
    }


def _distance(drawn: Normal, reference: Normal | None) -> Figure:
    if reference is None:
        return {"value": None, "why": "the reference holds no spatial features: no mu_s and sigma_s, no pictures"}
    return {"value": drawn.frechet_distance(reference)}


def _score(probabilities: torch.Tensor) -> Figure:
    pictures, classes = probabilities.shape
    splits = max(1, min(MOST_SPLITS, pictures // classes))
    value, spread = inception_score(probabilities, splits)
    return {"value": value, "spread": spread, "splits": splits}


def _shares(drawn: Measured, reference: Measured) -> tuple[Figure, Figure]:
    if reference.features is None or drawn.features is None:
        missing = {"value": None, "why": "the reference holds statistics alone, and balls need its pictures (arr_0)"}
        return missing, missing
    precision, recall = precision_and_recall(reference.features, drawn.features)
    about = {"neighbour": NEIGHBOUR, "reference_pictures": len(reference.features)}
    return {"value": precision, **about}, {"value": recall, **about}


def _between_halves(halves: Sequence[Moments] | None) -> Figure:
    if halves is None:
        return {"value": None, "why": "the reference holds statistics alone, which cannot be halved"}
    numbers = [half.number for half in halves]
    values = len(halves[0].mean)
    if len(halves) < 2 or min(numbers) <= values:
        return {
            "value": None,
            "why": f"half of the reference, {min(numbers)} pictures, is too few for a covariance of {values} features",
        }
    return {"value": halves[0].fitted().frechet_distance(halves[1].fitted()), "samples": numbers}


def _check_sets(sets: Sequence[Samples]) -> None:
    scales = [samples.made_with["guidance_scale"] for samples in sets]
    if 1.0 not in scales or all(scale == 1.0 for scale in scales):
        raise UserError(
            f"fidelity is reported with guidance and without: got guidance_scale {scales}; draw a set with 1, and one "
            "with another"
        )
    if len(set(scales)) < len(scales):
        raise UserError(f"two sets have the same guidance_scale, of {scales}: give one of each")
    first = sets[0]
    for other in sets[1:]:
        differing = [
            name
            for name, value in first.made_with.items()
            if name != "guidance_scale" and other.made_with.get(name) != value
        ]
        if differing or other.number != first.number:
            what = differing[0] if differing else "number"
            raise UserError(
                f"{other.folder} differs from {first.folder} in {what}: compare sets that are alike but for guidance"
            )


def check_size(size: tuple[int, int], reference: Measured) -> None:
    """Refuse pictures (height, width) of another size than the reference's, where that is known.

    Raises:
        UserError: the sizes differ.
    """
    if reference.size is not None and tuple(size) != tuple(reference.size):
        own, other = (f"{height}x{width}" for height, width in (size, reference.size))
        raise UserError(
            f"drawn pictures are {own}, and {reference.name} holds {other}: take a reference of the same resolution"
        )
