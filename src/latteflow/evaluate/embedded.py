"""What the embedded model can do, on held-out (concept, style) pairs that no stage has seen.

Drawings are judged three ways, each beside real pictures of the same pairs: by the model itself ("drawn, then asked"),
by a judge of another architecture that was trained apart, and by the distance of their features from real pictures'.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from latteflow.data import prompts
from latteflow.data.captioned import CaptionedImages, load_captioned_images
from latteflow.errors import UserError
from latteflow.evaluate.fidelity import Fidelity
from latteflow.models.answers import greedy_answers
from latteflow.models.compilation import runs_compiled
from latteflow.models.quantization import quantization_of
from latteflow.pipeline import LatteFlowPipeline
from latteflow.train.autoencoder import mean_psnr
from latteflow.train.classifier import (
    PictureClassifier,
    among_styles,
    class_numbers,
    classified,
    convolutional_features,
    hit_shares,
    load_classifier,
)

_AT_ONCE = 64
_QUESTIONS = {"concept": prompts.WHAT, "style": prompts.WHICH_STYLE, "category": prompts.WHICH_CATEGORY}


def evaluate_embedded(
    pipe: LatteFlowPipeline,
    model_folder: Path,
    data: Path,
    *,
    drawings: int = 256,
    steps: int = 40,
    guidance_scale: float = 4.0,
    seeds: Sequence[int] = (0, 1, 2),
    judge: Path | None = None,
    also_without_guidance: bool = False,
    watch: Callable[[str], None] = lambda message: None,
    seen: Callable[[CaptionedImages, float, Sequence[Image.Image]], None] = lambda part, scale, drawn: None,
) -> dict[str, Any]:
    """Measure reconstruction, understanding, and what drawings are taken for.

    Args:
        pipe: the model.
        model_folder: where its ``recipe.json`` lies: it says which pictures the model was trained for.
        data: the folder that ``latteflow data emoji`` wrote.
        drawings: held-out prompts to draw, spread evenly.
        steps: network calls a drawing.
        guidance_scale: of the drawings.
        seeds: one set of drawings each; figures are given as mean, lowest and highest over them.
        judge: folder of the trained judge; left out, neither it nor features are asked.
        also_without_guidance: draw it all again with guidance 1, and put what is found under ``without_guidance``.
        watch: told what is being measured.
        seen: given the first seed's drawings: what they should show, their guidance scale, and they themselves.

    Raises:
        UserError: no recipe, no data set, or no judge where one is named.
    """
    heldout = load_captioned_images(data, "heldout", **pictures_of_model(model_folder))
    watch(f"{len(heldout)} held-out pictures")
    results: dict[str, Any] = {"conditions": _conditions(pipe, heldout, drawings, steps, guidance_scale, seeds)}
    watch("autoencoder")
    results["autoencoder_psnr_db"] = mean_psnr(pipe.vae, heldout, pipe.device)
    watch("understanding of real pictures")
    results["understanding"] = _shares(pipe, heldout, heldout.pictures(range(len(heldout))))
    results["most_common_answer"] = {
        name: max(Counter(wanted).values()) / len(wanted) for name, wanted in _right_answers(heldout).items()
    }
    part = heldout.spread(drawings)
    results["understanding_of_the_same_pairs"] = _shares(pipe, part, part.pictures(range(len(part))))
    outside = [] if judge is None else outside_measures(judge, data, model_folder, part, watch)
    real = {name: measure(part.pixels) for name, measure in outside}

    def one(seed: int, scale: float) -> dict[str, dict[str, float]]:
        watch(f"drawings of seed {seed}, guidance {scale:g}")
        images = drawings_of(pipe, part, seed, num_inference_steps=steps, guidance_scale=scale)
        if seed == seeds[0]:
            seen(part, scale, images)
        pixels = pixels_of(images)
        return {"asked": _shares(pipe, part, images), **{name: measure(pixels) for name, measure in outside}}

    results |= _over_seeds([one(seed, guidance_scale) for seed in seeds], real)
    if also_without_guidance and guidance_scale != 1:
        results["without_guidance"] = _over_seeds([one(seed, 1.0) for seed in seeds], real)
    results["conditions"]["compiled"] = runs_compiled(pipe.transformer)  # known once it has drawn
    return results


def _over_seeds(runs: Sequence[Mapping[str, dict[str, float]]], real: Mapping[str, dict[str, float]]) -> dict[str, Any]:
    """Return what was found over the seeds, beside real pictures."""
    beside = {name: _beside_real(real[name], [run[name] for run in runs]) for name in real}
    return {"drawn_then_asked": _spreads([run["asked"] for run in runs]), **beside}


def _conditions(
    pipe: LatteFlowPipeline,
    heldout: CaptionedImages,
    drawings: int,
    steps: int,
    guidance_scale: float,
    seeds: Sequence[int],
) -> dict[str, Any]:
    return {
        "device": str(pipe.device),
        "dtype": str(pipe.transformer.dtype).removeprefix("torch."),
        "quantization": quantization_of(pipe.backbone, pipe.transformer) or "none",
        "heldout_pictures": len(heldout),
        "drawings": min(drawings, len(heldout)),
        "steps": steps,
        "guidance_scale": guidance_scale,
        "seeds": list(seeds),
        "scheduler": type(pipe.scheduler).__name__,
    }


def _beside_real(real: dict[str, float], runs: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Return figures of real pictures and of drawings, and the mean of the latter as a multiple of the former."""
    drawn = _spreads(runs)
    by_real = {key: value["mean"] / real[key] if real[key] > 0 else float("nan") for key, value in drawn.items()}
    return {"real": real, "drawn": drawn, "drawn_by_real": by_real}


