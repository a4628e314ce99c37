"""Composition at small scale: styles and concepts that were learnt apart, asked for together.

The held-out (concept, style) pairs of the emoji set are in no training picture, while each of their concepts was seen
in other styles and each style on other concepts. So a drawing of such a pair has to put together what was never seen
together; what a model loses on them, against pairs that it did see, is the price of composition. It stands in for the
benchmarks of ``text_to_image.py`` where their scorers cannot be had.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from latteflow.data.captioned import CaptionedImages, load_captioned_images
from latteflow.errors import UserError
from latteflow.evaluate.embedded import drawings_of, pictures_of_model, pixels_of
from latteflow.models.embedded import resolve_model
from latteflow.pipeline import LatteFlowPipeline
from latteflow.train.classifier import PictureClassifier, among_styles, class_numbers, classified, load_classifier


def compositional_report(
    model: str,
    data: Path,
    judge: Path,
    *,
    drawings: int = 256,
    steps: int = 40,
    guidance_scale: float = 4.0,
    seeds: Sequence[int] = (0, 1, 2),
    pipe: LatteFlowPipeline | None = None,
    watch: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Draw pairs of concept and style that were never seen together, and pairs that were, and have both judged.

    Args:
        model: an embedded model's name, or the folder of a model that ``latteflow train`` wrote.
        data: the folder that ``latteflow data emoji`` wrote.
        judge: folder of the trained judge, which has not seen the held-out pairs either.
        drawings: prompts of each kind, spread evenly.
        steps: network calls a drawing.
        guidance_scale: of the drawings.
        seeds: one set of drawings each.
        pipe: the model, where it is loaded already; it is used as it is.
        watch: told what is being done.

    Returns:
        ``conditions``; under ``unseen`` and ``seen``, the judge's shares of ``real`` pictures of the pairs and of
        what is ``drawn`` (mean, lowest and highest over the seeds): ``concept``, ``style``, ``both`` in one picture,
        of ``judged`` pictures. The seen pairs are of the same concepts and styles; the judge was trained on their
        real pictures, so that their ``real`` shares flatter it.

    Raises:
        UserError: no recipe, data set or judge there, or a held-out pair that was trained on.
    """
    filters = pictures_of_model(Path(resolve_model(model)))
    classifier = load_classifier(judge, what="judge")
    watch("reading the data set")
    unseen, train = (load_captioned_images(data, split, **filters) for split in ("heldout", "train"))
    parts = {"unseen": unseen.spread(drawings)}
    parts["seen"] = _seen_pairs(parts["unseen"], train).spread(drawings)
    if pipe is None:
        pipe = LatteFlowPipeline.from_pretrained(model)
        pipe.set_progress_bar_config(disable=True)
    report: dict[str, Any] = {
        "conditions": {
            "model": model,
            "steps": steps,
            "guidance_scale": guidance_scale,
            "seeds": list(seeds),
            "drawings": {name: len(part) for name, part in parts.items()},
        }
    }
    for name, part in parts.items():
        runs = []
        for seed in seeds:
            watch(f"{name} pairs, seed {seed}")
            drawn = drawings_of(pipe, part, seed, num_inference_steps=steps, guidance_scale=guidance_scale)
            runs.append(composed_shares(classifier, part, pixels_of(drawn)))
        report[name] = {"real": composed_shares(classifier, part, part.pixels), "drawn": _spread_over(runs)}
    return report


def composed_shares(judge: PictureClassifier, images: CaptionedImages, pixels: torch.Tensor) -> dict[str, float]:
    """Return how often the judge finds the right ``concept``, the right ``style``, and ``both`` in one picture.

    Args:
        judge: the trained judge.
        images: what the pictures should show.
        pixels: the pictures, uint8 (number, 3, height, width), one for each of ``images``.

    Raises:
        UserError: the judge knows none of the pairs.
    """
    known = [
        index
        for index, record in enumerate(images.records)
        if all(getattr(record, key) in values for key, values in judge.classes.items())
    ]
    if not known:
        raise UserError("the judge knows none of these pairs: it was trained on other pictures than the model")
    wanted = class_numbers([images.records[index] for index in known], judge.classes)
    scores = among_styles(classified(judge, pixels[known]), judge.classes, {record.style for record in images.records})
    right = {key: scores[key].argmax(dim=1) == wanted[key] for key in ("concept", "style")}
    right["both"] = right["concept"] & right["style"]
    return {**{key: hits.float().mean().item() for key, hits in right.items()}, "judged": len(known)}


def _seen_pairs(unseen: CaptionedImages, train: CaptionedImages) -> CaptionedImages:
    """Return the training pictures of the same concepts and styles.

    Raises:
        UserError: a pair is in both, or there are none.
    """
    pairs = {(record.concept, record.style) for record in unseen.records}
    both = pairs & {(record.concept, record.style) for record in train.records}
    if both:
        concept, style = min(both)
        raise UserError(f"{concept} in {style} style is held out and trained on: build the data set anew")
    concepts, styles = ({pair[i] for pair in pairs} for i in (0, 1))
    seen = train.select(lambda record: record.concept in concepts and record.style in styles)
    if not len(seen):
        raise UserError("no held-out concept was trained on in another style: there is nothing to compose")
    return seen


def _spread_over(runs: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    found = {}
    for name in runs[0]:
        figures = [run[name] for run in runs]
        found[name] = {"mean": sum(figures) / len(figures), "lowest": min(figures), "highest": max(figures)}
    return found
