"""Figures out of what measures return: one flat list, every figure with what it depends on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from latteflow.evaluate.fidelity import DIRECTIONS, FEATURE_SIDE
from latteflow.evaluate.numbers import Unit
from latteflow.evaluate.record import Figure

GUIDED, UNGUIDED = "guided", "without guidance"
_ASKED: tuple[tuple[str, str], ...] = (
    ("most_common_answer", "the most common answer"),
    ("understanding", "real pictures"),
    ("understanding_of_the_same_pairs", "real pictures of the pairs drawn"),
)
_COSTS: Mapping[str, tuple[str, Unit, tuple[str, ...]]] = {
    "total_parameters": ("parameters", "parameters", ()),
    "frozen_parameters": ("frozen parameters", "parameters", ()),
    "trainable_parameters": ("trainable parameters", "parameters", ()),
    "active_parameters": ("active parameters", "parameters", ()),
    "flops_per_step": ("operations a step", "FLOP", ("guided", "prompt_tokens", "image_tokens")),
    "flops_prefill": ("operations a prompt", "FLOP", ("prompt_tokens",)),
    "flops_decode": ("operations to decode", "FLOP", ("image_tokens",)),
    "flops_per_image": ("operations a picture", "FLOP", ("steps", "guided", "prompt_tokens", "image_tokens")),
    "context_bytes": ("context of a prompt", "B", ("prompt_tokens",)),
    "weight_bytes": ("weights in memory", "B", ()),
}
"""By what ``cost_of`` calls them: a figure's name, its unit, and what it depends on."""
_FIGURE_ITSELF = ("value", "why", "spread")


def set_name(guidance_scale: float) -> str:
    """Return what a set of drawings is called."""
    return UNGUIDED if guidance_scale == 1 else GUIDED


def embedded_figures(results: Mapping[str, Any], about: Mapping[str, Any], judge: str | None) -> list[Figure]:
    """Return the figures of ``evaluate_embedded``.

    Args:
        results: what it returned.
        about: conditions that all of them share, such as the model.
        judge: hash of the judge's weights, where there was one.
    """
    said = results["conditions"]
    shared = {**about, "samples": said["heldout_pictures"]}
    pairs = {**about, "samples": said["drawings"]}
    figures = [_figure("embedded", "real pictures", "reconstruction", results["autoencoder_psnr_db"], "dB", shared)]
    for key, of in _ASKED:
        conditions = pairs if key == "understanding_of_the_same_pairs" else shared
        figures += [
            _figure("embedded", of, f"answers: {name}", value, "share", conditions)
            for name, value in results[key].items()
        ]
    looked = f"EfficientNet-Lite0, {FEATURE_SIDE} pixels, {DIRECTIONS} directions"
    outside = {"judge": {"judge": judge}, "features": {"network": looked}}
    for name, more in outside.items():
        if name in results:
            figures += _outside(name, "real pictures of the pairs drawn", results[name]["real"], {**pairs, **more})
    for drawn in (results, results.get("without_guidance")):
        if drawn is None:
            continue
        scale = said["guidance_scale"] if drawn is results else 1.0
        drawing = {name: said[name] for name in ("steps", "scheduler", "seeds")}
        conditions = {**pairs, **drawing, "guidance_scale": scale}
        figures += _spreads("embedded", set_name(scale), "answers", drawn["drawn_then_asked"], "share", conditions)
        for name, more in outside.items():
            if name in drawn:
                figures += _outside(name, set_name(scale), drawn[name]["drawn"], {**conditions, **more})
    return figures


def fidelity_figures(report: Mapping[str, Mapping[str, Mapping[str, Any]]], about: Mapping[str, Any]) -> list[Figure]:
    """Return the figures of ``fidelity_report``; ``about`` is what all of them share."""
    figures = []
    for found in report.values():
        for name, figure in found.items():
            scale = figure.get("guidance_scale")
            of = "halves of the reference" if scale is None else set_name(scale)
            conditions = {**about, **{key: value for key, value in figure.items() if key not in _FIGURE_ITSELF}}
            unit: Unit = "share" if name.startswith(("precision", "recall")) else ""
            figures.append(
                Figure(
                    measure="fidelity",
                    of=of,
                    name=name,
                    value=figure["value"],
                    lowest=figure["value"] - figure["spread"] if "spread" in figure else None,
                    highest=figure["value"] + figure["spread"] if "spread" in figure else None,
                    unit=unit,
                    why=figure.get("why", ""),
                    conditions=conditions,
                )
            )
    return figures


