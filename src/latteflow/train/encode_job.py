"""From a generator's recipe to what `latteflow encode` does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from latteflow.data.sources import KINDS
from latteflow.data.sources.captioned import Captioned
from latteflow.errors import UserError
from latteflow.train.build import load_split
from latteflow.train.encode import EncodeJob
from latteflow.train.recipe import DataSection, GeneratorRecipe, Section
from latteflow.train.sources import source_of, stream_of


def job_of(recipe: Section) -> EncodeJob:
    """Return what a recipe asks to encode: its data, with its autoencoder and, if asked, its backbone.

    Raises:
        UserError: the recipe has nothing to encode, or its data cannot be read.
    """
    if not isinstance(recipe, GeneratorRecipe) or recipe.encode is None:
        raise UserError("the recipe has no section encode: add one to a generator's recipe, with encode.output=FOLDER")
    data, section = recipe.data, recipe.encode.model_dump()
    folder = Path(section.pop("output"))
    contexts = section.pop("contexts")
    source, size = _source(data, folder)
    return EncodeJob(
        source=source,
        folder=folder,
        autoencoder=recipe.generator.autoencoder,
        backbone=recipe.generator.backbone if contexts else None,
        size=size,
        about_source=f"{data.kind} {data.path}",
        buckets=data.buckets,
        patch_size=recipe.generator.patch_size,
        quarantine_limit=data.quarantine_limit,
        **section,
    )


def _source(data: DataSection, folder: Path) -> tuple[Any, int]:
    if data.kind == "captioned":
        images = load_split(data, "train")
        return Captioned(images), data.size or images.pixels.shape[-1]
    if data.kind not in KINDS:
        raise UserError(f"data.kind={data.kind} cannot be encoded: take {', '.join(['captioned', *KINDS])}")
    if data.size is None:
        raise UserError("data.size is missing: how many pixels a side, such as 256")
    stream = data.model_dump().get("streaming")
    return stream_of(data) if stream else source_of(data, folder), data.size
