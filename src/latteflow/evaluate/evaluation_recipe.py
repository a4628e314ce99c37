"""Evaluation recipes: which model, what is measured and how, and where the report goes.

They are read as training recipes are: YAML, ``key=value`` overrides, a ``smoke:`` block, closed to unknown keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

from latteflow.errors import UserError
from latteflow.train.recipe import AnyRecipe, GeneratorRecipe, Section, load_recipe
from latteflow.train.recipe_file import explained, merged_values, read_values

Measure = Literal["embedded", "fidelity", "understanding", "text-to-image", "compositional", "cost"]
STAGE = "evaluation"
USUAL_JUDGE = "runs/emoji-64/judge/final"
"""Where ``latteflow train recipes/emoji-64/judge.yaml`` leaves the judge."""


class DataSection(Section):
    """What drawings are asked for, and what they are compared with."""

    path: str = "data/emoji"
    """The set that ``latteflow data emoji`` wrote; the model's own recipe says which of its pictures count."""
    class_names: str | None = None
    """For fidelity: a file that names classes, each of which is drawn equally often; left out, held-out captions are
    drawn, in turns."""
    judge: str | None = None
    """Folder of the trained judge; left out, the usual one where it is there."""


class SamplingSection(Section):
    """How pictures are drawn: all of it with guidance, and again without."""

    steps: Annotated[int, Field(ge=1, le=1000)] = 40
    guidance_scale: Annotated[float, Field(ge=1)] = 4.0
    number: PositiveInt = 256
    """Held-out prompts to draw, for embedded and compositional."""
    seeds: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] = (0, 1, 2)
    """One set of drawings each; fidelity and text-to-image take the first."""
    batch_size: PositiveInt = 50
    """Pictures at a time, for fidelity."""

    @property
    def guidance_scales(self) -> tuple[float, ...]:
        """The recipe's, and 1, which is none."""
        return tuple(dict.fromkeys((self.guidance_scale, 1.0)))


class NetworkSection(Section):
    """What fidelity compares pictures by."""

    kind: Literal["efficientnet-lite0", "inception"] = "efficientnet-lite0"
    """``inception`` gives FID, with weights that the user has; the other needs no download and is no FID."""
    weights: str | None = None
    """Of ``inception``: torch-fidelity's or pytorch-fid's file."""
    side: Annotated[int, Field(ge=32, le=1024)] = 224
    """Of ``efficientnet-lite0``: pixels that pictures are brought to."""


class FidelitySection(Section):
    """How many pictures are compared, with what."""

    number: PositiveInt = 2048
    """Pictures to draw with guidance, and as many without."""
    reference: str = "train"
    """``train``: the set's training pictures; ``heldout``: its held-out ones; or an ``.npz`` file."""
    reference_number: PositiveInt = 4096
    """Of the set's pictures, spread evenly; a file is taken whole."""


class ScorerSection(Section):
    """A public scorer, where the user has it."""

    checkout: str
    """Of the scorer's repository."""
    detector: str | None = None
    """GenEval's: the folder of its object detector."""
    python: str = "python"
    """The interpreter of an environment that has what the scorer needs."""


class PromptsSection(Section):
    """One public prompt set; without a scorer, its pictures are drawn and left to be scored."""

    prompts: str
    """GenEval's ``evaluation_metadata.jsonl``, or DPG's folder of ``.txt`` files."""
    pictures: PositiveInt = 4
    """A prompt, of GenEval; DPG's grids hold four."""
    scorer: ScorerSection | None = None


class TextToImageSection(Section):
    """Public prompt sets."""

    geneval: PromptsSection | None = None
    dpg: PromptsSection | None = None


class UnderstandingSection(Section):
    """The held-out questions."""

    pictures: PositiveInt | None = None
    """Asked about, spread evenly; left out, all."""