def understanding_figures(report: Mapping[str, Any], about: Mapping[str, Any]) -> list[Figure]:
    """Return the figures of ``heldout_understanding``; ``about`` is what all of them share."""
    conditions = {**about, "samples": report["pictures"]}
    figures = [
        _figure("understanding", of, f"answers: {name}", value, "share", conditions)
        for key, of in (("backbone", "the backbone alone"), ("unified", "the unified model"))
        for name, value in report[key].items()
    ]
    number = report["different_answers"]
    return [*figures, _figure("understanding", "both", "different answers", number, "", conditions)]


def compositional_figures(
    reports: Mapping[float, Mapping[str, Any]], about: Mapping[str, Any], judge: str
) -> list[Figure]:
    """Return the figures of ``compositional_report``.

    Args:
        reports: by guidance scale.
        about: conditions that all of them share.
        judge: hash of the judge's weights.
    """
    figures: list[Figure] = []
    for number, (scale, report) in enumerate(reports.items()):
        said = report["conditions"]
        drawing = {name: said[name] for name in ("steps", "seeds", "guidance_scale")}
        for kind in ("unseen", "seen"):
            real = {**about, "judge": judge, "samples": said["drawings"][kind]}
            if number == 0:
                figures += _outside("judge", f"{kind} pairs, real", report[kind]["real"], real, "compositional")
            of = f"{kind} pairs, {set_name(scale)}"
            figures += _outside("judge", of, report[kind]["drawn"], {**real, **drawing}, "compositional")
    return figures


def score_figures(name: str, of: str, score: Mapping[str, Any] | None, about: Mapping[str, Any]) -> list[Figure]:
    """Return the figures of a public scorer; DPG's are percents, and become shares.

    Args:
        name: "GenEval" or "DPG".
        of: the set.
        score: what ``score_geneval`` or ``score_dpg`` returned; None where no scorer was named.
        about: conditions that all of them share.
    """
    if score is None:
        why = "no scorer is named in the recipe: the pictures are drawn"
        return [Figure(measure="text-to-image", of=of, name=name, value=None, why=why, conditions=dict(about))]
    scale = 100 if name == "DPG" else 1
    parts = {"overall": score["overall"], **score.get("tasks", {}), **score.get("categories", {})}
    return [
        _figure("text-to-image", of, f"{name}: {part}", value / scale, "share", about) for part, value in parts.items()
    ]


def cost_figures(cost: Mapping[str, Any], about: Mapping[str, Any]) -> list[Figure]:
    """Return the figures of ``cost_of``; ``about`` is what all of them share."""
    return [
        _figure("cost", "the model", name, cost[key], unit, {**about, **{one: cost[one] for one in needs}})
        for key, (name, unit, needs) in _COSTS.items()
    ]


def _outside(
    by: str, of: str, found: Mapping[str, Any], conditions: Mapping[str, Any], measure: str = "embedded"
) -> list[Figure]:
    """Return a judge's shares or the features' distances; how many were judged is a condition of them."""
    judged = found.get("judged")
    if judged is not None:
        conditions = {**conditions, "judged": judged["mean"] if isinstance(judged, Mapping) else judged}
    figures = {name: value for name, value in found.items() if name != "judged"}
    return _spreads(measure, of, by, figures, "share" if by == "judge" else "", conditions)


def _spreads(
    measure: str, of: str, by: str, found: Mapping[str, Any], unit: Unit, conditions: Mapping[str, Any]
) -> list[Figure]:
    return [_figure(measure, of, f"{by}: {name}", value, unit, conditions) for name, value in found.items()]


def _figure(
    measure: str, of: str, name: str, value: Mapping[str, float] | float, unit: Unit, conditions: Mapping[str, Any]
) -> Figure:
    """Return a figure of a number, or of a mean with the lowest and the highest."""
    mean, lowest, highest = value, None, None
    if isinstance(value, Mapping):
        mean, lowest, highest = (value[key] for key in ("mean", "lowest", "highest"))
    return Figure(
        measure=measure,
        of=of,
        name=name,
        value=float(mean),  # type: ignore[arg-type]
        lowest=lowest,
        highest=highest,
        unit=unit,
        conditions=dict(conditions),
    )


def measures_in(figures: Sequence[Figure]) -> dict[str, list[Figure]]:
    """Return figures by their measure, in order."""
    found: dict[str, list[Figure]] = {}
    for figure in figures:
        found.setdefault(figure.measure, []).append(figure)
    return found
