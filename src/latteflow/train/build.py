"""From a recipe to the stage it describes."""

from __future__ import annotations

import torch

from latteflow.data.captioned import CaptionedImages, load_captioned_images
from latteflow.train.autoencoder import AutoencoderStage
from latteflow.train.backbone import BackboneStage
from latteflow.train.classifier import ClassifierStage
from latteflow.train.generator import GeneratorStage
from latteflow.train.recipe import (
    AnyRecipe,
    AutoencoderRecipe,
    BackboneRecipe,
    ClassifierRecipe,
    DataSection,
    VisionRecipe,
)
from latteflow.train.stage import Stage
from latteflow.train.vision import VisionStage


def build_stage(recipe: AnyRecipe) -> Stage:
    """Read the recipe's data and build its stage, weights initialised from the recipe's seed.

    Raises:
        UserError: the data set, the autoencoder or the backbone that the recipe names is not there.
    """
    images, heldout = (load_split(recipe.data, split) for split in ("train", "heldout"))
    torch.manual_seed(recipe.train.seed)  # initial weights come from torch's global generator
    if isinstance(recipe, AutoencoderRecipe):
        return AutoencoderStage(recipe.autoencoder, images, heldout)
    if isinstance(recipe, BackboneRecipe):
        return BackboneStage(recipe.backbone, images, heldout)
    if isinstance(recipe, ClassifierRecipe):
        return ClassifierStage(recipe.classifier, images, heldout)
    if isinstance(recipe, VisionRecipe):
        return VisionStage(recipe.vision, images, heldout, load_unlabelled(recipe.data))
    return GeneratorStage(recipe.generator, images, heldout, seed=recipe.train.seed)


def load_split(data: DataSection, split: str) -> CaptionedImages:
    """Read one split with the recipe's filters; training pictures with the extra styles, if the recipe wants them."""
    filters = data.model_dump(exclude={"path", "extra"})
    images = load_captioned_images(data.path, split, **filters)
    if split == "train" and data.extra:
        images = images.joined(load_captioned_images(data.path, "extra", **{**filters, "styles": ()}))
    return images


def load_unlabelled(data: DataSection) -> torch.Tensor:
    """Read every training picture of the set, whatever the recipe's filters: uint8 (number, 3, height, width)."""
    images = load_captioned_images(data.path, "train")
    if data.extra:
        images = images.joined(load_captioned_images(data.path, "extra"))
    return images.pixels
