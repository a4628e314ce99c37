"""What an evaluation recipe asks for, measured: each measure's results, its figures, and some pictures to look at."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from latteflow.data.captioned import CaptionedImages, load_captioned_images
from latteflow.data.prompts import canonical_caption
from latteflow.data.shards import sha256_of, tensors_sha256
from latteflow.data.sources.class_names import read_class_names
from latteflow.evaluate import figures
from latteflow.evaluate.compositional import compositional_report
from latteflow.evaluate.cost import cost_of
from latteflow.evaluate.embedded import evaluate_embedded, pictures_of_model
from latteflow.evaluate.evaluation_recipe import USUAL_JUDGE, EvaluationRecipe, PromptsSection
from latteflow.evaluate.feature_networks import EfficientNetLite0, FeatureNetwork, Inception
from latteflow.evaluate.fidelity_report import check_size, fidelity_report
from latteflow.evaluate.measured import Measured, measure, measured_file
from latteflow.evaluate.record import Evaluation, Figure, environment_of, finite
from latteflow.evaluate.samples import Samples, SampleWork, balanced, draw_samples
from latteflow.evaluate.scorers import score_dpg, score_geneval
from latteflow.evaluate.text_to_image import Drawing, draw_dpg, draw_geneval, read_dpg_prompts, read_geneval_prompts
from latteflow.evaluate.understanding import heldout_understanding
from latteflow.models.compilation import runs_compiled
from latteflow.models.embedded import resolve_model
from latteflow.models.quantization import quantization_of
from latteflow.pipeline import LatteFlowPipeline
from latteflow.train.recipe import resolved

SHOWN = 24
"""Pictures of a set that a report shows."""
_HASH = 12
_SHARD = 500


@dataclass
class Shown:
    """Pictures of one prompt, side by side."""

    measure: str
    prompt: str
    pictures: dict[str, Image.Image] = field(default_factory=dict)
    """By what they are, such as ``real`` or ``guided``."""


@dataclass
class _Run:
    """What every measure is given, and the pictures that they leave."""

    recipe: EvaluationRecipe
    pipe: LatteFlowPipeline
    watch: Callable[[str], None]
    shown: dict[tuple[str, int], Shown] = field(default_factory=dict)

    @property
    def data(self) -> Path:
        """The captioned set."""
        return Path(self.recipe.data.path)

    def split(self, name: str) -> CaptionedImages:
        """One split of it, as the model's own recipe filters it."""
        return load_captioned_images(self.data, name, **pictures_of_model(Path(resolve_model(self.recipe.model))))

    @property
    def about(self) -> dict[str, Any]:
        """Conditions of every figure."""
        return {
            "model": self.recipe.model,
            "device": self.pipe.device.type,
            "dtype": str(self.pipe.transformer.dtype).removeprefix("torch."),
            "quantization": quantization_of(self.pipe.backbone, self.pipe.transformer) or "none",
        }

    def counter(self, number: int, what: str) -> Callable[[int], None]:
        """Return a function that is given numbers of pictures as they are done, and tells how many there are."""
        done = 0

        def count(pictures: int) -> None:
            nonlocal done
            done += pictures
            self.watch(f"{done} of {number} {what}")

        return count

    def show(self, measure: str, number: int, prompt: str, kind: str, picture: Image.Image) -> None:
        """Keep a picture for the report."""
        self.shown.setdefault((measure, number), Shown(measure, prompt)).pictures[kind] = picture


def run_evaluation(
    recipe: EvaluationRecipe, pipe: LatteFlowPipeline, watch: Callable[[str], None] = lambda message: None
) -> tuple[Evaluation, list[Shown]]:
    """Measure what a recipe asks for, with guidance and without.

    Args:
        recipe: of which ``require_inputs`` found nothing missing.
        pipe: the recipe's model, on its device; its scheduler and weights are used as they are.
        watch: told what is being done.

    Returns:
        The record, and pictures for the report.

    Raises:
        UserError: what a measure refuses.
    """
    began = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    run = _Run(recipe, pipe, watch)
    results: dict[str, Any] = {}
    found: list[Figure] = []
    seconds: dict[str, float] = {}
    for name in dict.fromkeys(recipe.measures):
        watch(f"measuring {name}")
        start = time.perf_counter()
        results[name], some = _MEASURES[name](run)
        found += some
        seconds[name] = round(time.perf_counter() - start, 1)
    values = {
        "model": recipe.model,
        "date": began,
        "seconds": seconds,
        "environment": {
            **environment_of(pipe.device),
            "compiled": runs_compiled(pipe.transformer),
            "weights": _weights(pipe),
        },
        "config": resolved(recipe),
        "figures": [figure.model_dump() for figure in found],
        "results": results,
    }
    record = Evaluation.model_validate(finite(values))
    return record, list(run.shown.values())


