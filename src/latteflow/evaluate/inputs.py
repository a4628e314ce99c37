"""What an evaluation needs is looked for before anything is drawn: hours later is too late to miss a file."""

from __future__ import annotations

from pathlib import Path

from latteflow.data.sources.class_names import read_class_names
from latteflow.errors import UserError
from latteflow.evaluate.embedded import pictures_of_model
from latteflow.evaluate.evaluation_recipe import USUAL_JUDGE, EvaluationRecipe
from latteflow.evaluate.picture_arrays import pictures_shape, read_statistics
from latteflow.evaluate.samples import balanced
from latteflow.evaluate.text_to_image import read_dpg_prompts, read_geneval_prompts
from latteflow.models.embedded import resolve_model
from latteflow.train.classifier import load_classifier

FEATURES = {"efficientnet-lite0": 1280, "inception": 2048}
"""Values of each network, which a covariance needs more pictures than."""
_OF_THE_SET = {"embedded", "understanding", "compositional"}


def require_inputs(recipe: EvaluationRecipe) -> None:
    """Look for everything that a recipe names.

    Raises:
        UserError: a data set, reference, judge, network, prompt set or scorer is missing or something else, there are
            too few pictures for a figure, or the output folder cannot be written.
    """
    measures = set(recipe.measures)
    if measures & _OF_THE_SET or ("fidelity" in measures and _of_the_set(recipe)):
        pictures_of_model(Path(resolve_model(recipe.model)))
        if not any(Path(recipe.data.path).glob("heldout-*.parquet")):
            raise UserError(
                f"no data set in {recipe.data.path} (no heldout-*.parquet): build one with `latteflow data emoji`"
            )
    if "compositional" in measures or ("embedded" in measures and recipe.judge is not None):
        load_classifier(recipe.judge or USUAL_JUDGE, what="judge")
    if "fidelity" in measures:
        _require_fidelity(recipe)
    if "text-to-image" in measures:
        _require_prompts(recipe)
    try:
        Path(recipe.output).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{recipe.output} cannot be made ({error.strerror}): name another output folder") from error


def _of_the_set(recipe: EvaluationRecipe) -> bool:
    return recipe.data.class_names is None or recipe.fidelity.reference in ("train", "heldout")


def _require_fidelity(recipe: EvaluationRecipe) -> None:
    wanted, values = recipe.fidelity, FEATURES[recipe.network.kind]
    if wanted.number <= values:
        raise UserError(
            f"fidelity.number={wanted.number}: {recipe.network.kind} has {values} features, and their covariance needs "
            "more pictures than that"
        )
    if recipe.network.weights is not None and not Path(recipe.network.weights).is_file():
        raise UserError(f"no file {recipe.network.weights}: give the FID Inception's weights (docs/evaluation.md)")
    if recipe.data.class_names is not None:
        balanced(list(read_class_names(Path(recipe.data.class_names)).values()), wanted.number)
    if wanted.reference in ("train", "heldout"):
        return
    reference = Path(wanted.reference)
    if not reference.is_file():
        raise UserError(f"no reference {reference}: give an .npz file, or fidelity.reference=train (or heldout)")
    if pictures_shape(reference) is None and read_statistics(reference) is None:
        raise UserError(f"{reference} holds neither pictures (arr_0) nor statistics (mu, sigma)")


def _require_prompts(recipe: EvaluationRecipe) -> None:
    wanted = recipe.text_to_image
    if wanted.geneval is not None:
        read_geneval_prompts(Path(wanted.geneval.prompts))
    if wanted.dpg is not None:
        read_dpg_prompts(Path(wanted.dpg.prompts))
    for section in (wanted.geneval, wanted.dpg):
        if section is not None and section.scorer is not None and not Path(section.scorer.checkout).is_dir():
            raise UserError(f"no folder {section.scorer.checkout}: give a checkout of the scorer's repository")
