"""From a recipe to the stage it describes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from latteflow.data.captioned import CaptionedImages, load_captioned_images
from latteflow.data.latents import LatentShards
from latteflow.data.quarantine import Quarantined
from latteflow.errors import UserError
from latteflow.train.autoencoder import AutoencoderStage
from latteflow.train.backbone import BackboneStage
from latteflow.train.classifier import ClassifierStage
from latteflow.train.feeds import Feed, MemoryFeed
from latteflow.train.generator import GeneratorStage
from latteflow.train.recipe import (
    AnyRecipe,
    AutoencoderRecipe,
    BackboneRecipe,
    ClassifierRecipe,
    DataSection,
    GeneratorRecipe,
)
from latteflow.train.sources import source_of
from latteflow.train.stage import Stage
from latteflow.train.streamed import LatentFeed, PictureFeed
from latteflow.train.vision import VisionStage


def build_stage(recipe: AnyRecipe) -> Stage:
    """Read the recipe's data and build its stage, weights initialised from the recipe's seed.

    Raises:
        UserError: the data set, the autoencoder or the backbone that the recipe names is not there.
    """
    torch.manual_seed(recipe.train.seed)  # initial weights come from torch's global generator
    if isinstance(recipe, GeneratorRecipe):
        feed, size = _feed_of(recipe)
        return GeneratorStage(recipe.generator, feed, size=size, seed=recipe.train.seed)
    if recipe.data.kind != "captioned":
        raise UserError(f"the {recipe.stage} stage trains on data.kind=captioned only: got {recipe.data.kind}")
    images, heldout = (load_split(recipe.data, split) for split in ("train", "heldout"))
    if isinstance(recipe, AutoencoderRecipe):
        return AutoencoderStage(recipe.autoencoder, images, heldout)
    if isinstance(recipe, BackboneRecipe):
        return BackboneStage(recipe.backbone, images, heldout)
    if isinstance(recipe, ClassifierRecipe):
        return ClassifierStage(recipe.classifier, images, heldout)
    return VisionStage(recipe.vision, images, heldout, load_others(recipe.data))


def _feed_of(recipe: GeneratorRecipe) -> tuple[Feed, int]:
    """Return where latents and contexts come from, and the pixels a side of a picture."""
    data, settings = recipe.data, recipe.generator
    if data.kind == "captioned":
        images, heldout = (load_split(data, split) for split in ("train", "heldout"))
        feed = MemoryFeed(
            images, heldout, settings.captions_per_image, recipe.train.seed, copies_per_image=settings.copies_per_image
        )
        return feed, images.pixels.shape[-1]
    if data.kind == "latents":
        shards = LatentShards(data.path, {"size": data.size})
        return LatentFeed(shards, data.validation), shards.manifest["size"]
    if data.size is None:
        raise UserError("data.size is missing: how many pixels a side, such as 256")
    if data.buckets:
        raise UserError(
            "data.buckets needs to know every picture's shape: encode first, then train on data.kind=latents"
        )
    if data.streaming:
        raise UserError("data.streaming is for `latteflow encode`: training looks samples up by their number")
    source = Quarantined(source_of(data, Path(recipe.output)), recipe.output, data.quarantine_limit)
    return PictureFeed(source, (data.size, data.size), data.validation), data.size


def load_split(data: DataSection, split: str) -> CaptionedImages:
    """Read one split with the recipe's filters; training pictures with the extra styles, if the recipe wants them."""
    filters: dict[str, Any] = data.model_dump(
        include={"selection", "leave_out_groups", "leave_out_subgroups", "styles", "skin_tones"}
    )
    images = load_captioned_images(data.path, split, **filters)
    if split == "train" and data.extra:
        images = images.joined(load_captioned_images(data.path, "extra", **{**filters, "styles": ()}))
    return images


def load_others(data: DataSection) -> CaptionedImages:
    """Read every training picture of the set, whatever the recipe's filters."""
    images = load_captioned_images(data.path, "train")
    return images.joined(load_captioned_images(data.path, "extra")) if data.extra else images