def _embedded(run: _Run) -> tuple[dict[str, Any], list[Figure]]:
    recipe, sampling = run.recipe, run.recipe.sampling

    def seen(part: CaptionedImages, scale: float, drawn: Sequence[Image.Image]) -> None:
        chosen = torch.linspace(0, len(part) - 1, min(SHOWN, len(part))).long().tolist()
        for number, (index, real) in enumerate(zip(chosen, part.pictures(chosen), strict=True)):
            caption = canonical_caption(part.records[index])
            run.show("embedded", number, caption, "real", real)
            run.show("embedded", number, caption, figures.set_name(scale), drawn[index])

    results = evaluate_embedded(
        run.pipe,
        Path(resolve_model(recipe.model)),
        run.data,
        drawings=sampling.number,
        steps=sampling.steps,
        guidance_scale=sampling.guidance_scale,
        seeds=sampling.seeds,
        judge=recipe.judge,
        also_without_guidance=True,
        watch=run.watch,
        seen=seen,
    )
    about = {**run.about, "reference": _named(run.split("heldout"), "held-out")}
    return results, figures.embedded_figures(results, about, _judge(recipe.judge))


def _fidelity(run: _Run) -> tuple[dict[str, Any], list[Figure]]:
    recipe, sampling, pipe = run.recipe, run.recipe.sampling, run.pipe
    network = network_of(recipe, pipe.device)
    run.watch("features of the reference")
    reference, identity = _reference(run, network)
    side = pipe.transformer.config.sample_size * pipe.vae.spatial_compression_ratio
    check_size((side, side), reference)  # before thousands are drawn
    prompts = _prompts(run)
    words = _words_hash(prompts)
    folders = []
    for scale in sampling.guidance_scales:
        folder = Path(recipe.output) / "samples" / f"guidance-{scale:g}"
        work = SampleWork(
            folder,
            recipe.model,
            prompts,
            recipe.fidelity.number,
            steps=sampling.steps,
            guidance_scale=scale,
            seed=sampling.seeds[0],
            dtype=run.about["dtype"],
            batch_size=sampling.batch_size,
            shard_size=sampling.batch_size * max(1, _SHARD // sampling.batch_size),
            device=pipe.device.type,
        )
        folders.append(draw_samples(work, pipe, watch=run.counter(work.number, f"drawings, guidance {scale:g}")))
        for number, pixels in enumerate(next(Samples(folder).chunks(SHOWN))):
            picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
            run.show("fidelity", number, prompts[number % len(prompts)], figures.set_name(scale), picture)
    run.watch("features of the drawings")
    report = fidelity_report(network, reference, folders)
    return report, figures.fidelity_figures(report, {**run.about, "reference_sha256": identity, "prompts": words})


def network_of(recipe: EvaluationRecipe, device: torch.device) -> FeatureNetwork:
    """Return the network that a recipe compares pictures by.

    Raises:
        UserError: its weights are not there, or something else.
    """
    if recipe.network.kind == "inception":
        return Inception(str(recipe.network.weights), device)
    return EfficientNetLite0(recipe.network.side, device)


def _reference(run: _Run, network: FeatureNetwork) -> tuple[Measured, str]:
    """Return the reference, measured, and a hash of what it is."""
    wanted = run.recipe.fidelity
    if wanted.reference not in ("train", "heldout"):
        return measured_file(Path(wanted.reference), network), sha256_of(Path(wanted.reference))[:_HASH]
    images = run.split(wanted.reference).spread(wanted.reference_number)
    return measure(network, images.pixels.split(64), f"{wanted.reference} pictures"), _hash_of(images)


def _prompts(run: _Run) -> list[str]:
    names = run.recipe.data.class_names
    if names is not None:
        return balanced(list(read_class_names(Path(names)).values()), run.recipe.fidelity.number)
    return [canonical_caption(record) for record in run.split("heldout").records]


def _understanding(run: _Run) -> tuple[dict[str, Any], list[Figure]]:
    recipe = run.recipe
    report = heldout_understanding(recipe.model, run.data, pictures=recipe.understanding.pictures, pipe=run.pipe)
    about = {**run.about, "reference": _named(run.split("heldout"), "held-out")}
    return report, figures.understanding_figures(report, about)


def _compositional(run: _Run) -> tuple[dict[str, Any], list[Figure]]:
    recipe, sampling = run.recipe, run.recipe.sampling
    judge = recipe.judge or Path(USUAL_JUDGE)
    reports = {
        scale: compositional_report(
            recipe.model,
            run.data,
            judge,
            drawings=sampling.number,
            steps=sampling.steps,
            guidance_scale=scale,
            seeds=sampling.seeds,
            pipe=run.pipe,
            watch=run.watch,
        )
        for scale in sampling.guidance_scales
    }
    about = {**run.about, "reference": _named(run.split("heldout"), "held-out")}
    results = {f"guidance {scale:g}": report for scale, report in reports.items()}
    return results, figures.compositional_figures(reports, about, str(_judge(judge)))


def _text_to_image(run: _Run) -> tuple[dict[str, Any], list[Figure]]:
    recipe, sampling = run.recipe, run.recipe.sampling
    results: dict[str, Any] = {}
    found: list[Figure] = []
    for name, wanted in (("GenEval", recipe.text_to_image.geneval), ("DPG", recipe.text_to_image.dpg)):
        if wanted is None:
            continue
        prompts, home = Path(wanted.prompts), Path(recipe.output) / name.lower()
        for scale in sampling.guidance_scales:
            how = Drawing(recipe.model, sampling.seeds[0], sampling.steps, scale)
            folder, verdicts = home / f"guidance-{scale:g}", home / f"guidance-{scale:g}-verdicts"
            if name == "GenEval":
                draw_geneval(run.pipe, prompts, folder, how, pictures=wanted.pictures, watch=run.watch)
                lines = [line["prompt"] for line in read_geneval_prompts(prompts)]
                files = [folder / f"{i:05d}" / "samples" / "0000.png" for i in range(len(lines))]
            else:
                draw_dpg(run.pipe, prompts, folder, how, watch=run.watch)
                named = read_dpg_prompts(prompts)
                lines, files = list(named.values()), [folder / f"{stem}.png" for stem in named]
            for number, (prompt, file) in enumerate(list(zip(lines, files, strict=True))[:SHOWN]):
                with Image.open(file) as picture:
                    run.show(name, number, prompt, figures.set_name(scale), picture.copy())
            score = _score(name, wanted, folder, verdicts)
            results.setdefault(name, {})[f"guidance {scale:g}"] = {"pictures": str(folder), "score": score}
            about = {**run.about, "steps": how.steps, "guidance_scale": scale, "seeds": [how.seed]}
            about |= {"prompts": _words_hash(lines), "samples": wanted.pictures if name == "GenEval" else 4}
            found += figures.score_figures(name, figures.set_name(scale), score, about)
    return results, found


def _score(name: str, wanted: PromptsSection, folder: Path, verdicts: Path) -> dict[str, Any] | None:
    scorer = wanted.scorer
    if scorer is None:
        return None
    checkout = Path(scorer.checkout)
    if name == "GenEval":
        file = verdicts.with_suffix(".jsonl")
        return score_geneval(folder, checkout, Path(str(scorer.detector)), file, python=scorer.python)
    return score_dpg(folder, checkout, verdicts.with_suffix(".txt"), python=scorer.python)


def _cost(run: _Run) -> tuple[dict[str, Any], list[Figure]]:
    cost = cost_of(run.pipe, steps=run.recipe.sampling.steps).as_dict()
    return cost, figures.cost_figures(cost, run.about)


_MEASURES: dict[str, Callable[[_Run], tuple[dict[str, Any], list[Figure]]]] = {
    "embedded": _embedded,
    "fidelity": _fidelity,
    "understanding": _understanding,
    "text-to-image": _text_to_image,
    "compositional": _compositional,
    "cost": _cost,
}


def _named(images: CaptionedImages, what: str) -> str:
    return f"{len(images)} {what} pictures ({_hash_of(images)})"


def _hash_of(images: CaptionedImages) -> str:
    return tensors_sha256({"pixels": images.pixels})[:_HASH]


def _judge(folder: Path | None) -> str | None:
    return None if folder is None else sha256_of(folder / "model.safetensors")[:_HASH]


def _words_hash(prompts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()[:_HASH]


def _weights(pipe: LatteFlowPipeline) -> str | None:
    """Return a hash of all weights; None of quantised ones, whose tensors have no plain bytes."""
    if quantization_of(pipe.backbone, pipe.transformer):
        return None
    parts = {"backbone": pipe.backbone, "transformer": pipe.transformer, "vae": pipe.vae}
    state = {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}
    return tensors_sha256(state)[:_HASH]