class EvaluationRecipe(Section):
    """One evaluation."""

    stage: Literal["evaluation"]
    model: Annotated[str, Field(min_length=1)]
    """An embedded model's name, or a trained model's folder."""
    output: Annotated[str, Field(min_length=1)]
    """Folder of ``evaluation.json``, the report and the samples."""
    measures: Annotated[tuple[Measure, ...], Field(min_length=1)] = ("embedded", "cost")
    device: str | None = None
    """Left out, cuda where there is one, else the CPU."""
    dtype: str | None = None
    """Of the weights; left out, float32 on the CPU and for embedded models, else bfloat16."""
    quantize: str | None = None
    compile: bool = False
    """Groups run compiled: worth it for many pictures."""
    data: DataSection = DataSection()
    sampling: SamplingSection = SamplingSection()
    network: NetworkSection = NetworkSection()
    fidelity: FidelitySection = FidelitySection()
    text_to_image: TextToImageSection = TextToImageSection()
    understanding: UnderstandingSection = UnderstandingSection()

    @model_validator(mode="after")
    def _measures_have_what_they_need(self) -> EvaluationRecipe:
        needs = {
            "fidelity is measured with guidance and without: give a sampling.guidance_scale above 1": (
                "fidelity" in self.measures and self.sampling.guidance_scale == 1
            ),
            "network.kind inception needs its weights: give --inception PATH, or network.kind=efficientnet-lite0": (
                "fidelity" in self.measures and self.network.kind == "inception" and self.network.weights is None
            ),
            "text-to-image needs prompts: give text_to_image.geneval.prompts or text_to_image.dpg.prompts": (
                "text-to-image" in self.measures and not self.text_to_image.geneval and not self.text_to_image.dpg
            ),
            "fidelity and understanding are measured with weights as they are: leave quantize out": (
                self.quantize is not None and bool({"fidelity", "understanding"} & set(self.measures))
            ),
            "GenEval's scorer needs its detector: give text_to_image.geneval.scorer.detector": (
                self.text_to_image.geneval is not None
                and self.text_to_image.geneval.scorer is not None
                and self.text_to_image.geneval.scorer.detector is None
            ),
        }
        missing = [need for need, is_missing in needs.items() if is_missing]
        if missing:
            raise ValueError(missing[0])
        return self

    @property
    def judge(self) -> Path | None:
        """The judge's folder, where there is or should be one."""
        usual = Path(USUAL_JUDGE)
        return Path(self.data.judge) if self.data.judge else (usual if usual.is_dir() else None)


def is_recipe(target: str) -> bool:
    """Return whether a target is meant as a recipe's file, by its ending."""
    return Path(target).suffix.lower() in (".yaml", ".yml")


def load_evaluation(
    target: str, overrides: Sequence[str] = (), options: Mapping[str, Any] | None = None
) -> EvaluationRecipe:
    """Return the evaluation that a target means.

    Args:
        target: an evaluation recipe's file; a generator's recipe, which means what it has written; a model's name or
            folder.
        overrides: ``key=value`` changes, of that recipe; of an evaluation where the target is a model.
        options: nested values that come last, of the evaluation.

    Raises:
        UserError: a recipe that cannot be read, an unknown key or measure, a value of the wrong kind, or a recipe of a
            stage that writes no model.
    """
    if not is_recipe(target):
        values = {"stage": STAGE, "model": target, "output": _usual_output(target)}
        return _validated(merged_values(values, overrides, options, target), target)
    values = read_values(Path(target), overrides, options)
    if values.get("stage") == STAGE:
        return _validated(values, target)
    values = _of_training(load_recipe(target, overrides), target)
    return _validated(merged_values(values, (), options, target), target)


def _of_training(recipe: AnyRecipe, target: str) -> dict[str, Any]:
    if not isinstance(recipe, GeneratorRecipe):
        raise UserError(f"{target} trains a part (stage {recipe.stage}): give a generator's recipe, or an evaluation's")
    if recipe.data.kind != "captioned":
        raise UserError(
            f"{target} trains on data of kind {recipe.data.kind}, for which no measures are usual: write an evaluation "
            "recipe, such as recipes/evaluation/imagenet-256.yaml"
        )
    model = Path(recipe.output) / "final"
    if not (model / "model_index.json").is_file():
        raise UserError(f"{model} holds no model yet: run `latteflow train {target}` to its end first")
    return {
        "stage": STAGE,
        "model": str(model),
        "output": str(Path(recipe.output) / "evaluation"),
        "data": {"path": recipe.data.path},
    }


def _usual_output(model: str) -> str:
    name = "-".join(part for part in Path(model).parts if part.strip("./\\"))
    return str(Path("runs") / "evaluation" / (name or "model"))


def _validated(values: Any, name: str) -> EvaluationRecipe:
    try:
        return EvaluationRecipe.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{name}: {explained(error, _known_keys())}") from error


def _known_keys() -> set[str]:
    sections: list[type[Section]] = [EvaluationRecipe, DataSection, SamplingSection, NetworkSection, FidelitySection]
    sections += [ScorerSection, PromptsSection, TextToImageSection, UnderstandingSection]
    return {name for section in sections for name in section.model_fields}