def outside_measures(
    judge: Path,
    data: Path,
    model_folder: Path,
    part: CaptionedImages,
    watch: Callable[[str], None] = lambda message: None,
) -> list[tuple[str, Callable[[torch.Tensor], dict[str, float]]]]:
    """Return the judge's shares ("judge") and the features' distances ("features"), as functions of pictures.

    Args:
        judge: folder of the trained judge.
        data: the folder that ``latteflow data emoji`` wrote.
        model_folder: where the model's ``recipe.json`` lies.
        part: what pictures should show: uint8 (number, 3, height, width), one for each.
        watch: told what is being done.
    """
    classifier = load_classifier(judge, what="judge")
    watch("features of real training pictures")
    real = load_captioned_images(data, "train", **pictures_of_model(model_folder))
    fidelity = Fidelity(convolutional_features(pretrained=True), real.pixels, len(part))
    return [("judge", lambda pixels: judged_shares(classifier, part, pixels)), ("features", fidelity.of)]


def judged_shares(judge: PictureClassifier, images: CaptionedImages, pixels: torch.Tensor) -> dict[str, float]:
    """Return how often the judge takes pictures for what they should show, and for how many it knows the answer.

    Args:
        judge: the trained judge.
        images: what the pictures should show.
        pixels: the pictures, uint8 (number, 3, height, width), one for each of ``images``.
    """
    known = [
        index
        for index, record in enumerate(images.records)
        if all(getattr(record, key) in values for key, values in judge.classes.items())
    ]
    if not known:
        raise UserError("the judge knows none of these concepts: it was trained on other pictures than the model")
    wanted = class_numbers([images.records[index] for index in known], judge.classes)
    scores = among_styles(classified(judge, pixels[known]), judge.classes, {record.style for record in images.records})
    return {**hit_shares(scores, wanted), "judged": len(known)}


def pixels_of(pictures: Sequence[Image.Image]) -> torch.Tensor:
    """Return pictures of one size as uint8 (number, 3, height, width)."""
    return torch.from_numpy(np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])).permute(0, 3, 1, 2)


def _spreads(runs: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    return {name: _spread([run[name] for run in runs]) for name in runs[0]}


def _spread(figures: Sequence[float]) -> dict[str, float]:
    return {"mean": sum(figures) / len(figures), "lowest": min(figures), "highest": max(figures)}


def pictures_of_model(model_folder: Path) -> dict[str, Any]:
    """Return which pictures the model was trained for, as its recipe says: arguments of ``load_captioned_images``.

    Raises:
        UserError: there is no recipe.
    """
    file = model_folder / "recipe.json"
    if not file.is_file():
        raise UserError(f"{model_folder} holds no recipe.json: only models that `latteflow train` wrote are evaluated")
    data = json.loads(file.read_text())["data"]
    filters = {key: data[key] for key in ("leave_out_groups", "leave_out_subgroups", "styles", "skin_tones")}
    return {**filters, "selection": data.get("selection", "all")}  # recipes of 0.1 know no selections


def _right_answers(images: CaptionedImages) -> dict[str, list[str]]:
    return {
        "concept": [record.label for record in images.records],
        "style": [record.style for record in images.records],
        "category": [record.group for record in images.records],
    }


def _shares(pipe: LatteFlowPipeline, images: CaptionedImages, pictures: Sequence[Image.Image]) -> dict[str, float]:
    """Return the share of exact answers about ``pictures``, which show (or should show) ``images``."""
    return shares_of(answers_about(pipe.backbone, pipe.processor, pictures), images)


def answers_about(backbone: Any, processor: Any, pictures: Sequence[Image.Image]) -> dict[str, list[str]]:
    """Return a backbone's greedy answers about pictures: which concept, style and category each shows.

    Args:
        backbone: a transformers vision-language model.
        processor: its ``LatteFlowProcessor``.
        pictures: RGB.
    """
    answers: dict[str, list[str]] = {}
    for name, question in _QUESTIONS.items():
        answers[name] = []
        for start in range(0, len(pictures), _AT_ONCE):
            some = pictures[start : start + _AT_ONCE]
            answers[name] += greedy_answers(backbone, processor, some, question, max_new_tokens=prompts.ANSWER_TOKENS)
    return answers


def shares_of(answers: Mapping[str, Sequence[str]], images: CaptionedImages) -> dict[str, float]:
    """Return the share of ``answers_about`` pictures that are exactly right, if they show ``images``."""
    return {name: prompts.exact_share(answers[name], wanted) for name, wanted in _right_answers(images).items()}


def drawings_of(pipe: LatteFlowPipeline, images: CaptionedImages, seed: int, **sampling: Any) -> list[Image.Image]:
    """Return one drawing of each picture's canonical caption.

    Args:
        pipe: the model.
        images: whose captions.
        seed: picture i of a seed starts from noise of its own.
        **sampling: what the pipeline's call takes, such as ``num_inference_steps``.
    """
    captions = [prompts.canonical_caption(record) for record in images.records]
    drawn: list[Image.Image] = []
    for start in range(0, len(captions), _AT_ONCE):
        some = captions[start : start + _AT_ONCE]
        generator = torch.Generator().manual_seed(seed * 1_000_000 + start)
        drawn += pipe(some, generator=generator, **sampling).images
    return drawn
